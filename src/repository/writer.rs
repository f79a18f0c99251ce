//! What a data directory knows of the generation it writes under: a small local file, so that pushing a segment costs
//! one request and not a look at the bucket first.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Claim, Descriptor, Repository, document};
use crate::clock::Clock;
use crate::disk;
use crate::error::{Error, Result};
use crate::model::{Timeline, WriteId};
use crate::storage::Store;

/// The local note of a claim. It is not in base backups, so a restored directory has none until it claims anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    /// The address it was claimed at; under another one the bucket has to be asked again.
    pub address: String,
    pub descriptor: Descriptor,
    pub claim: Claim,
    /// The timeline it was claimed on, where nobody watches the server: WAL of a later one says that it was promoted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// Names of files inside our directory of the data directory: the note, and the id of a claim that is being made.
const FILE: &str = "writer.json";
const CLAIMING: &str = "claiming";

impl Writer {
    pub fn new(repository: &Repository, claim: Claim) -> Writer {
        Writer { address: repository.address(), descriptor: repository.descriptor().clone(), claim, timeline: None }
    }

    fn path(own_dir: &Path) -> PathBuf {
        own_dir.join(FILE)
    }

    pub fn load(own_dir: &Path) -> Result<Option<Writer>> {
        let path = Writer::path(own_dir);
        let Some(bytes) = disk::read_if_there(&path)? else { return Ok(None) };
        document::read(&bytes).map(Some).map_err(|why| {
            Error::damaged(format!("{}: {why}", path.display()))
                .hint(format!("remove the file; the next start claims a new generation (rm '{}')", path.display()))
        })
    }

    pub fn save(&self, own_dir: &Path) -> Result<()> {
        disk::create_dir(own_dir, 0o700)?;
        disk::durable_write(&Writer::path(own_dir), &document::write(self)?, 0o600)?;
        disk::remove_if_there(&own_dir.join(CLAIMING))
    }

    /// Notes under which id this directory is about to claim: should we die before we know that the claim was made, the
    /// next start recognises it as ours.
    pub fn note_claiming(own_dir: &Path, id: WriteId) -> Result<()> {
        disk::create_dir(own_dir, 0o700)?;
        disk::durable_write(&own_dir.join(CLAIMING), id.to_string().as_bytes(), 0o600)
    }

    /// The id of a claim that was being made when the last start ended.
    pub fn claiming(own_dir: &Path) -> Result<Option<WriteId>> {
        let bytes = disk::read_if_there(&own_dir.join(CLAIMING))?;
        Ok(bytes.and_then(|bytes| String::from_utf8_lossy(&bytes).trim().parse().ok()))
    }

    pub fn forget(own_dir: &Path) -> Result<()> {
        disk::remove_if_there(&Writer::path(own_dir))
    }

    /// Whether WAL of this timeline says that the server was promoted since the claim.
    pub fn is_older_than(&self, timeline: Option<Timeline>) -> bool {
        self.timeline.zip(timeline).is_some_and(|(noted, now)| now > noted)
    }

    /// The repository as the note knows it; nothing is asked.
    pub fn repository(&self, store: std::sync::Arc<dyn Store>, clock: &Clock) -> Repository {
        Repository::assume(store, self.descriptor.clone(), clock)
    }
}
