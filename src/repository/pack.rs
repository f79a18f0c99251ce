//! Packs: immutable objects of 16 MB and more that hold the compressed regions of data files.
//!
//! Head, frames, then an index of the frames in a skippable frame of its own, so that a pack can be read without any
//! manifest and `zstd -t` accepts it. Restores find frames through the manifest and check each by its SHA-256.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};

use super::codec::Sha256;
use super::{Repository, envelope, layout};
use crate::error::Result;
use crate::model::{BackupId, PackId, WriteId};
use crate::storage::Body;

const FORMAT: &str = "perennial/pack/1";
/// Magic number of the index's frame.
const INDEX_MAGIC: u32 = 0x184D_2A51;
/// The last bytes of a pack, after the length of the index's frame.
const INDEX_END: &[u8; 4] = b"PIDX";

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

/// Where a frame lies and what it must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRef {
    /// Index into the manifest's list of packs.
    pub pack: u32,
    pub offset: u64,
    pub stored: u32,
    pub sha256: Sha256,
}

/// Collects frames until a pack is full.
#[derive(Debug)]
pub struct PackBuilder {
    pub id: PackId,
    body: Body,
    length: u64,
    index: Vec<(u64, u32, Sha256)>,
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

    /// The packs there are.
    pub async fn pack_ids(&self) -> Result<BTreeSet<PackId>> {
        let listing = self.store.list(layout::PACKS, None);
        listing.try_filter_map(|entry| std::future::ready(Ok(layout::parse_pack(&entry.key)))).try_collect().await
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

        let (trailer, end) = bytes[bytes.len() - 8..].split_at(4);
        assert_eq!(end, INDEX_END);
        let length = u32::from_le_bytes(trailer.try_into().expect("four bytes")) as usize;
        let frame = &bytes[bytes.len() - length..];
        assert_eq!(frame[..4], INDEX_MAGIC.to_le_bytes());
        let index: Vec<(u64, u32, Sha256)> = serde_json::from_slice(&frame[8..length - 12]).expect("an index");
        assert_eq!(index.iter().map(|(offset, _, _)| *offset).collect::<Vec<_>>(), offsets);
    }
}
