//! Log sequence numbers and timelines, written as PostgreSQL writes them.

use std::fmt;
use std::str::FromStr;

use super::{Malformed, serde_as_text};

/// A byte position in the write-ahead log (`XLogRecPtr`), shown as `A/4000028`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Bytes from `earlier` to this position; zero when it lies before.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Lsn, Malformed> {
        let malformed = || Malformed::new("log sequence number", text, "two hexadecimal numbers such as A/4000028");
        let (high, low) = text.split_once('/').ok_or_else(malformed)?;
        let half = |digits: &str| match digits.len() {
            1..=8 if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u64::from_str_radix(digits, 16).map_err(|_| malformed())
            }
            _ => Err(malformed()),
        };
        Ok(Lsn((half(high)? << 32) | half(low)?))
    }
}

/// A timeline identifier (`TimeLineID`). Shown in decimal, as PostgreSQL's messages do; keys and file names use
/// [`Timeline::hex`]. Zero is no timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timeline(pub u32);

impl Timeline {
    /// Eight upper-case hexadecimal digits, as in WAL file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }

    /// Reads the eight digits of a WAL file name.
    pub fn from_hex(digits: &str) -> Option<Timeline> {
        let upper_hex = digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        let number = u32::from_str_radix(digits, 16).ok().filter(|n| upper_hex && *n > 0)?;
        Some(Timeline(number))
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Timeline {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Timeline, Malformed> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Timeline(number)),
            _ => Err(Malformed::new("timeline", text, "a whole number from 1")),
        }
    }
}

serde_as_text!(Lsn);

impl serde::Serialize for Timeline {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Timeline {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match u32::deserialize(d)? {
            0 => Err(serde::de::Error::custom("0 is not a timeline")),
            number => Ok(Timeline(number)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_is_read_and_written_as_postgresql_does() {
        assert_eq!("A/4000028".parse(), Ok(Lsn(0xA_0400_0028)));
        assert_eq!(Lsn(0xA_0400_0028).to_string(), "A/4000028");
        assert_eq!("0/0".parse(), Ok(Lsn(0)));
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn(u64::MAX)));
        for bad in ["", "/", "1", "1/", "/1", "1/2/3", "g/1", "123456789/1", "-1/1", "+1/1", " 1/1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn timelines_are_decimal_for_people_and_hex_in_names() {
        assert_eq!(Timeline(26).to_string(), "26");
        assert_eq!(Timeline(26).hex(), "0000001A");
        assert_eq!(Timeline::from_hex("0000001A"), Some(Timeline(26)));
        for bad in ["0000001a", "1A", "00000000", "0000001G", "+000001A"] {
            assert_eq!(Timeline::from_hex(bad), None, "{bad:?}");
        }
    }
}
