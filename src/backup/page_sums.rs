//! The CRC-32C of every page of tables and indexes that the last backup has, in a file beside the data on the same disk: half
//! a gigabyte for a terabyte, and while a backup runs as much again.
//!
//! With it a backup knows which pages of a region are others than in the last one, whatever the pages say of themselves, so
//! that a patch over what is stored is what was read, to the byte. Whoever has no such file, or one of another backup, stores
//! regions that have changed whole. It need not survive a crash, and says so if it is not whole.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk;
use crate::error::{IoContext, Result};
use crate::model::{BackupId, RepositoryId};
use crate::repository::page_crc::PAGES;

const NAME: &str = "page-sums";
const UNFINISHED: &str = ".tmp";
const MAGIC: &[u8; 8] = b"PPAGES01";

const BUFFER: usize = 256 << 10;

/// In place of a path's length: all is said.
const END: u16 = u16::MAX;

/// Which backup it is of, as its file says.
fn title(repository: RepositoryId, backup: BackupId) -> String {
    format!("{repository} {backup}")
}

/// What a file's path is remembered as. Should two be the same, the sums do not add up to what the manifest says.
fn key(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// Those of one backup.
#[derive(Debug)]
pub struct PageSums {
    file: Arc<File>,
    /// Where those of a file begin, and how many they are.
    places: HashMap<u64, (u64, u32)>,
}

impl PageSums {
    /// `None` when there are none of that backup, or not all.
    pub fn of(directory: &Path, repository: RepositoryId, backup: BackupId) -> Option<PageSums> {
        let file = File::open(directory.join(NAME)).ok()?;
        let mut reader = Reader { file: BufReader::new(&file), at: 0 };
        if reader.take(MAGIC.len())? != MAGIC || reader.text()?? != title(repository, backup) {
            return None;
        }
        let mut places = HashMap::new();
        while let Some(path) = reader.text()? {
            let pages = reader.number()?;
            places.insert(key(&path), (reader.at, pages));
            reader.pass(4 * u64::from(pages))?;
        }
        Some(PageSums { file: Arc::new(file), places })
    }

    /// Where those of a region are, if they are there.
    pub fn region(&self, path: &str, number: u64) -> Option<RegionSums> {
        let (begin, pages) = *self.places.get(&key(path))?;
        let first = number.checked_mul(PAGES as u64)?;
        let count = u64::from(pages).checked_sub(first)?.min(PAGES as u64);
        Some(RegionSums { file: Arc::clone(&self.file), at: begin + 4 * first, count: count as usize })
    }
}

/// Those of one region, to be read when they are needed.
#[derive(Debug, Clone)]
pub struct RegionSums {
    file: Arc<File>,
    at: u64,
    count: usize,
}

impl RegionSums {
    /// `None` when they cannot be read.
    pub fn read(&self) -> Option<Vec<u32>> {
        let mut bytes = vec![0; 4 * self.count];
        self.file.read_exact_at(&mut bytes, self.at).ok()?;
        let (sums, _) = bytes.as_chunks::<4>();
        Some(sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect())
    }
}

struct Reader<'a> {
    file: BufReader<&'a File>,
    at: u64,
}

impl Reader<'_> {
    fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact(&mut bytes).ok()?;
        self.at += length as u64;
        Some(bytes)
    }

    fn pass(&mut self, length: u64) -> Option<()> {
        self.file.seek_relative(i64::try_from(length).ok()?).ok()?;
        self.at += length;
        Some(())
    }

    /// A text after its length; nothing at the end.
    fn text(&mut self) -> Option<Option<String>> {
        let length = self.take(2)?;
        match u16::from_le_bytes([length[0], length[1]]) {
            END => Some(None),
            // What a crash has left of a file.
            0 => None,
            length => String::from_utf8(self.take(length.into())?).ok().map(Some),
        }
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(*self.take(4)?.first_chunk()?))
    }
}

/// Writes those of a backup as it reads its files. They are in nobody's way until they are kept.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    unfinished: PathBuf,
    out: BufWriter<File>,
    /// Pages that are still to come of the last file.
    left: u32,
    outcome: std::io::Result<()>,
}

