//! One entry of a log: a head that says what it is, and for WAL a zstd frame with the bytes.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Position;
use crate::error::Result;
use crate::model::{Generation, Lsn, Timeline, Timestamp, WriteId};
use crate::repository::codec::{Sha256, decompress};
use crate::repository::{Repository, envelope, layout};
use crate::storage::Body;

pub(super) const FORMAT: &str = "perennial/log/1";

/// What an entry says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryHead {
    pub format: String,
    pub write_id: WriteId,
    /// Whose log it is in, and where.
    pub generation: Generation,
    pub number: u64,
    /// By the writer's clock; for people.
    pub at: Timestamp,
    /// SHA-256 of the whole entry before it; absent in the first one and in seals put by another writer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Sha256>,
    #[serde(flatten)]
    pub content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Content {
    /// The first entry: the writer has sealed what came before, and its WAL begins here, at the start of a segment.
    Open {
        timeline: Timeline,
        lsn: Lsn,
        /// An idle writer says that it lives this often; 0 for never.
        heartbeat_seconds: u64,
    },
    /// WAL from `start` to `end`, which continues the entry before it.
    Wal { timeline: Timeline, start: Lsn, end: Lsn, crc32c: u32 },
    /// The writer lives and has nothing to say.
    Heartbeat { timeline: Timeline, lsn: Lsn },
    /// The log ends here. Put by its own writer at a clean stop (`released`), or by the one that takes over.
    Seal { by: Generation, released: bool },
}

impl Content {
    /// Where WAL ends with this entry. A seal has no WAL of its own.
    pub fn end(&self) -> Option<Position> {
        match *self {
            Content::Open { timeline, lsn, .. } | Content::Heartbeat { timeline, lsn } => {
                Some(Position { timeline, lsn })
            }
            Content::Wal { timeline, end, .. } => Some(Position { timeline, lsn: end }),
            Content::Seal { .. } => None,
        }
    }
}

impl EntryHead {
    pub fn is_seal(&self) -> bool {
        matches!(self.content, Content::Seal { .. })
    }
}

/// The object of an entry and what the next one says of it.
pub(super) fn encode(head: &EntryHead, frame: Option<Bytes>) -> Result<(Body, Sha256)> {
    let mut whole = envelope::wrap(head)?;
    if let Some(frame) = frame {
        whole.extend_from_slice(&frame);
    }
    let hash = Sha256::of(&whole);
    Ok((Body::from(whole), hash))
}

/// An entry read whole.
#[derive(Debug)]
pub(super) struct Entry {
    pub head: EntryHead,
    pub plain: Vec<u8>,
    pub sha256: Sha256,
}

/// Checks a whole object that was read from the place of entry `number`.
pub(super) fn decode(repository: &Repository, generation: Generation, number: u64, bytes: &Bytes) -> Result<Entry> {
    let key = layout::log_entry(generation, number);
    let (head, length) = decode_head(repository, generation, number, bytes)?;
    let plain = match head.content {
        Content::Wal { start, end, crc32c, .. } => {
            let size = end.bytes_since(start) as usize;
            if size > super::ENTRY_MAX {
                return Err(repository.corrupt(&key, format!("it claims {size} bytes of WAL")));
            }
            let plain = decompress(&bytes[length..], size).map_err(|why| repository.corrupt(&key, why))?;
            if crc32c::crc32c(&plain) != crc32c {
                return Err(repository.corrupt(&key, "the checksum of its WAL does not hold"));
            }
            plain
        }
        _ => Vec::new(),
    };
    Ok(Entry { head, plain, sha256: Sha256::of(bytes) })
}

pub(super) fn decode_head(
    repository: &Repository,
    generation: Generation,
    number: u64,
    bytes: &[u8],
) -> Result<(EntryHead, usize)> {
    let key = layout::log_entry(generation, number);
    let (head, length): (EntryHead, usize) =
        envelope::unwrap(bytes, FORMAT).map_err(|why| repository.corrupt(&key, why))?;
    if head.generation != generation || head.number != number {
        return Err(repository.corrupt(&key, format!("it is entry {} of generation {}", head.number, head.generation)));
    }
    Ok((head, length))
}
