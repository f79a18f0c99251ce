//! Identifiers: of clusters, repositories, generations, backups, packs and single writes.

use std::fmt;
use std::str::FromStr;

use super::{Lsn, Malformed, serde_as_text};

/// PostgreSQL's database system identifier, made by `initdb`, kept by every copy of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SystemId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<SystemId, Malformed> {
        text.parse().map(SystemId).map_err(|_| Malformed::new("system identifier", text, "a decimal number"))
    }
}

/// The number of one start of a writer. Numbers grow by one; eight decimal digits in keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    pub const FIRST: Generation = Generation(1);

    pub fn next(self) -> Generation {
        Generation(self.0.saturating_add(1))
    }

    /// Eight decimal digits, as in keys.
    pub fn padded(self) -> String {
        format!("{:08}", self.0)
    }

    /// Reads the eight digits of a key.
    pub fn from_padded(digits: &str) -> Option<Generation> {
        let all_digits = digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse().ok().filter(|n| all_digits && *n > 0).map(Generation)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Generation {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Generation, Malformed> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Generation(number)),
            _ => Err(Malformed::new("generation", text, "a whole number from 1")),
        }
    }
}

/// Bytes that are written as so many hexadecimal digits, two for each, upper-case or lower-case.
pub fn hex_bytes<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != BYTES || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; BYTES];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Random identifiers of a fixed number of bytes, written in lower-case hexadecimal.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $what:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $bytes]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl FromStr for $name {
            type Err = Malformed;

            fn from_str(text: &str) -> Result<$name, Malformed> {
                let one_spelling = !text.bytes().any(|byte| byte.is_ascii_uppercase());
                let id = hex_bytes(text).filter(|_| one_spelling);
                id.map($name).ok_or_else(|| Malformed::new($what, text, $expected))
            }
        }

        serde_as_text!($name);
    };
}

random_id!(
    /// Names a repository for ever, whatever bucket it is moved to.
    RepositoryId, 16, "repository id", "32 hexadecimal digits"
);
random_id!(
    /// Random, inside the first bytes of every object: tells whose write won when the outcome of a PUT is unknown.
    WriteId, 16, "write id", "32 hexadecimal digits"
);
random_id!(
    /// Names one pack of a base backup.
    PackId, 16, "pack id", "32 hexadecimal digits"
);

/// Names a base backup: generation, start LSN and four random digits, as in `00000003-0000000A04000028-91fe`.
/// So that names sort by position, never by a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    pub generation: Generation,
    pub start: Lsn,
    pub nonce: u16,
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016X}-{:04x}", self.generation.padded(), self.start.0, self.nonce)
    }
}

impl FromStr for BackupId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<BackupId, Malformed> {
        let parse = || {
            let mut parts = text.split('-');
            let (generation, start, nonce) = (parts.next()?, parts.next()?, parts.next()?);
            if parts.next().is_some() || start.len() != 16 || nonce.len() != 4 {
                return None;
            }
            let id = BackupId {
                generation: Generation::from_padded(generation)?,
                start: Lsn(u64::from_str_radix(start, 16).ok()?),
                nonce: u16::from_str_radix(nonce, 16).ok()?,
            };
            // Only the one spelling that Display gives: two names must never mean one backup.
            (id.to_string() == text).then_some(id)
        };
        parse().ok_or_else(|| Malformed::new("backup id", text, "a name that `perennial list` shows"))
    }
}

serde_as_text!(SystemId, BackupId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_bytes_in_either_case_and_nothing_else_is() {
        assert_eq!(hex_bytes(&"0fA0".repeat(16)), <[u8; 32]>::try_from([0x0F, 0xA0].repeat(16)).ok());
        for bad in ["UNSIGNED-PAYLOAD", "0f", "0fa", "0fa00", "0fg0", "+fa0", ""] {
            assert_eq!(hex_bytes::<2>(bad), None, "{bad}");
        }
        assert!("AA".repeat(16).parse::<PackId>().is_err(), "identifiers have one spelling");
    }

    #[test]
    fn backup_ids_sort_by_position_and_have_one_spelling() {
        let id = BackupId { generation: Generation(3), start: Lsn(0xA_0400_0028), nonce: 0x91fe };
        assert_eq!(id.to_string(), "00000003-0000000A04000028-91fe");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "",
            "3-1-1",
            "00000003-0000000a04000028-91fe",
            "00000003-0000000A04000028-91FE",
            "00000000-0000000A04000028-91fe",
        ] {
            assert!(bad.parse::<BackupId>().is_err(), "{bad:?}");
        }
        let later = BackupId { start: Lsn(0xB_0000_0000), ..id };
        assert!(later > id && later.to_string() > id.to_string());
    }

    #[test]
    fn random_ids_survive_text() {
        let id = WriteId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("XY".parse::<WriteId>().is_err());
        assert!("é".repeat(16).parse::<WriteId>().is_err());
    }
}
