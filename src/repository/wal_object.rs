//! One archived WAL file as an object: a head and zstd frames. `zstd -d` gives back the file itself.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec::{Codec, Hasher, Sha256, decompress};
use super::{Repository, envelope, layout};
use crate::error::{Error, Kind, Result};
use crate::model::{Generation, Lsn, SystemId, Timestamp, WriteId};
use crate::storage::{Body, Created};
use crate::wal::{RestorePoint, SegmentFacts, WalFileName};

const FORMAT: &str = "perennial/wal/1";

/// Content is cut in frames of at most this many bytes, which are compressed and decompressed side by side.
pub const FRAME: usize = 4 << 20;

/// Frames an object may have: its head must list them all.
pub const FRAMES_MAX: usize = 2048;

/// Some bytes of a file, compressed.
#[derive(Debug, Clone)]
pub struct Frame {
    pub stored: Bytes,
    pub plain: u64,
}

/// Largest piece of an object fetched at once. Larger objects (segments of over 16 MB) are read piece by piece.
const PIECE: u64 = 16 << 20;

/// What an archived file's object says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalHead {
    pub format: String,
    pub write_id: WriteId,
    /// The file's name in `pg_wal`.
    pub name: String,
    pub system_id: SystemId,
    /// Bytes of the file, and their CRC-32C.
    pub size: u64,
    pub crc32c: u32,
    /// Bytes of each frame as stored, and of the file it holds.
    pub frames: Vec<(u64, u64)>,
    /// Hash of all stored frames.
    pub stored_sha256: Sha256,
    /// Wall time of the machine that pushed it.
    pub pushed_at: Timestamp,
    /// What happened in the segment (absent in other files).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_record_end: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_commit: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lowest_xid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest_xid: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restore_points: Vec<RestorePoint>,
}

/// A WAL file ready to be put.
#[derive(Debug, Clone)]
pub struct WalObject {
    pub name: WalFileName,
    pub head: WalHead,
    body: Body,
}

impl WalObject {
    /// Puts head and frames together. `frames` are the compressed cuts of the file, of at most [`FRAME`] bytes each.
    pub fn assemble(
        name: WalFileName,
        system_id: SystemId,
        plain: Plain,
        frames: Vec<Frame>,
        identity: (WriteId, Timestamp),
    ) -> Result<WalObject> {
        let mut hash = Hasher::default();
        frames.iter().for_each(|frame| hash.update(&frame.stored));
        let facts = plain.facts;
        let head = WalHead {
            format: FORMAT.to_owned(),
            write_id: identity.0,
            name: name.to_string(),
            system_id,
            size: plain.size,
            crc32c: plain.crc32c,
            frames: frames.iter().map(|frame| (frame.stored.len() as u64, frame.plain)).collect(),
            stored_sha256: hash.finish(),
            pushed_at: identity.1,
            last_record_end: facts.as_ref().map(|f| f.last_record_end),
            first_commit: facts.as_ref().and_then(|f| f.first_commit),
            last_commit: facts.as_ref().and_then(|f| f.last_commit),
            lowest_xid: facts.as_ref().and_then(|f| f.lowest_xid),
            highest_xid: facts.as_ref().and_then(|f| f.highest_xid),
            restore_points: facts.map(|f| f.restore_points).unwrap_or_default(),
        };
        let mut body = Body::from(envelope::wrap(&head)?);
        frames.into_iter().for_each(|frame| body.push(frame.stored));
        Ok(WalObject { name, head, body })
    }

    /// Compresses a small file (history, backup label) as it is.
    pub fn small(
        name: WalFileName,
        system_id: SystemId,
        content: &[u8],
        codec: Codec,
        identity: (WriteId, Timestamp),
    ) -> Result<WalObject> {
        let plain = Plain { size: content.len() as u64, crc32c: crc32c::crc32c(content), facts: None };
        let frame = Frame { stored: codec.compress(content)?.into(), plain: content.len() as u64 };
        WalObject::assemble(name, system_id, plain, vec![frame], identity)
    }

    pub fn stored_size(&self) -> u64 {
        self.body.len()
    }
}

/// What was learned of a file's content.
#[derive(Debug, Clone)]
pub struct Plain {
    pub size: u64,
    pub crc32c: u32,
    pub facts: Option<SegmentFacts>,
}

/// How a put ended. Both mean that the store has the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    Stored,
    /// The same bytes were there already: an earlier push whose success PostgreSQL did not see.
    SameAlready,
}

impl Repository {
    /// Stores a WAL file; success only once the store has it. Other content than `content` under the same name is a
    /// conflict.
    pub async fn put_wal(&self, generation: Generation, object: &WalObject, content: &[u8]) -> Result<Put> {
        let key = layout::wal_file(generation, object.name);
        if self.store.create(&key, &object.body).await? == Created::Now {
            return Ok(Put::Stored);
        }
        if self.holds(generation, object.name, content).await? {
            return Ok(Put::SameAlready);
        }
        let there = self.wal_head(generation, object.name).await?.ok_or_else(|| self.missing(&key))?;
        Err(Error::new(
            Kind::Conflict,
            format!(
                "{} holds other content than the local {}: CRC-32C {:08x} there (system identifier {}, pushed {}), {:08x} here (system identifier {})",
                self.url(&key), object.name, there.crc32c, there.system_id, there.pushed_at, object.head.crc32c, object.head.system_id
            ),
        )
        .hint("two servers write into one generation, or this disk was rolled back: stop this server, and start it with `perennial run`, which opens a generation of its own"))
    }

