//! One region of one file: read, look at its pages, compress. Runs on a blocking thread.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::UncachedFile;
use crate::error::Result;
use crate::model::Lsn;
use crate::postgres::page::{self, PAGE};
use crate::repository::Codec;
use crate::repository::codec::Sha256;

/// A page that fails its checksum is read again this many times: the server may be writing it right now.
const REREADS: u32 = 5;

/// What to read and how to look at it.
#[derive(Debug, Clone)]
pub struct Job {
    pub file: Arc<UncachedFile>,
    pub offset: u64,
    /// Bytes this region has; what the file no longer has of them reads as zeros, as in pg_basebackup.
    pub length: usize,
    /// Number of the region's first block, when its pages carry checksums.
    pub first_block: Option<u32>,
    /// Pages changed since this position may be torn: WAL writes them whole.
    pub start: Lsn,
    pub codec: Codec,
}

/// A region ready to be packed.
#[derive(Debug)]
pub struct Read {
    pub frame: Bytes,
    pub sha256: Sha256,
    pub plain: u32,
    pub crc: u32,
    /// Blocks whose checksum does not hold.
    pub damaged: Vec<u32>,
}

pub fn read(job: &Job) -> Result<Read> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with(|buffer| {
        let mut buffer = buffer.borrow_mut();
        buffer.clear();
        buffer.resize(job.length, 0);
        let filled = job.file.read_at(&mut buffer, job.offset)?;
        buffer[filled..].fill(0);
        let damaged = match job.first_block {
            Some(first_block) => check_pages(job, first_block, &mut buffer[..filled])?,
            None => Vec::new(),
        };
        compress(&buffer, job.codec, damaged)
    })
}

/// Packs bytes that are already in memory.
pub fn compress(plain: &[u8], codec: Codec, damaged: Vec<u32>) -> Result<Read> {
    let frame = codec.compress(plain)?;
    Ok(Read {
        sha256: Sha256::of(&frame),
        frame: Bytes::from(frame),
        plain: plain.len() as u32,
        crc: crc32c::crc32c(plain),
        damaged,
    })
}

fn check_pages(job: &Job, first_block: u32, bytes: &mut [u8]) -> Result<Vec<u32>> {
    let mut damaged = Vec::new();
    let (pages, _) = bytes.as_chunks_mut::<PAGE>();
    for (index, page) in pages.iter_mut().enumerate() {
        let block = first_block + index as u32;
        let offset = job.offset + (index * PAGE) as u64;
        if !is_sound(page, block, job.start) && !reread(job, page, block, offset)? {
            damaged.push(block);
        }
    }
    Ok(damaged)
}

/// A page is sound when its checksum holds, or when it was changed after the backup began.
fn is_sound(page: &[u8; PAGE], block: u32, start: Lsn) -> bool {
    page::is_intact(page, block) || page::lsn(page) >= start
}

fn reread(job: &Job, page: &mut [u8; PAGE], block: u32, offset: u64) -> Result<bool> {
    for _ in 0..REREADS {
        let filled = job.file.read_at(page, offset)?;
        if filled < PAGE {
            // Truncated meanwhile: WAL knows.
            page[filled..].fill(0);
            return Ok(true);
        }
        if is_sound(page, block, job.start) {
            return Ok(true);
        }
        std::thread::yield_now();
    }
    Ok(false)
}
