//! Marks for segments that were pushed ahead of PostgreSQL's asking, so that its own call for them costs nothing.
//!
//! A mark is written only after the store has the segment, and names the very file: one that is lost or does not fit
//! costs a second push, which finds the same bytes there.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk;
use crate::error::{IoContext, Result};
use crate::model::Generation;
use crate::wal::SegmentName;

const DIRECTORY: &str = "pushed";

fn path(own_dir: &Path, name: SegmentName) -> PathBuf {
    own_dir.join(DIRECTORY).join(name.to_string())
}

/// What identifies the file as the one that was pushed.
fn identity(file: &Path, generation: Generation) -> Result<String> {
    let metadata = std::fs::metadata(file).on("stat", file)?;
    Ok(format!("{generation} {} {} {} {}\n", metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

pub(super) fn mark(own_dir: &Path, name: SegmentName, file: &Path, generation: Generation) -> Result<()> {
    disk::create_dir(&own_dir.join(DIRECTORY), 0o700)?;
    disk::write_note(&path(own_dir, name), identity(file, generation)?.as_bytes())
}

/// Whether this very file was pushed; the mark has then served.
pub(super) fn take(own_dir: &Path, name: SegmentName, file: &Path, generation: Generation) -> Result<bool> {
    let mark = path(own_dir, name);
    let Some(noted) = disk::read_if_there(&mark)? else { return Ok(false) };
    let fits = noted == identity(file, generation)?.as_bytes();
    disk::remove_if_there(&mark)?;
    Ok(fits)
}

pub(super) fn is_marked(own_dir: &Path, name: SegmentName) -> bool {
    path(own_dir, name).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_serves_once_and_only_for_the_file_that_was_pushed() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("segment");
        let name: SegmentName = "000000010000000000000001".parse().expect("a name");
        std::fs::write(&file, b"one").expect("written");
        assert!(!take(dir.path(), name, &file, Generation(1)).expect("works"), "never pushed");
        mark(dir.path(), name, &file, Generation(1)).expect("marked");
        assert!(take(dir.path(), name, &file, Generation(1)).expect("works"));
        assert!(!take(dir.path(), name, &file, Generation(1)).expect("works"), "served already");
        mark(dir.path(), name, &file, Generation(1)).expect("marked");
        assert!(!take(dir.path(), name, &file, Generation(2)).expect("works"), "another generation");
        mark(dir.path(), name, &file, Generation(1)).expect("marked");
        std::fs::write(&file, b"other").expect("written");
        assert!(!take(dir.path(), name, &file, Generation(1)).expect("works"), "another content");
    }
}
