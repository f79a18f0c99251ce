//! Crash-safe local files: what was reported written is there after a power cut, and a name never shows half a file.
//!
//! An fsync that fails is always an error: the kernel may have dropped the data, so nobody may be told it is safe.

mod flush;
mod read;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Kind, Result};

pub use flush::Flusher;
pub use read::UncachedFile;

/// Writes a file so that after a crash its name shows the old content or the new, never a part: temporary file in the
/// same directory, fsync, rename, fsync of the directory.
pub fn durable_write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let temporary = temporary_beside(path);
    let _ = std::fs::remove_file(&temporary);
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).on("create", &temporary)?;
    file.write_all(content).on("write", &temporary)?;
    file.sync_all().on("sync", &temporary)?;
    durable_rename(&temporary, path)
}

/// Writes a note whose loss or damage is harmless: no syncing.
#[allow(clippy::disallowed_methods, reason = "the one place for files that need not survive a crash")]
pub fn write_note(path: &Path, content: &[u8]) -> Result<()> {
    std::fs::write(path, content).on("write", path)
}

/// Gives such a note its name.
#[allow(clippy::disallowed_methods, reason = "the one place for files that need not survive a crash")]
pub fn rename_note(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).on("rename to", to)
}

/// Renames within one filesystem and makes the new name durable. The content must have been synced before.
#[allow(clippy::disallowed_methods, reason = "this is the crash-safe rename")]
pub fn durable_rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).on("rename to", to)?;
    sync_dir(parent_of(to))
}

/// Makes the names in a directory durable.
pub fn sync_dir(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|dir| dir.sync_all()).on("sync directory", directory)
}

/// Creates a directory (and those above it) unless it is there.
pub fn create_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).on("create directory", path)
}

/// Whether a directory is not there, or has nothing in it but what a file system makes of itself and names of which
/// `passes` says so.
pub fn is_vacant_but(directory: &Path, passes: impl Fn(&str) -> bool) -> Result<bool> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        entries => entries.on("list directory", directory)?,
    };
    for entry in entries {
        let name = entry.on("list directory", directory)?.file_name();
        if name != "lost+found" && !name.to_str().is_some_and(&passes) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tells the kernel that a part of a file will not be read again soon. Only a wish. For what was just written it is a dear one: such
/// pages stay, and looking for them took half of a restore's processor time.
pub fn drop_from_cache(file: &File, offset: u64, length: usize) {
    if let Some(length) = std::num::NonZeroU64::new(length as u64) {
        let _ = rustix::fs::fadvise(file, offset, Some(length), rustix::fs::Advice::DontNeed);
    }
}

/// Whether the name is there. What cannot be looked at is an error.
pub fn is_there(path: &Path) -> Result<bool> {
    path.try_exists().on("stat", path)
}

/// Removes a file; one that is not there is fine.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).on("remove", path),
        _ => Ok(()),
    }
}

/// The content of a small file, or `None` when there is none.
pub fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).on("read", path),
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

/// An exclusive lock on a file, held until dropped or until the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at once, or says that somebody else holds it.
    pub fn try_take(path: &Path) -> Result<Option<Lock>> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).on("open", path)?;
        Lock::on(file, path)
    }

    /// The same on a directory itself: it survives whatever is done to its content.
    pub fn of_directory(path: &Path) -> Result<Option<Lock>> {
        Lock::on(File::open(path).on("open", path)?, path)
    }

    fn on(file: File, path: &Path) -> Result<Option<Lock>> {
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(e)) => {
                Err(Error::new(Kind::Local, format!("could not lock {}", path.display())).source(e))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.json");
        durable_write(&path, b"old, and longer", 0o600).expect("first");
        durable_write(&path, b"new", 0o600).expect("second");
        assert_eq!(std::fs::read(&path).expect("content"), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let held = Lock::try_take(&path).expect("works").expect("free");
        assert!(Lock::try_take(&path).expect("works").is_none());
        drop(held);
        assert!(Lock::try_take(&path).expect("works").is_some());
    }
}
