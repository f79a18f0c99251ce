//! Reading large files without pushing the server's pages out of the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::ReadWriteFlags;

use crate::error::{IoContext, Result};

/// `RWF_DONTCACHE` (Linux 6.14): uses what is cached, leaves nothing new behind. rustix has no name for it yet.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Set once the kernel or a filesystem has said that it does not know the flag.
static UNSUPPORTED: AtomicBool = AtomicBool::new(false);

/// A file read by position, page cache left as it was where the kernel can do that.
#[derive(Debug)]
pub struct UncachedFile {
    file: File,
    path: PathBuf,
}

impl UncachedFile {
    /// `None` when there is no such file: PostgreSQL may drop a relation at any moment.
    pub fn open(path: &Path) -> Result<Option<UncachedFile>> {
        match File::open(path) {
            Ok(file) => Ok(Some(UncachedFile { file, path: path.to_owned() })),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).on("open", path),
        }
    }

    pub fn size(&self) -> Result<u64> {
        Ok(self.file.metadata().on("stat", &self.path)?.len())
    }

    /// Which file this is on its disk: inode and time of birth. `None` where the file system does not tell.
    pub fn birth(&self) -> Option<String> {
        let wanted = rustix::fs::StatxFlags::INO | rustix::fs::StatxFlags::BTIME;
        let told = rustix::fs::statx(&self.file, "", rustix::fs::AtFlags::EMPTY_PATH, wanted).ok()?;
        let has_birth = rustix::fs::StatxFlags::from_bits_retain(told.stx_mask).contains(wanted);
        let nanos = i128::from(told.stx_btime.tv_sec) * 1_000_000_000 + i128::from(told.stx_btime.tv_nsec);
        has_birth.then(|| format!("{}-{nanos}", told.stx_ino))
    }

    /// Fills `buffer` from `offset`; returns fewer bytes only at the end of the file.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_some(&mut buffer[filled..], offset + filled as u64).on("read", &self.path)? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    fn read_some(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        if !UNSUPPORTED.load(Ordering::Relaxed) {
            match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, DONTCACHE) {
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
                    UNSUPPORTED.store(true, Ordering::Relaxed);
                }
                Err(rustix::io::Errno::INTR) => return self.read_some(buffer, offset),
                answer => return Ok(answer?),
            }
        }
        self.file.read_at(buffer, offset)
    }
}
