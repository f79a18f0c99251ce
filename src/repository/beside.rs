//! Snapshots of directories beside the database: an application's index, its uploads, its configuration. Each hangs on a
//! backup and goes with it; its position says which states of the database it is not ahead of.

use std::ops::ControlFlow;

use futures::StreamExt;
use serde::{Deserialize, Serialize};

use super::lines::{Heads, Line, Lines, LinesWriter, object};
use super::{Repository, layout};
use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, DirectoryName, Generation, Lsn, PackId, RepositoryId, Timeline, Timestamp, WriteId};
use crate::storage::Body;

const FORMAT: &str = "perennial/beside/1";

/// Marks a directory that has not been put back whole.
pub const UNFINISHED: &str = ".perennial-restoring";

/// What a directory that cannot be renamed had in it before it was put back goes into one in it, whose name begins so.
pub const SET_ASIDE: &str = ".perennial-replaced-";

/// Heads read at once.
const PARALLEL: usize = 16;

/// What is known of a snapshot without its list of files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BesideHead {
    pub format: String,
    pub write_id: WriteId,
    pub repository_id: RepositoryId,
    /// The backup that it goes with.
    pub backup_id: BackupId,
    pub name: DirectoryName,
    /// Where the directory was, for people.
    pub path: String,
    pub generation: Generation,
    pub timeline: Timeline,
    /// Where WAL was when the directory had been read: nothing in it is of a later commit.
    pub lsn: Lsn,
    /// The same as a moment, by the server's clock.
    pub taken_at: Timestamp,
    pub files: u64,
    /// Bytes of all files, and of the packs that this snapshot has put itself.
    pub bytes: u64,
    pub stored: u64,
    /// Files that were still being written to each time they were read: each of these may be a mixture of two moments.
    pub changing: u64,
    #[serde(flatten)]
    pub lines: Lines,
}

impl BesideHead {
    /// The object: the head, completed with what the lines came to, and the lines.
    pub fn with(mut self, lines: LinesWriter) -> Result<Body> {
        let (lines, frames) = lines.finish()?;
        self.format = FORMAT.to_owned();
        self.lines = lines;
        object(&self, frames)
    }

    pub fn key(&self) -> String {
        layout::beside(self.backup_id, &self.name, self.write_id)
    }
}

impl Heads for BesideHead {
    const FORMAT: &str = FORMAT;

    fn lines(&self) -> &Lines {
        &self.lines
    }
}

impl Repository {
    pub async fn put_beside(&self, key: &str, body: &Body) -> Result<()> {
        self.put_new(key, body).await
    }

    /// The heads of all snapshots of a directory, or of every one, that hang on backups that exist; what is wrong with the
    /// others comes second.
    pub async fn besides(&self, name: Option<&DirectoryName>) -> Result<(Vec<BesideHead>, Vec<Error>)> {
        let of = self.backup_objects().await?;
        let exists = of.values().filter(|of| of.manifest.is_some() && of.tombstone.is_none());
        let keys = exists.flat_map(|of| &of.beside).map(|entry| entry.key.clone());
        let wanted =
            keys.filter(|key| name.is_none_or(|name| layout::parse_beside(key).is_some_and(|(_, of, _)| of == *name)));
        let reads: Vec<_> = wanted.map(|key| async move { self.beside_start(&key).await }).collect();
        let mut reads = futures::stream::iter(reads).buffered(PARALLEL);
        let (mut sound, mut damaged) = (Vec::new(), Vec::new());
        while let Some(read) = reads.next().await {
            match read {
                Ok(found) => sound.extend(found.map(|(head, _)| head)),
                Err(error) if error.kind() == Kind::Damaged => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok((sound, damaged))
    }

    /// The newest snapshot of a directory, wherever it was taken.
    pub async fn newest_beside(&self, name: &DirectoryName) -> Result<Option<BesideHead>> {
        let objects = self.backup_objects().await?;
        let exists = objects.values().rev().filter(|of| of.manifest.is_some() && of.tombstone.is_none());
        for of in exists {
            let mut newest: Option<BesideHead> = None;
            for entry in &of.beside {
                if layout::parse_beside(&entry.key).is_some_and(|(_, of, _)| of == *name)
                    && let Some((head, _)) = self.beside_start(&entry.key).await?
                    && newest.as_ref().is_none_or(|newest| newest.taken_at <= head.taken_at)
                {
                    newest = Some(head);
                }
            }
            if newest.is_some() {
                return Ok(newest);
            }
        }
        Ok(None)
    }

    /// A snapshot's head and its length; `None` when it was deleted meanwhile.
    async fn beside_start(&self, key: &str) -> Result<Option<(BesideHead, u64)>> {
        let Some((head, at)) = self.head_of_lines::<BesideHead>(key).await? else { return Ok(None) };
        if head.key() != key || head.repository_id != self.descriptor.repository_id {
            return Err(self.corrupt(key, "it is another snapshot"));
        }
        Ok(Some((head, at)))
    }

    /// Reads all of a snapshot, handing each line over in order, `End` not included.
    pub async fn read_beside(&self, key: &str, mut line: impl FnMut(Line) -> Result<()> + Send) -> Result<BesideHead> {
        let (head, at) = self.beside_start(key).await?.ok_or_else(|| self.missing(key))?;
        self.read_lines(key, at, &head.lines, &mut |next| line(next).map(ControlFlow::Continue)).await?;
        Ok(head)
    }

    /// The packs a snapshot names; none for one that was deleted meanwhile.
    pub async fn packs_of_beside(&self, key: &str) -> Result<Vec<PackId>> {
        match self.beside_start(key).await? {
            Some((head, at)) => self.packs_in(key, at, &head.lines).await,
            None => Ok(Vec::new()),
        }
    }
}
