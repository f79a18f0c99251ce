//! One pass over a WAL segment: is it what its name says, is every record whole, and what happened in it.
//!
//! Layouts are those of XLogPageHeaderData and XLogLongPageHeaderData (access/xlog_internal.h) and XLogRecord
//! (access/xlogrecord.h), the same in every supported major; little-endian machines only, as the format says.

use super::{SegmentName, SegmentSize};
use crate::error::{Error, Result};
use crate::model::{Lsn, SystemId, Timeline, Timestamp};

/// `XLOG_BLCKSZ`; other values are a build option nobody ships, and are refused by [`SegmentHeader::parse`].
const PAGE: usize = 8192;
const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const RECORD_HEADER: usize = 24;

const FIRST_IS_CONTRECORD: u16 = 0x1;
const HAS_LONG_HEADER: u16 = 0x2;
/// The record that ran into this page was never finished; reading goes on with the first one that starts here.
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x8;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_TBLSPC: u8 = 5;
/// `XLR_INFO_MASK`: bits of a record's info that say nothing of what it does.
const GENERAL_BITS: u8 = 0x0F;
const TBLSPC_CREATE: u8 = 0x00;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XACT_OPERATION: u8 = 0x70;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;

/// What the first page of a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    pub timeline: Timeline,
    pub start: Lsn,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
}

impl SegmentHeader {
    /// Reads the long page header that every segment starts with.
    pub fn parse(bytes: &[u8]) -> Result<SegmentHeader> {
        let bad = |why: &str| Error::damaged(format!("not a WAL segment: {why}"));
        if bytes.len() < LONG_HEADER {
            return Err(bad("shorter than a page header"));
        }
        let page = PageHeader::parse(bytes);
        if page.magic >> 8 != 0xD1 || page.info & HAS_LONG_HEADER == 0 {
            return Err(bad("it does not start with a long WAL page header"));
        }
        if u32_at(bytes, 36) as usize != PAGE {
            return Err(bad("its WAL block size is not 8192 bytes"));
        }
        let segment_size = SegmentSize::try_from(u64::from(u32_at(bytes, 32))).map_err(|e| bad(&e.to_string()))?;
        Ok(SegmentHeader {
            timeline: Timeline(page.timeline),
            start: Lsn(page.address),
            system_id: SystemId(u64_at(bytes, 24)),
            segment_size,
        })
    }
}

/// A named restore point (`pg_create_restore_point`) and the position recovery stops at for it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RestorePoint {
    pub name: String,
    pub lsn: Lsn,
    pub at: Timestamp,
}

/// What happened in a segment: enough to tell whether a recovery target lies in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SegmentFacts {
    /// End of the last record that ends in this segment; zero when none does.
    pub last_record_end: Lsn,
    /// Times of the first and last commit or abort, and the lowest and highest transaction that ended here.
    pub first_commit: Option<Timestamp>,
    pub last_commit: Option<Timestamp>,
    pub lowest_xid: Option<u32>,
    pub highest_xid: Option<u32>,
    pub restore_points: Vec<RestorePoint>,
    pub records: u64,
    /// It ends with a switch to the next segment.
    pub switched: bool,
    /// A tablespace is made in it. Of a record whose head runs over the edge it is the second segment that says so, and one in
    /// some thousands may say so wrongly: what it begins with is only as such a head goes on.
    pub makes_tablespace: bool,
}

/// Bytes kept of a record: enough for the header and the start of the data of those we look into.
const KEPT: usize = 128;

/// At most this many restore points of one segment are listed; a segment full of them must not make a huge header.
const RESTORE_POINTS_MAX: usize = 64;

/// Checks a whole segment against its name and reads its records.
///
/// Every page must carry the address its place demands, every record that lies whole in the segment its CRC. What
/// runs over the edges (the end of a record begun before, the start of one that goes on) cannot be checked here.
pub fn scan_segment(name: SegmentName, bytes: &[u8]) -> Result<(SegmentHeader, SegmentFacts)> {
    let header = SegmentHeader::parse(bytes).map_err(|e| e.context(name))?;
    let damaged = |why: String| Error::damaged(format!("{name} is not the WAL its name says: {why}"));
    if bytes.len() as u64 != header.segment_size.bytes() {
        return Err(damaged(format!("{} bytes long, its header says {}", bytes.len(), header.segment_size.bytes())));
    }
    if name.start(header.segment_size) != Some(header.start) {
        return Err(damaged(format!("its first page is that of {}", header.start)));
    }
    // A segment that a promotion began holds pages copied from the timeline before.
    if header.timeline > name.timeline {
        return Err(damaged(format!("its first page belongs to timeline {}", header.timeline)));
    }
    let mut scan = Scan {
        bytes,
        header,
        timeline: name.timeline,
        facts: SegmentFacts::default(),
        sought: None,
        found: None,
        kept: Vec::new(),
    };
    scan.run().map_err(|(offset, why)| damaged(format!("at {}: {why}", Lsn(header.start.0 + offset as u64))))?;
    Ok((header, scan.facts))
}

