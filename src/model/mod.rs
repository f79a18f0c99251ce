//! The nouns every module speaks: positions in WAL, timelines, generations, identifiers, times and sizes.
//!
//! Nothing here does I/O or imports anything else of ours. A value of these types is valid by construction:
//! text from outside becomes one of them through `FromStr`, which says what is wrong with it.

mod beside;
mod ids;
mod lsn;
mod size;
mod timestamp;

pub use beside::{Beside, DirectoryName};
pub use ids::{BackupId, Generation, PackId, RepositoryId, SystemId, WriteId, hex_bytes};
pub use lsn::{Lsn, Timeline};
pub use size::{ByteSize, Share, human_bytes, parse_duration};
pub use timestamp::{Period, Timestamp};

/// Text that is not what it claims to be; says what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    what: &'static str,
    text: String,
    expected: &'static str,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, text: &str, expected: &'static str) -> Malformed {
        Malformed { what, text: text.chars().take(200).collect(), expected }
    }
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "'{}' is not a {}: expected {}", self.text, self.what, self.expected)
    }
}

impl std::error::Error for Malformed {}

/// Serialises a type as the text of its `Display` and reads it back through `FromStr`.
macro_rules! serde_as_text {
    ($($type:ty),+) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}
pub(crate) use serde_as_text;
