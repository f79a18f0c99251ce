//! One region of one file: read, look at its pages, compare with what the last backup has, compress what is new. Runs on
//! a blocking thread.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;

use super::page_sums::RegionSums;
use crate::disk::UncachedFile;
use crate::error::Result;
use crate::model::Lsn;
use crate::postgres::page::{self, PAGE};
use crate::repository::codec::Sha256;
use crate::repository::{Codec, Pages, Region, page_crc};

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
    /// It is of a file made of pages that tell their position.
    pub in_pages: bool,
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
    /// The CRC of each page that it has there.
    pub sums: Option<RegionSums>,
    /// The file is the same one as then, and a page changes with its position only: one with an older position is as it was.
    /// Otherwise a path may have been used again, by a file whose pages are older than the last backup.
    pub exact: bool,
    /// WAL says that nothing has written to it since.
    pub untouched: bool,
    /// The relation begins with it.
    pub begins_relation: bool,
    /// It is only looked at whether the content should have changed: it is stored anew, because the backup is a full one, or
    /// leaves the packs behind that have it.
    pub compared_only: bool,
}

impl Known {
    /// The region, if it need not be read.
    pub fn unread(&self, length: usize) -> Option<&Region> {
        // What WAL says is of the same file; and what is beyond the length it had then is not in that backup.
        let same = self.untouched && self.exact && !self.compared_only && self.has_length(length);
        same.then_some(&self.region)
    }

    fn has_length(&self, length: usize) -> bool {
        self.region.plain as usize == length
    }

    /// The CRCs of the pages there, if these are really the ones.
    fn page_sums(&self) -> Option<Vec<u32>> {
        let sums = self.sums.as_ref()?.read()?;
        let whole = self.region.plain as usize == sums.len() * PAGE;
        (whole && page_crc::of_all(&sums) == self.region.crc).then_some(sums)
    }
}

/// A region ready to be packed.
#[derive(Debug)]
pub struct Read {
    pub content: Content,
    pub plain: u32,
    pub crc: u32,
    /// The CRC of each page, as far as it is known.
    pub sums: Option<Vec<u32>>,
    /// Blocks whose checksum does not hold.
    pub damaged: Vec<u32>,
    /// It was not read: WAL says that it is as the last backup has it.
    pub unread: bool,
    /// Pages that are not what they were in the last backup and do not say that they were changed since: a write that the disk
    /// has lost, or one that went past PostgreSQL. Checksums do not show it: an old page is a sound one.
    pub behind_wal: Pages,
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
    if let Some((known, region)) = job.known.as_ref().and_then(|known| Some((known, known.unread(job.length)?))) {
        return Ok(Read {
            content: Content::Same(region.clone()),
            plain: region.plain,
            crc: region.crc,
            // Whoever uses them looks whether they are the ones.
            sums: known.sums.as_ref().and_then(RegionSums::read),
            damaged: Vec::new(),
            unread: true,
            behind_wal: Pages::default(),
        });
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
        pack(&buffer, job.codec, job.known.as_ref(), damaged, job.in_pages)
    })
}

/// Packs bytes that are in memory, or finds that the last backup has them.
pub fn pack(plain: &[u8], codec: Codec, known: Option<&Known>, damaged: Vec<u32>, in_pages: bool) -> Result<Read> {
    let sums = in_pages.then(|| page_crc::of_pages(plain)).flatten();
    let crc = sums.as_ref().map_or_else(|| crc32c::crc32c(plain), |sums| page_crc::of_all(sums));
    // What is damaged is stored as it is: neither the last backup nor the page's own word tells what it was.
    let known = known.filter(|_| damaged.is_empty());
    let changes = known.zip(sums.as_deref()).and_then(|(known, sums)| Changes::of(plain, crc, sums, known));
    let behind_wal = changes.as_ref().map_or(Pages::default(), |changes| changes.unsaid);
    let content = match known.filter(|known| !known.compared_only && known.has_length(plain.len())) {
        Some(known) => compare(plain, codec, known, changes)?,
        None => Content::Whole(Packed::of(plain, codec)?),
    };
    Ok(Read { content, plain: plain.len() as u32, crc, sums, damaged, unread: false, behind_wal })
}

/// How a region differs from what the last backup has, as far as that reaches.
struct Changes {
    /// Its bytes are the same.
    none: bool,
    /// All pages that are other ones, if that is known.
    pages: Option<Pages>,
    /// Those of them that should have said so and did not.
    unsaid: Pages,
}

impl Changes {
    /// `None` when the pages say nothing of their changes.
    fn of(plain: &[u8], crc: u32, sums: &[u32], known: &Known) -> Option<Changes> {
        let since = known.pages_since?;
        let (mut said, mut silent) = (Pages::default(), Pages::default());
        for (number, page) in (0u32..).zip(plain.as_chunks::<PAGE>().0) {
            match page::lsn(page) {
                // Never written, zeroed, or of an index that was built without WAL: nothing says since when.
                lsn if lsn < FIRST => silent.add(number),
                lsn if lsn >= since => said.add(number),
                // An index keeps there what it may lose: SP-GiST writes its meta page without WAL (SpGistUpdateMetaPage, spgutils.c).
                _ if number == 0 && known.begins_relation && page::has_special_area(page) => silent.add(number),
                _ => (),
            }
        }
        let same_length = known.has_length(plain.len());
        if same_length && said.is_empty() && crc == known.region.crc {
            return Some(Changes { none: true, pages: None, unsaid: Pages::default() });
        }
        let differ = known.page_sums().map(|before| differing(sums, &before));
        // Without the sums of the last backup it may be any page, if it is not one of those that say so.
        let unclear = same_length && said.with(silent).is_empty();
        let any = if unclear { Pages::first(sums.len() as u32) } else { Pages::default() };
        let unsaid = differ.map_or(any, |differ| differ.without(said).without(silent));
        Some(Changes {
            none: false,
            // Of pages that differ a CRC overlooks one in four billion; not those that say it themselves.
            pages: differ.map(|differ| differ.with(said)),
            unsaid: if known.exact { unsaid } else { Pages::default() },
        })
    }
}

/// Pages that are others than they were, of those that both have.
fn differing(sums: &[u32], before: &[u32]) -> Pages {
    let mut pages = Pages::default();
    let pairs = (0u32..).zip(sums.iter().zip(before));
    pairs.filter(|(_, (now, then))| now != then).for_each(|(number, _)| pages.add(number));
    pages
}

fn compare(plain: &[u8], codec: Codec, known: &Known, changes: Option<Changes>) -> Result<Content> {
    let region = &known.region;
    let Some(changes) = changes else {
        // Only the same bytes are the same.
        let packed = Packed::of(plain, codec)?;
        let same = region.patches.is_empty() && packed.sha256 == region.frame.sha256;
        return Ok(if same { Content::Same(region.clone()) } else { Content::Whole(packed) });
    };
    if changes.none {
        return Ok(Content::Same(region.clone()));
    }
    let patched: u32 = region.patches.iter().map(|patch| patch.pages.count()).sum();
    let fits = |pages: &Pages| {
        region.patches.len() < PATCHES_MAX && !pages.is_empty() && patched + pages.count() <= PATCHED_PAGES_MAX
    };
    let Some(pages) = changes.pages.filter(fits) else { return Ok(Content::Whole(Packed::of(plain, codec)?)) };
    let (all, _) = plain.as_chunks::<PAGE>();
    let content: Vec<u8> = pages.iter().flat_map(|number| all[number as usize]).collect();
    Ok(Content::Patch(region.clone(), Packed::of(&content, codec)?, pages))
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
