//! Which generation's WAL a directory was recovered with that nobody has claimed: a small note inside it.
//!
//! Should the directory become the database, that is its parent. A standby notes the newest generation it was given
//! anything of, before it is given it: so a history that does not have that generation is known to be another one.

use std::path::Path;

use crate::disk;
use crate::error::{IoContext, Result};
use crate::model::{Generation, RepositoryId};

const FILE: &str = "origin";

pub fn note(own_dir: &Path, repository: RepositoryId, generation: Generation) -> Result<()> {
    let origin = format!("{repository} {}\n", generation.padded());
    let path = own_dir.join(FILE);
    if disk::read_if_there(&path)?.is_some_and(|noted| noted == origin.as_bytes()) {
        return Ok(());
    }
    disk::create_dir(own_dir, 0o700)?;
    disk::durable_write(&path, origin.as_bytes(), 0o600)
}

/// A directory that has claimed a generation has no other origin any more.
pub fn forget(own_dir: &Path) -> Result<()> {
    disk::remove_if_there(&own_dir.join(FILE))
}

/// The generation, if it is one of this repository.
pub fn read(own_dir: &Path, repository: RepositoryId) -> Result<Option<Generation>> {
    let path = own_dir.join(FILE);
    let Some(bytes) = disk::read_if_there(&path)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    let parsed = text
        .trim()
        .split_once(' ')
        .and_then(|(id, generation)| Some((id.parse::<RepositoryId>().ok()?, Generation::from_padded(generation)?)));
    let (id, generation) =
        parsed.ok_or_else(|| std::io::Error::other("it is not the note of an origin")).on("read", &path)?;
    Ok((id == repository).then_some(generation))
}