/// What happened in a segment whose WAL ends somewhere inside it, with zeros behind: everything up to the last whole record.
pub fn scan_part(name: SegmentName, bytes: &[u8]) -> Result<SegmentFacts> {
    let header = SegmentHeader::parse(bytes).map_err(|e| e.context(name))?;
    let mut scan = Scan::new(bytes, header, name.timeline);
    // Where it stops is the end.
    let _ = scan.run();
    Ok(scan.facts)
}

/// Where the record that starts at `lsn` ends; `None` when it goes on in the next segment.
pub fn record_end(name: SegmentName, bytes: &[u8], lsn: Lsn) -> Result<Option<Lsn>> {
    let header = SegmentHeader::parse(bytes).map_err(|e| e.context(name))?;
    let scan = Scan::new(bytes, header, name.timeline);
    let at = lsn.bytes_since(header.start) as usize;
    let total = u32_at(bytes, at) as usize;
    if total < RECORD_HEADER {
        return Err(Error::damaged(format!("{name}: no record starts at {lsn}")));
    }
    let end =
        scan.skip(at, total).map_err(|(offset, why)| Error::damaged(format!("{name} at byte {offset}: {why}")))?;
    Ok(end.map(|end| Lsn(header.start.0 + align(end) as u64)))
}

/// The end of the record that ended transaction `xid`, if it is in this segment. The bytes were checked when they were
/// stored.
pub fn find_transaction_end(name: SegmentName, bytes: &[u8], xid: u32) -> Result<Option<Lsn>> {
    let header = SegmentHeader::parse(bytes).map_err(|e| e.context(name))?;
    let mut scan = Scan::new(bytes, header, name.timeline);
    scan.sought = Some(xid);
    // Of a segment that is not whole, the end of what is there is the end.
    let _ = scan.run();
    Ok(scan.found)
}

/// By the info and the resource manager of a record (commands/tablespace.h, access/rmgrlist.h).
fn makes_tablespace(info_and_manager: &[u8]) -> bool {
    info_and_manager[1] == RM_TBLSPC && info_and_manager[0] & !GENERAL_BITS == TBLSPC_CREATE
}

/// Whether a record that came from the segment before may make a tablespace, if its head goes on here: records begin at
/// multiples of eight bytes, so 8 or 16 bytes of its head's 24 lie there. Behind info and manager are two bytes of zeros.
fn may_go_on_with_tablespace(rest: &[u8], remaining: usize) -> bool {
    [8, 16].iter().any(|before| {
        let here = rest.get(16 - before..20 - before).filter(|_| remaining > RECORD_HEADER - before);
        here.is_some_and(|head| makes_tablespace(head) && head[2..] == [0, 0])
    })
}

struct PageHeader {
    magic: u16,
    info: u16,
    timeline: u32,
    address: u64,
    remaining: u32,
}

impl PageHeader {
    fn parse(bytes: &[u8]) -> PageHeader {
        PageHeader {
            magic: u16_at(bytes, 0),
            info: u16_at(bytes, 2),
            timeline: u32_at(bytes, 4),
            address: u64_at(bytes, 8),
            remaining: u32_at(bytes, 16),
        }
    }

    fn length(&self) -> usize {
        if self.info & HAS_LONG_HEADER != 0 { LONG_HEADER } else { SHORT_HEADER }
    }
}

/// Where a broken record was found and why it is broken.
type Broken = (usize, String);

enum Step {
    Next(usize),
    /// The record goes on in the next segment, or the rest of this one is unused after a switch.
    End,
}

struct Scan<'a> {
    bytes: &'a [u8],
    header: SegmentHeader,
    timeline: Timeline,
    facts: SegmentFacts,
    /// A transaction whose end is looked for, and where it was found.
    sought: Option<u32>,
    found: Option<Lsn>,
    /// The start of the record being read.
    kept: Vec<u8>,
}

