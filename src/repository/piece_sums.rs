//! A hash of every kilobyte of tables and indexes that the last backup has, and each page's CRC, in a file beside the data on
//! the same disk: eight gigabytes for a terabyte, and while a backup runs as much again.
//!
//! With it a backup knows which pieces of a region are others than in the last one, whatever the pages say of themselves, so
//! that a patch over what is stored is what was read, to the byte. Whoever has no such file, or one of another backup, stores
//! regions that have changed whole. It need not survive a crash, and says so if it is not whole.
//!
//! The hash is XXH3 with 64 bits and a secret of the repository's: of a million million pieces that have changed it overlooks
//! one with a chance of one in ten million (with 32 bits it would be one in each four thousand million pieces), and nobody who
//! only writes rows can make two that have the same.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::patch::PAGES;
use super::region::PAGE;
use super::sums::{Hash, Sums};
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::model::{BackupId, RepositoryId};

const NAME: &str = "piece-sums";
const UNFINISHED: &str = ".tmp";
const MAGIC: &[u8; 8] = b"PPIECES2";

const BUFFER: usize = 256 << 10;

/// In place of a path's length: all is said.
const END: u16 = u16::MAX;

/// What proves a region's hashes, before them.
const PROOF: u64 = 8;

/// Bytes of what is said of so many pages.
fn length(pages: u32) -> u64 {
    PROOF * u64::from(pages).div_ceil(PAGES as u64) + Sums::OF_A_PAGE as u64 * u64::from(pages)
}

/// What is written of a region: a hash of its CRC and all that follows, then that.
fn record(hash: &Hash, sums: &Sums) -> Vec<u8> {
    let (crc, sums) = (sums.crc(), sums.to_bytes());
    [&proof(hash, crc, &sums)[..], &sums].concat()
}

fn proof(hash: &Hash, crc: u32, sums: &[u8]) -> [u8; PROOF as usize] {
    hash.sum(&[&crc.to_le_bytes()[..], sums].concat()).to_le_bytes()
}

/// What it means that they could not be kept.
pub fn lost(error: &Error) -> String {
    format!("the next backup stores what has changed by the megabyte: {error}")
}

/// Which backup it is of, as its file says.
fn title(repository: RepositoryId, backup: BackupId) -> String {
    format!("{repository} {backup}")
}

/// What a file's path is remembered as. Should two be the same, the CRCs are not those that the manifest has.
fn key(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(path.as_bytes());
    hasher.finish()
}

/// Those of one backup.
#[derive(Debug)]
pub struct PieceSums {
    file: Arc<File>,
    hash: Hash,
    /// Where those of a file begin, and how many they are.
    places: HashMap<u64, (u64, u32)>,
}

impl PieceSums {
    /// `None` when there are none of that backup, or not all.
    pub fn of(directory: &Path, repository: RepositoryId, backup: BackupId) -> Option<PieceSums> {
        let file = File::open(directory.join(NAME)).ok()?;
        let mut reader = Reader { file: BufReader::new(&file), at: 0 };
        if reader.take(MAGIC.len())? != MAGIC || reader.text()?? != title(repository, backup) {
            return None;
        }
        let mut places = HashMap::new();
        while let Some(path) = reader.text()? {
            let pages = reader.number()?;
            places.insert(key(&path), (reader.at, pages));
            reader.pass(length(pages))?;
        }
        Some(PieceSums { file: Arc::new(file), hash: Hash::of(repository), places })
    }

    /// Where those of a region are, if they are there.
    pub fn region(&self, path: &str, number: u64) -> Option<RegionSums> {
        let (begin, pages) = *self.places.get(&key(path))?;
        let first = u32::try_from(number.checked_mul(PAGES as u64)?).ok()?;
        let count = pages.checked_sub(first)?.min(PAGES as u32);
        Some(RegionSums { file: Arc::clone(&self.file), hash: self.hash.clone(), at: begin + length(first), count })
    }
}

/// Those of one region, to be read when they are needed.
#[derive(Debug, Clone)]
pub struct RegionSums {
    file: Arc<File>,
    hash: Hash,
    at: u64,
    count: u32,
}

