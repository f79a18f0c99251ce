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
use crate::repository::patch::{self, Masks, PIECE};
use crate::repository::piece_sums::RegionSums;
use crate::repository::sums::{Hash, Sums};
use crate::repository::{Codec, Pages, Patch, Region};

/// A page that fails its checksum is read again this many times: the server may be writing it right now.
const REREADS: u32 = 5;

/// A region is stored anew once its patches would be more than this many, or take more than this share of the room that the
/// region itself takes: half of it. So a restore reads about half more than after a full backup at most, whatever came before.
/// A smaller share would be read faster and stored dearer: 1 + 1/share times what changed.
const PATCHES_MAX: usize = 32;
const SHARE: u64 = 2;

/// No record lies before the first segment, however small that is: lower positions on pages are special (`GistBuildLSN`).
const FIRST: Lsn = Lsn(1 << 20);

/// Bytes that are read, and then summed up while a processor still has them at hand: of a whole region it has not.
const STEP: usize = 128 << 10;

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
    pub hash: Hash,
    pub known: Option<Known>,
}

/// The region as the last backup has it, and what may be concluded from that.
#[derive(Debug, Clone)]
pub struct Known {
    pub region: Region,
    /// Its pages tell when they were changed last; that backup began here.
    pub pages_since: Option<Lsn>,
    /// The hash of each piece that it has there.
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

    /// The sums of the pieces there, if these are really the ones.
    fn sums(&self) -> Option<Sums> {
        self.sums.as_ref()?.of(self.region.crc, self.region.plain)
    }
}

/// A region ready to be packed.
#[derive(Debug)]
pub struct Read {
    pub content: Content,
    pub plain: u32,
    pub crc: u32,
    /// Those of each piece and page, as far as they are known.
    pub sums: Option<Sums>,
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
    /// A patch ([`patch::encode`]) over what the last backup has.
    Patch(Region, Vec<u8>),
}

#[derive(Debug)]
pub struct Packed {
    pub frame: Bytes,
    pub sha256: Sha256,
}

impl Packed {
    pub fn of(plain: &[u8], codec: Codec) -> Result<Packed> {
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
            sums: known.sums(),
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
        if buffer.len() < job.length {
            buffer.resize(job.length, 0);
        }
        let buffer = &mut buffer[..job.length];
        let (filled, summed) = fill(job, buffer)?;
        let known = job.known.as_ref();
        let mut seen = Seen::of(buffer, summed, known);
        let mut damaged = Vec::new();
        if let Some(first_block) = job.first_block {
            let checked = check_pages(job, first_block, seen.unproven(known), &mut buffer[..filled])?;
            damaged = checked.damaged;
            if checked.read_again {
                let mut summing = Summing::begin(job, buffer.len());
                summing.add(buffer);
                seen = Seen::of(buffer, summing.end(), known);
            }
        }
        pack(buffer, job.codec, known, damaged, seen)
    })
}

/// Reads the region; how much of it the file has, and the sums of all of it.
fn fill(job: &Job, buffer: &mut [u8]) -> Result<(usize, Summed)> {
    let (mut filled, mut summing) = (0, Summing::begin(job, buffer.len()));
    for (step, offset) in buffer.chunks_mut(STEP).zip((job.offset..).step_by(STEP)) {
        let read = job.file.read_at(step, offset)?;
        step[read..].fill(0);
        filled += read;
        summing.add(step);
    }
    Ok((filled, summing.end()))
}

/// Packs bytes that are in memory.
pub fn pack_alone(plain: &[u8], codec: Codec) -> Result<Read> {
    let summed = Summed { crc: crc32c::crc32c(plain), now: None, before: None };
    pack(plain, codec, None, Vec::new(), Seen::of(plain, summed, None))
}

/// CRC and sums of a region, and the sums that it had in the last backup, as far as it has any.
struct Summed {
    crc: u32,
    now: Option<Sums>,
    before: Option<Sums>,
}

/// Sums a region up while it is read.
struct Summing<'a> {
    /// Of what is not made of pages there are no hashes.
    hash: Option<&'a Hash>,
    crc: u32,
    now: Sums,
    before: Option<Sums>,
}

