//! Names of files in `pg_wal`, and how segments map to positions.

use std::fmt;
use std::str::FromStr;

use crate::model::{Lsn, Malformed, Timeline};

/// The size of a WAL segment: a power of two from 1 MB to 1 GB, chosen by `initdb --wal-segsize` and read from the
/// WAL itself, never assumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u64);

impl SegmentSize {
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Segments in one `xlogid`, the middle eight digits of a name (`XLogSegmentsPerXLogId`).
    fn per_log(self) -> u64 {
        (1 << 32) / self.0
    }

    /// The number of the segment that holds the byte at `lsn`.
    pub fn number_at(self, lsn: Lsn) -> u64 {
        lsn.0 / self.0
    }

    /// The number of the segment that holds the byte before `lsn`: the last one needed to reach it.
    pub fn number_before(self, lsn: Lsn) -> u64 {
        lsn.0.saturating_sub(1) / self.0
    }

    pub fn start_of(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(self.0))
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = Malformed;

    fn try_from(bytes: u64) -> Result<SegmentSize, Malformed> {
        if bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes) {
            Ok(SegmentSize(bytes))
        } else {
            Err(Malformed::new("WAL segment size", &bytes.to_string(), "a power of two from 1 MB to 1 GB"))
        }
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> u64 {
        size.0
    }
}

/// The 24 digits of a segment: timeline, xlogid, number within the xlogid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub timeline: Timeline,
    pub log: u32,
    pub part: u32,
}

impl SegmentName {
    pub fn new(timeline: Timeline, number: u64, size: SegmentSize) -> SegmentName {
        let log = u32::try_from(number / size.per_log()).unwrap_or(u32::MAX);
        SegmentName { timeline, log, part: (number % size.per_log()) as u32 }
    }

    /// The segment's number across all xlogids; `None` when no segment of this size has the name.
    pub fn number(self, size: SegmentSize) -> Option<u64> {
        let part = u64::from(self.part);
        (part < size.per_log()).then(|| u64::from(self.log) * size.per_log() + part)
    }

    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        self.number(size).map(|number| size.start_of(number))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.log, self.part)
    }
}

impl FromStr for SegmentName {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<SegmentName, Malformed> {
        parse_segment(text).ok_or_else(|| Malformed::new("WAL segment name", text, "24 hexadecimal digits"))
    }
}

/// A file that PostgreSQL archives or asks for in recovery (manual section 26.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalFileName {
    Segment(SegmentName),
    /// The last, incomplete segment of a timeline that was left by a promotion.
    Partial(SegmentName),
    /// Written at the end of a base backup: start segment and offset of its start within it.
    Backup(SegmentName, u32),
    History(Timeline),
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalFileName::Segment(name) => name.fmt(f),
            WalFileName::Partial(name) => write!(f, "{name}.partial"),
            WalFileName::Backup(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
            WalFileName::History(timeline) => write!(f, "{}.history", timeline.hex()),
        }
    }
}

impl FromStr for WalFileName {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<WalFileName, Malformed> {
        let parse = || match text.split_once('.') {
            None => parse_segment(text).map(WalFileName::Segment),
            Some((stem, "partial")) => parse_segment(stem).map(WalFileName::Partial),
            Some((stem, "history")) => Timeline::from_hex(stem).map(WalFileName::History),
            Some((stem, rest)) => {
                let offset = hex8(rest.strip_suffix(".backup")?)?;
                Some(WalFileName::Backup(parse_segment(stem)?, offset))
            }
        };
        parse().ok_or_else(|| {
            Malformed::new(
                "WAL file name",
                text,
                "a segment such as 000000010000000A000000FE, a .history, .backup or .partial",
            )
        })
    }
}

fn hex8(digits: &str) -> Option<u32> {
    let upper_hex = digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    u32::from_str_radix(digits, 16).ok().filter(|_| upper_hex)
}

fn parse_segment(text: &str) -> Option<SegmentName> {
    if text.len() != 24 || !text.is_ascii() {
        return None;
    }
    Some(SegmentName { timeline: Timeline::from_hex(&text[..8])?, log: hex8(&text[8..16])?, part: hex8(&text[16..])? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(megabytes: u64) -> SegmentSize {
        SegmentSize::try_from(megabytes << 20).expect("a power of two")
    }

    #[test]
    fn names_map_to_positions_for_every_segment_size() {
        for megabytes in [1, 16, 64, 1024] {
            let size = size(megabytes);
            for number in [0, 1, 4095, 4096, 1_000_000] {
                let name = SegmentName::new(Timeline(3), number, size);
                assert_eq!(name.number(size), Some(number));
                assert_eq!(name.to_string().parse(), Ok(name));
                assert_eq!(size.number_at(size.start_of(number)), number);
            }
        }
        assert_eq!(SegmentName::new(Timeline(1), 255, size(16)).to_string(), "0000000100000000000000FF");
        assert_eq!(SegmentName::new(Timeline(1), 256, size(16)).to_string(), "000000010000000100000000");
        let impossible: SegmentName = "000000010000000000000100".parse().expect("24 digits");
        assert_eq!(impossible.number(size(16)), None);
    }

    #[test]
    fn the_last_segment_before_a_boundary_is_not_the_next_one() {
        let size = size(16);
        assert_eq!(size.number_before(Lsn(32 << 20)), 1);
        assert_eq!(size.number_at(Lsn(32 << 20)), 2);
    }

    #[test]
    fn every_kind_of_archived_file_has_one_spelling() {
        for text in [
            "000000010000000A000000FE",
            "000000010000000A000000FE.partial",
            "000000010000000A000000FE.00000028.backup",
            "0000000B.history",
        ] {
            assert_eq!(text.parse::<WalFileName>().expect(text).to_string(), text);
        }
        for bad in [
            "",
            "RECOVERYXLOG",
            "000000010000000a000000fe",
            "000000000000000A000000FE",
            "0000000B.histor",
            "000000010000000A000000FE.28.backup",
            "../../etc/passwd",
            "0000000é0000000A000000FE",
        ] {
            assert!(bad.parse::<WalFileName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_postgresqls_segment_sizes_are_sizes() {
        for bad in [0, 1, 12 << 20, 2 << 30, 512 << 10] {
            assert!(SegmentSize::try_from(bad).is_err(), "{bad}");
        }
    }
}
