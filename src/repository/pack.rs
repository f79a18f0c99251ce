//! Packs: immutable objects of 16 MB and more that hold the compressed regions of data files.
//!
//! Head, frames, then an index of the frames in a skippable frame of its own, so that a pack can be read without any
//! manifest and `zstd -t` accepts it. Restores find frames through the manifest and check each by its SHA-256.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::codec::Sha256;
use super::{Repository, envelope, layout};
use crate::error::Result;
use crate::model::{BackupId, PackId, WriteId};
use crate::storage::{Body, Entry};

const FORMAT: &str = "perennial/pack/1";
/// Magic number of the index's frame.
const INDEX_MAGIC: u32 = 0x184D_2A51;
/// The last bytes of a pack, after the length of the index's frame.
const INDEX_END: &[u8; 4] = b"PIDX";

/// An index is read with the last bytes of its pack: this many hold those of nearly all. A longer one costs a second request,
/// and of one that is longer than the other bound (over ten thousand frames) nobody reads.
const INDEX_USUAL: u64 = 64 << 10;
pub const INDEX_MAX: u64 = 1 << 20;

/// A pack is closed once its frames have reached this many bytes. Part of the memory budget: one pack is being filled
/// while up to [`crate::backup::UPLOADS`] are on their way.
pub const PACK_TARGET: u64 = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackHead {
    pub format: String,
    pub write_id: WriteId,
    pub pack_id: PackId,
    pub backup_id: BackupId,
}

/// No frame takes more bytes, whatever a manifest says: a region, or patches, and what an encoder adds to what it cannot compress.
const FRAME_MAX: u32 = 4 << 20;

/// Where a frame lies and what it must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRef {
    /// Index into the manifest's list of packs.
    pub pack: u32,
    pub offset: u64,
    pub stored: u32,
    pub sha256: Sha256,
}

impl FrameRef {
    /// Where in the pack it ends.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.stored)
    }

    /// Whether there can be such a frame.
    pub fn is_sound(&self) -> bool {
        self.stored <= FRAME_MAX && self.offset.checked_add(u64::from(self.stored)).is_some()
    }
}

/// One frame in the index of a pack: where it begins, its length, its hash.
pub type Indexed = (u64, u32, Sha256);

/// Collects frames until a pack is full.
#[derive(Debug)]
pub struct PackBuilder {
    pub id: PackId,
    body: Body,
    length: u64,
    index: Vec<Indexed>,
}

impl PackBuilder {
    pub fn new(id: PackId, write_id: WriteId, backup_id: BackupId) -> Result<PackBuilder> {
        let head = PackHead { format: FORMAT.to_owned(), write_id, pack_id: id, backup_id };
        let body = Body::from(envelope::wrap(&head)?);
        Ok(PackBuilder { id, length: body.len(), body, index: Vec::new() })
    }

    /// Adds a frame; returns its offset in the pack.
    pub fn add(&mut self, frame: Bytes, sha256: Sha256) -> u64 {
        let offset = self.length;
        self.length += frame.len() as u64;
        self.index.push((offset, frame.len() as u32, sha256));
        self.body.push(frame);
        offset
    }

    pub fn is_full(&self) -> bool {
        self.length >= PACK_TARGET
    }

    /// Closes the pack with its index.
    pub fn finish(mut self) -> Result<(PackId, Body)> {
        let json = serde_json::to_vec(&self.index)
            .map_err(|e| crate::error::Error::internal("a pack index as JSON").source(e))?;
        let frame_length = (json.len() + 4 + 8 + 8) as u32;
        let mut payload = json;
        payload.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        payload.extend_from_slice(&frame_length.to_le_bytes());
        payload.extend_from_slice(INDEX_END);
        self.body.push(Bytes::from(envelope::skippable(INDEX_MAGIC, &payload)?));
        Ok((self.id, self.body))
    }
}

impl Repository {
    pub async fn put_pack(&self, id: PackId, body: &Body) -> Result<()> {
        self.put_new(&layout::pack(id), body).await
    }