impl RegionSums {
    /// `None` when they cannot be read, or are not those of a region with this CRC and this length.
    pub fn of(&self, crc: u32, plain: u32) -> Option<Sums> {
        if u64::from(plain) != u64::from(self.count) * PAGE as u64 {
            return None;
        }
        let mut bytes = vec![0; length(self.count) as usize];
        self.file.read_exact_at(&mut bytes, self.at).ok()?;
        disk::drop_from_cache(&self.file, self.at, bytes.len());
        let (found, sums) = bytes.split_first_chunk()?;
        (*found == proof(&self.hash, crc, sums)).then(|| Sums::of_bytes(sums))
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

/// Writes those of a backup that is restored, in whatever order its regions come: what its files are is known. A region
/// that does not come counts as other than anything.
#[derive(Debug)]
pub struct Filler {
    unfinished: Unfinished,
    file: File,
    hash: Hash,
    /// Where those of each file begin.
    places: Vec<Option<u64>>,
    failed: AtomicBool,
}

impl Filler {
    /// For these files, by path and number of pages.
    pub fn begin<'a>(
        directory: &Path,
        (repository, backup): (RepositoryId, BackupId),
        files: impl Iterator<Item = (&'a str, u32)>,
    ) -> Result<Filler> {
        let (unfinished, file) = Unfinished::create(directory, backup)?;
        let put = |bytes: &[u8], at: u64| {
            let written = file.write_all_at(bytes, at).on("write", &unfinished.path);
            written.map(|()| at + bytes.len() as u64)
        };
        let mut places = Vec::new();
        let mut end = put(&[MAGIC.as_slice(), &text(&title(repository, backup))].concat(), 0)?;
        for (path, pages) in files {
            places.push(match is_told(path, pages) {
                true => {
                    let begin = put(&[&text(path)[..], &pages.to_le_bytes()].concat(), end)?;
                    // What is not written reads as zeros.
                    end = begin + length(pages);
                    Some(begin)
                }
                false => None,
            });
        }
        put(&END.to_le_bytes(), end)?;
        Ok(Filler { unfinished, file, hash: Hash::of(repository), places, failed: AtomicBool::new(false) })
    }

    /// Those of a region of a file, if they are wanted.
    pub fn sums(&self, file: usize, region: &[u8]) -> Option<Sums> {
        self.places.get(file).copied().flatten().and_then(|_| self.hash.sums(region))
    }

    /// Takes those of a region of a file, by number.
    pub fn region(&self, file: usize, number: u64, sums: &Sums) {
        let Some(begin) = self.places.get(file).copied().flatten() else { return };
        let at = begin + number * length(PAGES as u32);
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        if self.file.write_all_at(&record(&self.hash, sums), at).is_err() {
            // On a full disk the room is given back at once.
            self.failed.store(true, Ordering::Relaxed);
            let _ = self.file.set_len(0);
        }
    }

    pub fn keep(self) -> Result<()> {
        match self.failed.load(Ordering::Relaxed) {
            true => Err(Error::refused(format!("could not write {}", self.unfinished.path.display()))),
            false => self.unfinished.keep(),
        }
    }
}

/// Writes those of a backup as it reads its files. They are in nobody's way until they are kept.
#[derive(Debug)]
pub struct Writer {
    unfinished: Unfinished,
    out: BufWriter<File>,
    hash: Hash,
    /// Pages that are still to come of the last file.
    left: u32,
    outcome: std::io::Result<()>,
}

impl Writer {
    pub fn begin(directory: &Path, repository: RepositoryId, backup: BackupId) -> Result<Writer> {
        let (unfinished, file) = Unfinished::create(directory, backup)?;
        let out = BufWriter::with_capacity(BUFFER, file);
        let mut writer = Writer { unfinished, out, hash: Hash::of(repository), left: 0, outcome: Ok(()) };
        writer.put(MAGIC);
        writer.put(&text(&title(repository, backup)));
        Ok(writer)
    }

    /// A file begins, of so many pages.
    pub fn file(&mut self, path: &str, pages: u32) {
        self.rest(self.left);
        if is_told(path, pages) {
            self.put(&text(path));
            self.put(&pages.to_le_bytes());
            self.left = pages;
        }
    }

    /// The next region of the file. What is not known of it counts as other than anything.
    pub fn region(&mut self, pages: u32, sums: Option<&Sums>) {
        let pages = pages.min(self.left);
        match sums.filter(|sums| sums.pages.len() == pages as usize) {
            Some(sums) => {
                self.put(&record(&self.hash, sums));
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
        flushed.on("write", &self.unfinished.path)?;
        self.unfinished.keep()
    }

    fn rest(&mut self, pages: u32) {
        let mut left = pages;
        while left > 0 {
            let region = left.min(PAGES as u32);
            self.put(&vec![0; length(region) as usize]);
            left -= region;
        }
        self.left = self.left.saturating_sub(pages);
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

/// Whether a file is one of those that something is said of.
fn is_told(path: &str, pages: u32) -> bool {
    pages > 0 && path.len() < usize::from(END)
}

/// A text after its length.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
}

/// A file that is not the one yet. It goes when it is not kept.
#[derive(Debug)]
struct Unfinished {
    directory: PathBuf,
    path: PathBuf,
}

impl Unfinished {
    fn create(directory: &Path, backup: BackupId) -> Result<(Unfinished, File)> {
        disk::create_dir(directory, 0o700)?;
        remove_unfinished(directory)?;
        let path = directory.join(format!("{NAME}-{backup}{UNFINISHED}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).on("create", &path)?;
        Ok((Unfinished { directory: directory.to_owned(), path }, file))
    }

    fn keep(self) -> Result<()> {
        disk::rename_note(&self.path, &self.directory.join(NAME))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = disk::remove_if_there(&self.path);
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
        writer.region(128, Some(&sums(128)));
        writer.region(2, Some(&sums(2)));
        writer.file("not/of/pages", 0);
        writer.region(3, Some(&sums(3)));
        writer.file("base/5/2", 3);
        writer.region(3, None);
        writer
    }

    /// Of so many pages.
    fn sums(pages: u32) -> Sums {
        Sums { pieces: (1..=u64::from(pages) * 8).collect(), pages: (1..=pages).collect() }
    }

    #[test]
    fn they_read_back_by_file_and_region_for_their_own_backup_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let read = |nonce| PieceSums::of(directory.path(), REPOSITORY, backup(nonce));
        assert!(read(1).is_none());
        write(directory.path(), 1).keep().expect("kept");
        let sums = read(1).expect("there");
        let region = |path, number, crc, pages: u32| sums.region(path, number)?.of(crc, pages * PAGE as u32);
        let crc = |pages| self::sums(pages).crc();
        assert_eq!(region("base/5/1", 0, crc(128), 128), Some(self::sums(128)));
        assert_eq!(region("base/5/1", 1, crc(2), 2), Some(self::sums(2)));
        assert_eq!(region("base/5/1", 1, crc(3), 2), None, "another CRC");
        assert_eq!(region("base/5/1", 1, crc(2), 3), None, "another length");
        assert_eq!(region("base/5/1", 2, 0, 0), None);
        assert_eq!(region("not/of/pages", 0, crc(3), 3), None);
        assert_eq!(region("base/5/2", 0, 0, 3), None, "nothing is said of it");
        assert!(read(2).is_none());
        assert!(PieceSums::of(directory.path(), RepositoryId([8; 16]), backup(1)).is_none());
    }

    #[test]
    fn those_of_a_restore_are_written_in_any_order() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = [("base/5/1", 130), ("base/5/1_vm", 0), ("base/5/2", 1)];
        let filler = Filler::begin(directory.path(), (REPOSITORY, backup(1)), files.into_iter()).expect("begun");
        let region: Vec<u8> = (0..PAGES * PAGE).map(|n| (n / 9) as u8).collect();
        let of = |pages: usize| Hash::of(REPOSITORY).sums(&region[..pages * PAGE]).expect("whole pages");
        assert_eq!(filler.sums(0, &region[..2 * PAGE]), Some(of(2)));
        assert_eq!(filler.sums(1, &region[..PAGE]), None);
        filler.region(0, 1, &of(2));
        filler.region(1, 0, &of(1));
        filler.region(0, 0, &of(PAGES));
        filler.keep().expect("kept");
        let sums = PieceSums::of(directory.path(), REPOSITORY, backup(1)).expect("there");
        let read = |path, number, crc, pages: usize| sums.region(path, number)?.of(crc, (pages * PAGE) as u32);
        assert_eq!(read("base/5/1", 0, of(PAGES).crc(), PAGES), Some(of(PAGES)));
        assert_eq!(read("base/5/1", 1, of(2).crc(), 2), Some(of(2)));
        assert_eq!(read("base/5/2", 0, of(1).crc(), 1), None, "it did not come");
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_flipped_bit_makes_them_none() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), 1).keep().expect("kept");
        let path = directory.path().join(NAME);
        let mut bytes = std::fs::read(&path).expect("read");
        let at = bytes.windows(8).position(|sum| sum == 700u64.to_le_bytes()).expect("a hash");
        bytes[at] ^= 4;
        std::fs::write(&path, bytes).expect("written");
        let read = PieceSums::of(directory.path(), REPOSITORY, backup(1)).expect("there");
        let region = |number, pages| read.region("base/5/1", number)?.of(sums(pages).crc(), pages * PAGE as u32);
        assert_eq!((region(0, 128), region(1, 2)), (None, Some(sums(2))));
    }

    #[test]
    fn a_backup_that_fails_leaves_those_of_the_last_one_and_half_of_them_are_none() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), 1).keep().expect("kept");
        std::mem::forget(write(directory.path(), 2));
        drop(write(directory.path(), 3));
        assert!(PieceSums::of(directory.path(), REPOSITORY, backup(1)).is_some());
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 1, "nothing else is left");
        let path = directory.path().join(NAME);
        let length = std::fs::metadata(&path).expect("there").len();
        OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(length - 1)).expect("cut");
        assert!(PieceSums::of(directory.path(), REPOSITORY, backup(1)).is_none());
    }
}