impl<'a> Scan<'a> {
    fn new(bytes: &'a [u8], header: SegmentHeader, timeline: Timeline) -> Scan<'a> {
        let facts = SegmentFacts::default();
        Scan { bytes, header, timeline, facts, sought: None, found: None, kept: Vec::new() }
    }

    fn run(&mut self) -> Result<(), Broken> {
        let first = self.page(0)?;
        if first.info & FIRST_IS_CONTRECORD != 0 {
            let rest = &self.bytes[first.length()..];
            self.facts.makes_tablespace |= may_go_on_with_tablespace(rest, first.remaining as usize);
        }
        let mut at = match first.info & FIRST_IS_CONTRECORD {
            0 => first.length(),
            _ => match self.skip(first.length(), first.remaining as usize)? {
                Some(end) => align(end),
                None => return Ok(()),
            },
        };
        loop {
            if at >= self.bytes.len() {
                return Ok(());
            }
            if at.is_multiple_of(PAGE) {
                at += self.page(at)?.length();
            }
            match self.record(at)? {
                Step::Next(next) => at = next,
                Step::End => return Ok(()),
            }
        }
    }

    fn page(&self, offset: usize) -> Result<PageHeader, Broken> {
        let page = PageHeader::parse(&self.bytes[offset..]);
        let expected = self.header.start.0 + offset as u64;
        if page.magic >> 8 != 0xD1 || page.address != expected {
            return Err((offset, "no page of this segment is there".to_owned()));
        }
        if page.timeline > self.timeline.0 || page.timeline < self.header.timeline.0 {
            return Err((offset, format!("the page belongs to timeline {}", page.timeline)));
        }
        Ok(page)
    }

    /// Passes over `count` bytes of record data that start at `at`, page headers not counted; `None` past the end.
    fn skip(&self, mut at: usize, mut count: usize) -> Result<Option<usize>, Broken> {
        while count > 0 {
            if at >= self.bytes.len() {
                return Ok(None);
            }
            if at.is_multiple_of(PAGE) {
                let page = self.page(at)?;
                at += page.length();
                if page.info & FIRST_IS_OVERWRITE_CONTRECORD != 0 {
                    return Ok(Some(at));
                }
            }
            let step = count.min(PAGE - at % PAGE);
            at += step;
            count -= step;
        }
        Ok(Some(at))
    }

    fn record(&mut self, at: usize) -> Result<Step, Broken> {
        let total = u32_at(self.bytes, at) as usize;
        if total < RECORD_HEADER {
            return Err((at, format!("a record of {total} bytes")));
        }
        let mut kept = std::mem::take(&mut self.kept);
        kept.clear();
        let mut keep = total.min(KEPT);
        let mut crc = 0;
        let mut done = 0;
        let mut from = at;
        while done < total {
            if from >= self.bytes.len() {
                // Its head says what it is, as far as that is here.
                self.facts.makes_tablespace |= kept.get(16..18).is_some_and(makes_tablespace);
                return Ok(Step::End);
            }
            if from.is_multiple_of(PAGE) {
                let page = self.page(from)?;
                if page.info & FIRST_IS_OVERWRITE_CONTRECORD != 0 {
                    return Ok(Step::Next(from + page.length()));
                }
                if page.info & FIRST_IS_CONTRECORD == 0 || page.remaining as usize != total - done {
                    return Err((from, "the page does not continue the record before it".to_owned()));
                }
                from += page.length();
            }
            let step = (total - done).min(PAGE - from % PAGE);
            let piece = &self.bytes[from..from + step];
            if kept.len() < keep {
                let take = step.min(keep - kept.len());
                kept.extend_from_slice(&piece[..take]);
                if kept.len() >= RECORD_HEADER && ends_prepared(&kept) {
                    keep = total;
                    kept.extend_from_slice(&piece[take..]);
                }
            }
            // The checksum covers the data first, then the header before the checksum field.
            let data = &piece[RECORD_HEADER.saturating_sub(done).min(step)..];
            crc = crc32c::crc32c_append(crc, data);
            from += step;
            done += step;
        }
        if crc32c::crc32c_append(crc, &kept[..20]) != u32_at(&kept, 20) {
            return Err((at, "the record's checksum does not hold".to_owned()));
        }
        let next = align(from);
        let is_switch = self.learn(&kept, from);
        self.kept = kept;
        Ok(if is_switch { Step::End } else { Step::Next(next) })
    }

    /// Notes what a record tells; true for the switch record, after which a segment is empty.
    fn learn(&mut self, head: &[u8], end: usize) -> bool {
        self.facts.records += 1;
        let end_lsn = Lsn(self.header.start.0 + align(end) as u64);
        self.facts.last_record_end = end_lsn;
        let (xid, info, manager) = (u32_at(head, 4), head[16], head[17]);
        self.facts.makes_tablespace |= makes_tablespace(&head[16..18]);
        match (manager, info) {
            (RM_XLOG, XLOG_SWITCH) => {
                self.facts.switched = true;
                return true;
            }
            (RM_XLOG, XLOG_RESTORE_POINT) => self.learn_restore_point(head, end_lsn),
            (RM_XACT, _) => self.learn_transaction(head, xid, info & XACT_OPERATION, end_lsn),
            _ => (),
        }
        false
    }

    fn learn_transaction(&mut self, head: &[u8], xid: u32, operation: u8, end: Lsn) {
        if !matches!(operation, XACT_COMMIT | XACT_ABORT | XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED) {
            return;
        }
        let Some(data) = main_data(head).filter(|data| data.len() >= 8) else { return };
        let time = Timestamp::from_postgres(u64_at(data, 0) as i64);
        let xid = prepared_xid(head[16], data, u16_at(self.bytes, 0)).unwrap_or(xid);
        let facts = &mut self.facts;
        // Commit times follow the machine's clock and may step back a little: keep the extremes.
        facts.first_commit = Some(facts.first_commit.map_or(time, |t| t.min(time)));
        facts.last_commit = Some(facts.last_commit.map_or(time, |t| t.max(time)));
        if xid != 0 && self.sought == Some(xid) {
            self.found = Some(end);
        }
        if xid != 0 {
            facts.lowest_xid = Some(facts.lowest_xid.map_or(xid, |x| x.min(xid)));
            facts.highest_xid = Some(facts.highest_xid.map_or(xid, |x| x.max(xid)));
        }
    }

    fn learn_restore_point(&mut self, head: &[u8], lsn: Lsn) {
        let Some(data) = main_data(head).filter(|data| data.len() > 8) else { return };
        let name: Vec<u8> = data[8..].iter().copied().take_while(|byte| *byte != 0).collect();
        if self.facts.restore_points.len() < RESTORE_POINTS_MAX {
            self.facts.restore_points.push(RestorePoint {
                name: String::from_utf8_lossy(&name).into_owned(),
                lsn,
                at: Timestamp::from_postgres(u64_at(data, 0) as i64),
            });
        }
    }
}

/// Whether a record ends a prepared transaction: then all of it is kept, because the transaction's number comes late.
fn ends_prepared(head: &[u8]) -> bool {
    head[17] == RM_XACT && matches!(head[16] & XACT_OPERATION, XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED)
}

/// The transaction that `COMMIT PREPARED` or `ROLLBACK PREPARED` ended: the record's own number is of the session that
/// did it (`ParseCommitRecord` in access/rmgrdesc/xactdesc.c; `xl_xact_xinfo` in access/xact.h).
fn prepared_xid(info: u8, data: &[u8], page_magic: u16) -> Option<u32> {
    const HAS_XINFO: u8 = 0x80;
    /// From this page magic on, an item of dropped statistics names a 64-bit object (XLOG_PAGE_MAGIC of 18).
    const WIDE_STATISTICS: u16 = 0xD118;
    if !matches!(info & XACT_OPERATION, XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED) || info & HAS_XINFO == 0 {
        return None;
    }
    let xinfo = u32_at(data, 8);
    let statistics = if page_magic >= WIDE_STATISTICS { 16 } else { 12 };
    // Database; then counted lists: subtransactions, files, dropped statistics, invalidation messages.
    let mut at = if xinfo & 1 == 0 { 12 } else { 20 };
    for (flag, item) in [(1 << 1, 4), (1 << 2, 12), (1 << 8, statistics), (1 << 3, 16)] {
        if xinfo & flag != 0 {
            at += 4 + item * u32_at(data, at) as usize;
        }
    }
    (xinfo & (1 << 4) != 0 && data.len() >= at + 4).then(|| u32_at(data, at))
}

/// The main data of a record without block references: after the optional origin (253) and top-level transaction (252).
fn main_data(head: &[u8]) -> Option<&[u8]> {
    let mut at = RECORD_HEADER;
    loop {
        at = match *head.get(at)? {
            255 => return head.get(at + 2..),
            254 => return head.get(at + 5..),
            253 => at + 3,
            252 => at + 5,
            _ => return None,
        };
    }
}

fn align(offset: usize) -> usize {
    offset.next_multiple_of(8)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1 << 20;
    const RM_HEAP: u8 = 10;

    /// A record of these bytes behind its head.
    fn record(manager: u8, info: u8, data: &[u8]) -> Vec<u8> {
        let mut record = [&[0; RECORD_HEADER], data].concat();
        let total = record.len() as u32;
        record[..4].copy_from_slice(&total.to_le_bytes());
        (record[16], record[17]) = (info, manager);
        let crc = crc32c::crc32c_append(crc32c::crc32c(data), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        record
    }

    /// Two segments that these records go through.
    fn segments(records: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let (mut bytes, mut at) = (vec![0; 2 * SIZE], 0);
        for record in records {
            at = align(at);
            let mut done = 0;
            while done < record.len() {
                if at.is_multiple_of(PAGE) {
                    at += head(&mut bytes, at, if done > 0 { record.len() - done } else { 0 });
                }
                let step = (record.len() - done).min(PAGE - at % PAGE);
                bytes[at..at + step].copy_from_slice(&record[done..done + step]);
                (at, done) = (at + step, done + step);
            }
        }
        bytes.chunks(SIZE).map(<[u8]>::to_vec).collect()
    }

    /// Puts the head of a page there; its length.
    fn head(bytes: &mut [u8], at: usize, remaining: usize) -> usize {
        let long = at.is_multiple_of(SIZE);
        let info = if long { HAS_LONG_HEADER } else { 0 } | if remaining > 0 { FIRST_IS_CONTRECORD } else { 0 };
        bytes[at..at + 2].copy_from_slice(&0xD110_u16.to_le_bytes());
        bytes[at + 2..at + 4].copy_from_slice(&info.to_le_bytes());
        bytes[at + 4] = 1;
        bytes[at + 8..at + 16].copy_from_slice(&(SIZE as u64 + at as u64).to_le_bytes());
        bytes[at + 16..at + 20].copy_from_slice(&(remaining as u32).to_le_bytes());
        if long {
            bytes[at + 32..at + 36].copy_from_slice(&(SIZE as u32).to_le_bytes());
            bytes[at + 36..at + 40].copy_from_slice(&(PAGE as u32).to_le_bytes());
        }
        if long { LONG_HEADER } else { SHORT_HEADER }
    }

    /// Which of two segments makes a tablespace, if a record of this manager begins so many bytes before the edge.
    fn makes(manager: u8, before_edge: usize) -> (bool, bool) {
        const NOOP: u8 = 0x20;
        let heads = LONG_HEADER + (SIZE / PAGE - 1) * SHORT_HEADER;
        let filler = record(RM_XLOG, NOOP, &vec![7; SIZE - heads - before_edge - RECORD_HEADER]);
        let behind = record(RM_XLOG, NOOP, &[7; 40]);
        let parts = segments(&[filler, record(manager, TBLSPC_CREATE, &[9; 40]), behind]);
        let size = SegmentSize::try_from(SIZE as u64).expect("a size");
        let facts = |number: u64| {
            let name = SegmentName::new(Timeline(1), number, size);
            scan_part(name, &parts[number as usize - 1]).expect("a segment").makes_tablespace
        };
        (facts(1), facts(2))
    }

    #[test]
    fn a_tablespace_is_seen_wherever_its_record_lies_and_none_where_there_is_none() {
        assert_eq!(makes(RM_TBLSPC, 8), (false, true), "its head says so in the second segment");
        assert_eq!(makes(RM_TBLSPC, 16), (false, true));
        assert_eq!(makes(RM_TBLSPC, 24), (true, false));
        assert_eq!(makes(RM_TBLSPC, 40), (true, false));
        assert_eq!(makes(RM_TBLSPC, 64), (true, false), "it ends with the first one");
        for before_edge in [8, 16, 24, 40, 64, 80] {
            assert_eq!(makes(RM_HEAP, before_edge), (false, false), "{before_edge} bytes before the edge");
        }
    }
}