impl Writer {
    pub fn begin(directory: &Path, repository: RepositoryId, backup: BackupId) -> Result<Writer> {
        disk::create_dir(directory, 0o700)?;
        remove_unfinished(directory)?;
        let unfinished = directory.join(format!("{NAME}-{backup}{UNFINISHED}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let out = BufWriter::with_capacity(BUFFER, file.on("create", &unfinished)?);
        let mut writer = Writer { directory: directory.to_owned(), unfinished, out, left: 0, outcome: Ok(()) };
        writer.put(MAGIC);
        writer.text(&title(repository, backup));
        Ok(writer)
    }

    /// A file begins, of so many pages.
    pub fn file(&mut self, path: &str, pages: u32) {
        self.rest(self.left);
        if pages > 0 && path.len() < usize::from(END) {
            self.text(path);
            self.put(&pages.to_le_bytes());
            self.left = pages;
        }
    }

    /// The next pages of the file. What is not known of them counts as other than anything.
    pub fn region(&mut self, pages: u32, sums: Option<&[u32]>) {
        let pages = pages.min(self.left);
        match sums.filter(|sums| sums.len() == pages as usize) {
            Some(sums) => {
                let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
                self.put(&bytes);
                self.left -= pages;
            }
            None => self.rest(pages),
        }
    }

    /// From now on these are the ones: their backup exists.
    pub fn keep(mut self) -> Result<()> {
        self.rest(self.left);
        self.put(&END.to_le_bytes());
        let flushed = std::mem::replace(&mut self.outcome, Ok(())).and_then(|()| self.out.flush());
        flushed.on("write", &self.unfinished)?;
        disk::rename_note(&self.unfinished, &self.directory.join(NAME))
    }

    fn rest(&mut self, pages: u32) {
        self.put(&vec![0; 4 * pages as usize]);
        self.left = self.left.saturating_sub(pages);
    }

    fn text(&mut self, text: &str) {
        self.put(&(text.len() as u16).to_le_bytes());
        self.put(text.as_bytes());
    }

    /// What goes wrong is told in the end: a backup does not fail for it. On a full disk the room is given back at once.
    fn put(&mut self, bytes: &[u8]) {
        if self.outcome.is_ok() {
            self.outcome = self.out.write_all(bytes);
            if self.outcome.is_err() {
                let _ = self.out.get_ref().set_len(0);
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = disk::remove_if_there(&self.unfinished);
    }
}

/// What a backup that was killed has left.
fn remove_unfinished(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory).on("list directory", directory)? {
        let path = entry.on("list directory", directory)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(NAME) && name.ends_with(UNFINISHED) {
            disk::remove_if_there(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Generation, Lsn};

    const REPOSITORY: RepositoryId = RepositoryId([7; 16]);

    fn backup(nonce: u16) -> BackupId {
        BackupId { generation: Generation(1), start: Lsn(40), nonce }
    }

    fn write(directory: &Path, nonce: u16) -> Writer {
        let mut writer = Writer::begin(directory, REPOSITORY, backup(nonce)).expect("begun");
        writer.file("base/5/1", 130);
        writer.region(128, Some(&(1..=128).collect::<Vec<_>>()));
        writer.region(2, Some(&[7, 8]));
        writer.file("not/of/pages", 0);
        writer.region(3, Some(&[1, 2, 3]));
        writer.file("base/5/2", 3);
        writer.region(3, None);
        writer
    }

    #[test]
    fn they_read_back_by_file_and_region_for_their_own_backup_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let read = |nonce| PageSums::of(directory.path(), REPOSITORY, backup(nonce));
        assert!(read(1).is_none());
        write(directory.path(), 1).keep().expect("kept");
        let sums = read(1).expect("there");
        let region = |path, number| sums.region(path, number).and_then(|sums| sums.read());
        assert_eq!(region("base/5/1", 0), Some((1..=128).collect()));
        assert_eq!(region("base/5/1", 1), Some(vec![7, 8]));
        assert_eq!(region("base/5/1", 2), None);
        assert_eq!(region("not/of/pages", 0), None);
        assert_eq!(region("base/5/2", 0), Some(vec![0; 3]));
        assert!(read(2).is_none());
        assert!(PageSums::of(directory.path(), RepositoryId([8; 16]), backup(1)).is_none());
    }

    #[test]
    fn a_backup_that_fails_leaves_those_of_the_last_one_and_half_of_them_are_none() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), 1).keep().expect("kept");
        std::mem::forget(write(directory.path(), 2));
        drop(write(directory.path(), 3));
        assert!(PageSums::of(directory.path(), REPOSITORY, backup(1)).is_some());
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 1, "nothing else is left");
        let path = directory.path().join(NAME);
        let length = std::fs::metadata(&path).expect("there").len();
        OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(length - 1)).expect("cut");
        assert!(PageSums::of(directory.path(), REPOSITORY, backup(1)).is_none());
    }
}