    /// Whether the repository holds exactly this content under the name. Reads all of it: asked only on a doubt.
    pub async fn holds(&self, generation: Generation, name: WalFileName, content: &[u8]) -> Result<bool> {
        let mut same = true;
        let compare = |offset: u64, piece: Vec<u8>| {
            same &= content.get(offset as usize..offset as usize + piece.len()) == Some(&piece[..]);
            Ok(())
        };
        let head = self.read_wal(generation, name, compare).await?;
        Ok(same && head.is_some_and(|head| head.size == content.len() as u64))
    }

    /// The head of an archived file; `None` when it is proven not to be there.
    pub async fn wal_head(&self, generation: Generation, name: WalFileName) -> Result<Option<WalHead>> {
        let key = layout::wal_file(generation, name);
        let Some(mut chunk) = self.store.read(&key, 0..4096).await? else { return Ok(None) };
        let cut = chunk.object_size > chunk.bytes.len() as u64;
        if cut && envelope::unwrap::<WalHead>(&chunk.bytes, FORMAT).is_err() {
            chunk = self.must_read(&key, 0..envelope::HEAD_MAX).await?;
        }
        let (head, _) = self.unwrap_wal(&key, name, &chunk.bytes)?;
        Ok(Some(head))
    }

    /// Whether an archived file is there with the size its head says; nothing of its content is read.
    pub async fn wal_is_whole(&self, generation: Generation, name: WalFileName) -> Result<()> {
        let key = layout::wal_file(generation, name);
        let chunk = self.must_read(&key, 0..envelope::HEAD_MAX).await?;
        let (head, length) = self.unwrap_wal(&key, name, &chunk.bytes)?;
        let stored: u64 = head.frames.iter().map(|(stored, _)| stored).sum();
        match (length as u64).saturating_add(stored) == chunk.object_size {
            true => Ok(()),
            false => {
                Err(self.corrupt(&key, format!("it is {} bytes long, its head says otherwise", chunk.object_size)))
            }
        }
    }

    fn unwrap_wal(&self, key: &str, name: WalFileName, bytes: &[u8]) -> Result<(WalHead, usize)> {
        let (head, length): (WalHead, usize) = envelope::unwrap(bytes, FORMAT).map_err(|why| self.corrupt(key, why))?;
        if head.name != name.to_string() {
            return Err(self.corrupt(key, format!("it holds {}", head.name)));
        }
        Ok((head, length))
    }

    /// Reads an archived file, handing its content to `write` in order, checked frame by frame; the hash over all of it
    /// is compared before the last frame is handed over. `None` when the file is proven not to be there.
    pub async fn read_wal(
        &self,
        generation: Generation,
        name: WalFileName,
        mut write: impl FnMut(u64, Vec<u8>) -> Result<()>,
    ) -> Result<Option<WalHead>> {
        let key = layout::wal_file(generation, name);
        let Some(first) = self.store.read(&key, 0..PIECE).await? else { return Ok(None) };
        let (head, head_length) = self.unwrap_wal(&key, name, &first.bytes)?;
        let (stored, plain) = head.frames.iter().fold((0u64, 0u64), |(stored, plain), frame| {
            (stored.saturating_add(frame.0), plain.saturating_add(frame.1))
        });
        if (head_length as u64).saturating_add(stored) != first.object_size {
            return Err(self.corrupt(&key, format!("it is {} bytes long, its head says otherwise", first.object_size)));
        }
        if plain != head.size || head.frames.iter().any(|(_, plain)| *plain > FRAME as u64) {
            return Err(self.corrupt(&key, "its frames do not add up to its size"));
        }
        let mut pieces = Pieces { repository: self, key: &key, held: first.bytes, at: 0, end: first.object_size };
        let mut hash = Hasher::default();
        let mut place = head_length as u64;
        let mut offset = 0;
        for (index, (length, size)) in head.frames.iter().copied().enumerate() {
            let frame = pieces.get(place..place + length).await?;
            hash.update(&frame);
            let last = index + 1 == head.frames.len();
            if last && hash.clone().finish() != head.stored_sha256 {
                return Err(self.corrupt(&key, "the checksum of its content does not hold"));
            }
            let plain = tokio::task::spawn_blocking(move || decompress(&frame, size as usize))
                .await
                .map_err(|e| Error::internal("decompression ended").source(e))?
                .map_err(|why| self.corrupt(&key, why))?;
            write(offset, plain)?;
            offset += size;
            place += length;
        }
        Ok(Some(head))
    }

    /// Reads a small archived file, such as a timeline history.
    pub async fn read_small_wal(&self, generation: Generation, name: WalFileName) -> Result<Option<Vec<u8>>> {
        let mut content = Vec::new();
        let collect = |_, piece: Vec<u8>| {
            content.extend_from_slice(&piece);
            Ok(())
        };
        Ok(self.read_wal(generation, name, collect).await?.map(|_| content))
    }
}

/// An object read front to back in pieces of bounded size.
struct Pieces<'a> {
    repository: &'a Repository,
    key: &'a str,
    held: Bytes,
    /// Where `held` starts in the object.
    at: u64,
    end: u64,
}

impl Pieces<'_> {
    async fn get(&mut self, range: Range<u64>) -> Result<Bytes> {
        if range.end > self.at + self.held.len() as u64 {
            let until = (range.start + PIECE).max(range.end).min(self.end);
            self.held = self.repository.must_read(self.key, range.start..until).await?.bytes;
            self.at = range.start;
        }
        let start = (range.start - self.at) as usize;
        let length = (range.end - range.start) as usize;
        if start + length > self.held.len() {
            return Err(self.repository.corrupt(self.key, "it is cut short"));
        }
        Ok(self.held.slice(start..start + length))
    }
}
