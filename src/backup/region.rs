//! One region of one file: read, look at its pages, compare with what the last backup has, compress what is new. Runs on
//! a blocking thread.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::UncachedFile;
use crate::error::Result;
use crate::model::Lsn;
use crate::postgres::page::{self, PAGE};
use crate::repository::codec::Sha256;
use crate::repository::{Codec, Pages, Region};

/// A page that fails its checksum is read again this many times: the server may be writing it right now.
const REREADS: u32 = 5;

/// A region is stored anew once its patches would be more than this many, or hold more than this many pages: half of them.
/// So a restore reads half more than after a full backup at most, whatever came before; and where a twentieth of all pages
/// changes before each backup, a region is stored whole with every tenth. A smaller share would be read faster and stored
/// dearer: 1 + 1/share times what changed.
const PATCHES_MAX: usize = 16;
const PATCHED_PAGES_MAX: u32 = 64;

/// No record lies before the first segment, however small that is: lower positions on pages are special (`GistBuildLSN`).
const FIRST: Lsn = Lsn(1 << 20);

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
    pub known: Option<Known>,
}

/// The region as the last backup has it, and what may be concluded from that.
#[derive(Debug, Clone)]
pub struct Known {
    pub region: Region,
    /// Its pages tell when they were changed last; that backup began here.
    pub pages_since: Option<Lsn>,
    /// The file is the same one as then, and pages change with their position only: those with an older one are as they
    /// were. Without this a path may have been used again, by a file whose pages are older than the last backup.
    pub may_patch: bool,
    /// WAL says that nothing has written to it since.
    pub untouched: bool,
}

impl Known {
    /// The region, if it need not be read.
    pub fn unread(&self, length: usize) -> Option<&Region> {
        // What WAL says is of the same file; and what is beyond the length it had then is not in that backup.
        let same = self.untouched && self.may_patch && self.region.plain as usize == length;
        same.then_some(&self.region)
    }
}

/// A region ready to be packed.
#[derive(Debug)]
pub struct Read {
    pub content: Content,
    pub plain: u32,
    pub crc: u32,
    /// Blocks whose checksum does not hold.
    pub damaged: Vec<u32>,
    /// It was not read: WAL says that it is as the last backup has it.
    pub unread: bool,
}

#[derive(Debug)]
pub enum Content {
    /// As the last backup has it.
    Same(Region),
    Whole(Packed),
    /// These pages over what the last backup has.
    Patch(Region, Packed, Pages),
}

#[derive(Debug)]
pub struct Packed {
    pub frame: Bytes,
    pub sha256: Sha256,
}

impl Packed {
    fn of(plain: &[u8], codec: Codec) -> Result<Packed> {
        let frame = codec.compress(plain)?;
        Ok(Packed { sha256: Sha256::of(&frame), frame: Bytes::from(frame) })
    }
}

pub fn read(job: &Job) -> Result<Read> {
    if let Some(region) = job.known.as_ref().and_then(|known| known.unread(job.length)) {
        let (plain, crc) = (region.plain, region.crc);
        return Ok(Read { content: Content::Same(region.clone()), plain, crc, damaged: Vec::new(), unread: true });
    }
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
        pack(&buffer, job.codec, job.known.as_ref(), damaged)
    })
}

/// Packs bytes that are in memory, or finds that the last backup has them.
pub fn pack(plain: &[u8], codec: Codec, known: Option<&Known>, damaged: Vec<u32>) -> Result<Read> {
    let crc = crc32c::crc32c(plain);
    // What is damaged is stored as it is: neither the last backup nor the page's own word tells what it was.
    let usable = known.filter(|known| known.region.plain as usize == plain.len() && damaged.is_empty());
    let content = match usable {
        Some(known) => compare(plain, crc, codec, known)?,
        None => Content::Whole(Packed::of(plain, codec)?),
    };
    Ok(Read { content, plain: plain.len() as u32, crc, damaged, unread: false })
}

fn compare(plain: &[u8], crc: u32, codec: Codec, known: &Known) -> Result<Content> {
    let (pages, rest) = plain.as_chunks::<PAGE>();
    let Some(since) = known.pages_since.filter(|_| rest.is_empty()) else {
        // Nothing in it says when it changed: only the same bytes are the same.
        let packed = Packed::of(plain, codec)?;
        let same = known.region.patches.is_empty() && packed.sha256 == known.region.frame.sha256;
        return Ok(if same { Content::Same(known.region.clone()) } else { Content::Whole(packed) });
    };
    let (mut changed, mut unknown) = (Pages::default(), Pages::default());
    for (number, page) in (0u32..).zip(pages) {
        match page::lsn(page) {
            // Never written, zeroed, or of an index that was built without WAL: nothing says since when.
            lsn if lsn < FIRST => unknown.add(number),
            lsn if lsn >= since => changed.add(number),
            _ => (),
        }
    }
    if changed.is_empty() && crc == known.region.crc {
        return Ok(Content::Same(known.region.clone()));
    }
    let changed = changed.with(unknown);
    let patched: u32 = known.region.patches.iter().map(|patch| patch.pages.count()).sum();
    let fits = known.region.patches.len() < PATCHES_MAX && patched + changed.count() <= PATCHED_PAGES_MAX;
    if !(known.may_patch && fits && !changed.is_empty()) {
        return Ok(Content::Whole(Packed::of(plain, codec)?));
    }
    let content: Vec<u8> = changed.iter().flat_map(|number| pages[number as usize]).collect();
    Ok(Content::Patch(known.region.clone(), Packed::of(&content, codec)?, changed))
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