impl<'a> Summing<'a> {
    fn begin(job: &'a Job, length: usize) -> Summing<'a> {
        let hash = Some(&job.hash).filter(|_| job.in_pages && Hash::takes(length));
        let before = hash.and(job.known.as_ref()).and_then(Known::sums);
        Summing { hash, crc: 0, now: Sums::default(), before }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self.hash {
            Some(hash) => hash.add(bytes, self.before.as_ref(), &mut self.now),
            None => self.crc = crc32c::crc32c_append(self.crc, bytes),
        }
    }

    fn end(self) -> Summed {
        let crc = if self.hash.is_some() { self.now.crc() } else { self.crc };
        Summed { crc, now: self.hash.map(|_| self.now), before: self.before }
    }
}

/// Packs a region, or finds that the last backup has it.
fn pack(plain: &[u8], codec: Codec, known: Option<&Known>, damaged: Vec<u32>, seen: Seen) -> Result<Read> {
    // What is damaged is stored as it is: neither the last backup nor the page's own word tells what it was. And the next
    // backup is to look at it again.
    let known = known.filter(|_| damaged.is_empty());
    let (mut crc, mut sums) = (seen.crc, seen.sums.filter(|_| damaged.is_empty()));
    let behind_wal = match known.zip(seen.said).filter(|(known, _)| known.exact && !seen.silent) {
        Some((known, said)) => said.unsaid(seen.differ.as_ref(), plain.len(), known),
        None => Pages::default(),
    };
    let content = match known.filter(|known| !known.compared_only && known.has_length(plain.len())) {
        Some(known) if seen.silent || crc == known.region.crc && seen.differ == Some(Masks::NONE) => {
            Content::Same(known.region.clone())
        }
        Some(known) => compare(plain, codec, known, seen.differ)?,
        None => Content::Whole(Packed::of(plain, codec)?),
    };
    // What is stored whole relies on nothing that was known before: its CRC is that of its bytes.
    if matches!(content, Content::Whole(_)) && seen.borrowed {
        crc = crc32c::crc32c(plain);
        sums = sums.filter(|sums| sums.crc() == crc);
    }
    Ok(Read { content, plain: plain.len() as u32, crc, sums, damaged, unread: false, behind_wal })
}

/// What a region looks like beside what the last backup has.
struct Seen {
    crc: u32,
    said: Option<Said>,
    /// Its pages say that none was changed, and its CRC is as it was.
    silent: bool,
    sums: Option<Sums>,
    /// The CRC is made of those that pages had in the last backup.
    borrowed: bool,
    /// The pieces that are others, as far as both have them.
    differ: Option<Masks>,
}

impl Seen {
    fn of(plain: &[u8], summed: Summed, known: Option<&Known>) -> Seen {
        let Summed { crc, now: sums, before } = summed;
        let said = known.and_then(|known| Said::of(plain, known));
        let silent = known.zip(said).is_some_and(|(known, said)| {
            known.has_length(plain.len()) && crc == known.region.crc && said.changed.is_empty()
        });
        let borrowed = before.is_some();
        let differ = sums.as_ref().zip(before).map(|(now, before)| now.differing(&before));
        Seen { crc, said, silent, sums, borrowed, differ }
    }

    /// Pages that may be damaged. Others are to the byte what they were at the last backup, which looked at them: at those too
    /// that had not been changed after it began.
    fn unproven(&self, known: Option<&Known>) -> Pages {
        let all = Pages::first(u128::BITS);
        match (known.filter(|known| known.exact && !known.compared_only), self.differ, self.said) {
            (Some(known), Some(differ), Some(said)) => {
                let new = all.without(Pages::first(known.region.plain / PAGE as u32));
                differ.pages().with(said.changed).with(new)
            }
            _ => all,
        }
    }
}

/// What pages say of their changes.
#[derive(Debug, Clone, Copy)]
struct Said {
    /// Since the last backup.
    changed: Pages,
    /// They say nothing.
    silent: Pages,
}

impl Said {
    /// `None` when the file's pages do not say it.
    fn of(plain: &[u8], known: &Known) -> Option<Said> {
        let since = known.pages_since?;
        let (mut changed, mut silent) = (Pages::default(), Pages::default());
        for (number, page) in (0u32..).zip(plain.as_chunks::<PAGE>().0) {
            match page::lsn(page) {
                // Never written, zeroed, or of an index that was built without WAL: nothing says since when.
                lsn if lsn < FIRST => silent.add(number),
                lsn if lsn >= since => changed.add(number),
                // An index keeps there what it may lose: SP-GiST writes its meta page without WAL (SpGistUpdateMetaPage, spgutils.c).
                _ if number == 0 && known.begins_relation && page::has_special_area(page) => silent.add(number),
                _ => (),
            }
        }
        Some(Said { changed, silent })
    }

    /// Pages that should have said so of a region that has changed, and did not.
    fn unsaid(self, differ: Option<&Masks>, length: usize, known: &Known) -> Pages {
        match differ {
            Some(differ) => differ.pages().without(self.changed).without(self.silent),
            // Without the sums of the last backup it may be any page, if it is not one of those that say so.
            None if known.has_length(length) && self.changed.with(self.silent).is_empty() => {
                Pages::first((length / PAGE) as u32)
            }
            None => Pages::default(),
        }
    }
}

/// What is stored of a region that may have changed.
fn compare(plain: &[u8], codec: Codec, known: &Known, differ: Option<Masks>) -> Result<Content> {
    let region = &known.region;
    if let Some(masks) = differ.filter(|_| region.patches.len() < PATCHES_MAX) {
        let (pieces, whole) = ((masks.count() * PIECE) as u64, u64::from(region.frame.stored));
        // What it takes is known only once it lies with others in a frame.
        let about = pieces * whole / (plain.len() as u64).max(1);
        let before: u64 = region.patches.iter().map(Patch::stored).sum();
        if pieces > 0 && pieces * SHARE <= plain.len() as u64 && (before + about) * SHARE <= whole {
            return Ok(Content::Patch(region.clone(), patch::encode(plain, &masks)));
        }
    }
    let packed = Packed::of(plain, codec)?;
    // Where pages say nothing, only the same bytes are the same.
    let same = known.pages_since.is_none() && region.patches.is_empty() && packed.sha256 == region.frame.sha256;
    Ok(if same { Content::Same(region.clone()) } else { Content::Whole(packed) })
}

#[derive(Default)]
struct Checked {
    damaged: Vec<u32>,
    /// Some pages are others now than they were before.
    read_again: bool,
}

fn check_pages(job: &Job, first_block: u32, which: Pages, bytes: &mut [u8]) -> Result<Checked> {
    let mut checked = Checked::default();
    let (pages, _) = bytes.as_chunks_mut::<PAGE>();
    for (index, page) in (0u32..).zip(pages).filter(|(index, _)| which.has(*index)) {
        let block = first_block + index;
        if !is_sound(page, block, job.start) {
            checked.read_again = true;
            if !reread(job, page, block, job.offset + u64::from(index) * PAGE as u64)? {
                checked.damaged.push(block);
            }
        }
    }
    Ok(checked)
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