    /// The packs there are, as the store lists them.
    pub fn packs(&self) -> BoxStream<'static, Result<(PackId, Entry)>> {
        let named = |entry: Entry| layout::parse_pack(&entry.key).map(|id| (id, entry));
        self.store.list(layout::PACKS, None).try_filter_map(move |entry| std::future::ready(Ok(named(entry)))).boxed()
    }

    /// Their ids alone.
    pub async fn pack_ids(&self) -> Result<BTreeSet<PackId>> {
        self.packs().map_ok(|(id, _)| id).try_collect().await
    }

    /// The frames of a pack that was listed with this size, as its own index names them; `None` when it is gone. A pack is put
    /// in one piece, so one whose index holds is whole.
    pub async fn pack_index(&self, id: PackId, size: u64) -> Result<Option<Vec<Indexed>>> {
        let key = layout::pack(id);
        if size == 0 {
            return Err(self.corrupt(&key, "it is empty"));
        }
        let mut wanted = INDEX_USUAL;
        loop {
            let Some(chunk) = self.store.read(&key, size.saturating_sub(wanted)..size).await? else { return Ok(None) };
            if chunk.object_size != size {
                return Err(self.corrupt(&key, format!("it is {} bytes long, listed as {size}", chunk.object_size)));
            }
            let length = index_length(&chunk.bytes).map_err(|why| self.corrupt(&key, why))?;
            if length <= chunk.bytes.len() as u64 {
                return index(&chunk.bytes, length, size).map(Some).map_err(|why| self.corrupt(&key, why));
            }
            if length > INDEX_MAX.min(size) || wanted >= length {
                return Err(self.corrupt(&key, format!("its index is {length} bytes long")));
            }
            wanted = length;
        }
    }

    /// A range of a pack that a manifest names.
    pub async fn read_pack(&self, id: PackId, range: std::ops::Range<u64>) -> Result<Bytes> {
        let key = layout::pack(id);
        let chunk = self.must_read(&key, range.clone()).await?;
        if chunk.bytes.len() as u64 != range.end - range.start {
            return Err(self.corrupt(&key, format!("it is cut short: {} bytes long", chunk.object_size)));
        }
        Ok(chunk.bytes)
    }
}

/// The length of the index's frame, from the end of a pack.
fn index_length(end: &[u8]) -> Result<u64, String> {
    let before = end.strip_suffix(INDEX_END).and_then(|before| before.last_chunk());
    before
        .map(|length| u64::from(u32::from_le_bytes(*length)))
        .ok_or_else(|| "it does not end with an index".to_owned())
}

/// The index at the end of a pack; says why when it does not describe it.
fn index(end: &[u8], length: u64, size: u64) -> Result<Vec<Indexed>, String> {
    let frame = &end[end.len() - length as usize..];
    let parts = frame.split_first_chunk::<8>().zip(frame.len().checked_sub(12).and_then(|at| frame.get(8..at)));
    let Some(((head, rest), json)) = parts else { return Err("its index is too short".to_owned()) };
    let declared = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]])) + 8;
    if head[..4] != INDEX_MAGIC.to_le_bytes() || declared != length {
        return Err("its index is not where its end says".to_owned());
    }
    if rest[json.len()..json.len() + 4] != crc32c::crc32c(json).to_le_bytes() {
        return Err("the checksum of its index does not hold".to_owned());
    }
    let index: Vec<Indexed> = serde_json::from_slice(json).map_err(|e| format!("its index is not readable: {e}"))?;
    let mut next = index.first().map_or(size - length, |(offset, ..)| *offset);
    for (offset, stored, _) in &index {
        if *offset != next {
            return Err("its index leaves a gap".to_owned());
        }
        next = offset.saturating_add(u64::from(*stored));
    }
    if next != size - length {
        return Err("its index does not describe all of it".to_owned());
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Generation, Lsn};
    use crate::repository::Codec;

    #[test]
    fn a_pack_is_a_zstd_file_that_describes_itself() {
        let backup_id = BackupId { generation: Generation(1), start: Lsn(40), nonce: 1 };
        let mut pack = PackBuilder::new(PackId([7; 16]), WriteId([8; 16]), backup_id).expect("a head");
        let mut offsets = Vec::new();
        for text in ["one", "two", "three"] {
            let frame = Codec::default().compress(text.as_bytes()).expect("compresses");
            offsets.push(pack.add(Bytes::from(frame.clone()), Sha256::of(&frame)));
        }
        let (_, body) = pack.finish().expect("finished");
        let bytes = body.head(usize::MAX);
        assert_eq!(zstd::stream::decode_all(&bytes[..]).expect("decodes"), b"onetwothree");

        let size = bytes.len() as u64;
        let length = index_length(&bytes).expect("an index");
        let read = |bytes: &[u8]| index(bytes, length, size);
        let offsets_read: Vec<u64> = read(&bytes).expect("an index").iter().map(|(offset, _, _)| *offset).collect();
        assert_eq!(offsets_read, offsets);
        // A flipped bit anywhere in it, or one byte less before it.
        let begin = bytes.len() - length as usize;
        for at in begin..bytes.len() - 8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(read(&bad).is_err(), "byte {at}");
        }
        assert!(index(&bytes[begin..], length, size).is_ok());
        assert!(index(&bytes, length, size - 1).is_err());
        assert!(index_length(&bytes[..bytes.len() - 1]).is_err());
        assert!(index_length(b"PIDX").is_err());
    }
}
