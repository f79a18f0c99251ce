//! An object's content in encrypted chunks, so that any range of it can be read and proved alone. Pure.
//!
//! Plain content is cut in chunks of [`CHUNK`] bytes (an empty object is one empty chunk), each stored as AES-256-GCM-SIV's
//! ciphertext with its tag of 16 bytes. The key is derived from the repository's and the object's own name, the nonce is the
//! chunk's number and whether it is the last: a chunk proves right in its own place only.

use std::ops::Range;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use bytes::Bytes;

use super::keys::Key;
use crate::error::{Error, Result};
use crate::storage::Body;

/// Plain bytes of a chunk.
pub const CHUNK: u64 = 32 << 10;
const TAG: u64 = 16;
const STORED: u64 = CHUNK + TAG;

/// What every derivation is for.
const PURPOSE: &[u8] = b"perennial object 1 ";

/// How many plain bytes an object of `stored` bytes holds; `None` if no object is that long.
pub fn plain_size(stored: u64) -> Option<u64> {
    let (whole, rest) = (stored / STORED, stored % STORED);
    match rest {
        0 if whole > 0 => Some(whole * CHUNK),
        TAG if whole == 0 => Some(0),
        rest if rest > TAG => Some(whole * CHUNK + rest - TAG),
        _ => None,
    }
}

/// The stored bytes that have a range of the plain ones, and where they begin in the plain content.
pub fn stored_range(plain: &Range<u64>) -> (Range<u64>, u64) {
    let first = plain.start / CHUNK;
    let behind = plain.end.div_ceil(CHUNK).max(first + 1);
    (first.saturating_mul(STORED)..behind.saturating_mul(STORED), first * CHUNK)
}

/// Encrypts and proves the content of one object.
pub struct Sealed(LessSafeKey);

impl Sealed {
    /// `name`: the object's key in the repository.
    pub fn of(key: &Key, name: &str) -> Result<Sealed> {
        let failed = |_| Error::internal("a key could not be derived");
        let info = [PURPOSE, name.as_bytes()];
        let derived = Salt::new(HKDF_SHA256, &[]).extract(key.bytes());
        let okm = derived.expand(&info, &AES_256_GCM_SIV).map_err(failed)?;
        Ok(Sealed(LessSafeKey::new(UnboundKey::from(okm))))
    }

    /// The stored form of a whole object.
    pub fn seal(&self, body: &Body) -> Result<Body> {
        let total = body.len();
        let last = total.div_ceil(CHUNK).max(1) - 1;
        let mut sealed = Body::default();
        let mut chunk = Vec::with_capacity(STORED as usize);
        let mut number = 0;
        for part in body.pieces() {
            let mut part = &part[..];
            while !part.is_empty() {
                // A full chunk is sealed once it is known that more comes.
                if chunk.len() as u64 == CHUNK {
                    sealed.push(self.seal_chunk(
                        number,
                        false,
                        std::mem::replace(&mut chunk, Vec::with_capacity(STORED as usize)),
                    )?);
                    number += 1;
                }
                let take = part.len().min(CHUNK as usize - chunk.len());
                chunk.extend_from_slice(&part[..take]);
                part = &part[take..];
            }
        }
        sealed.push(self.seal_chunk(last, true, chunk)?);
        Ok(sealed)
    }

    fn seal_chunk(&self, number: u64, last: bool, mut chunk: Vec<u8>) -> Result<Bytes> {
        self.0
            .seal_in_place_append_tag(nonce(number, last), Aad::empty(), &mut chunk)
            .map_err(|_| Error::internal("a chunk could not be encrypted"))?;
        Ok(Bytes::from(chunk))
    }

    /// Opens stored chunks from number `first` on of an object of `size` stored bytes; `None` when one does not prove right.
    pub fn open(&self, first: u64, stored: &[u8], size: u64) -> Option<Vec<u8>> {
        let last = size.div_ceil(STORED).max(1) - 1;
        let mut plain = Vec::with_capacity(stored.len());
        for (number, chunk) in (first..).zip(stored.chunks(STORED as usize)) {
            let begin = plain.len();
            plain.extend_from_slice(chunk);
            let opened = self.0.open_in_place(nonce(number, number == last), Aad::empty(), &mut plain[begin..]).ok()?;
            let length = opened.len();
            plain.truncate(begin + length);
        }
        Some(plain)
    }
}

fn nonce(number: u64, last: bool) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_be_bytes());
    nonce[11] = u8::from(last);
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key::from_bytes([7; 32])
    }

    fn whole(body: &Body) -> Vec<u8> {
        body.head(usize::MAX)
    }

    #[test]
    fn any_range_of_any_object_reads_back() {
        let sealed = Sealed::of(&key(), "packs/1").expect("derived");
        for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5] {
            let plain: Vec<u8> = (0..size).map(|n| (n / 3) as u8).collect();
            let mut body = Body::default();
            plain.chunks(50_000).for_each(|part| body.push(Bytes::copy_from_slice(part)));
            let stored = whole(&sealed.seal(&body).expect("sealed"));
            assert_eq!(plain_size(stored.len() as u64), Some(size));
            for range in [0..size, 0..1, size / 2..size, CHUNK - 1..CHUNK + 1, CHUNK..2 * CHUNK] {
                let range = range.start.min(size)..range.end.min(size);
                let (part, at) = stored_range(&range);
                let part = part.start.min(stored.len() as u64)..part.end.min(stored.len() as u64);
                let opened = sealed
                    .open(at / CHUNK, &stored[part.start as usize..part.end as usize], stored.len() as u64)
                    .expect("proves right");
                let from = (range.start - at) as usize;
                let length = (range.end - range.start) as usize;
                assert_eq!(
                    &opened[from.min(opened.len())..][..length],
                    &plain[range.start as usize..range.end as usize]
                );
            }
        }
    }

    #[test]
    fn what_was_altered_cut_or_moved_does_not_prove_right() {
        let sealed = Sealed::of(&key(), "packs/1").expect("derived");
        let plain = vec![1; 2 * CHUNK as usize + 10];
        let stored = whole(&sealed.seal(&Body::from(plain)).expect("sealed"));
        let size = stored.len() as u64;
        assert!(sealed.open(0, &stored, size).is_some());
        let mut altered = stored.clone();
        altered[40_000] ^= 1;
        assert!(sealed.open(0, &altered, size).is_none());
        // Cut at the edge of a chunk: what is last now was not made to be the last.
        assert!(sealed.open(0, &stored[..2 * STORED as usize], 2 * STORED).is_none());
        // The second chunk in the place of the first.
        assert!(sealed.open(0, &stored[STORED as usize..2 * STORED as usize], size).is_none());
        for other in [Sealed::of(&key(), "packs/2"), Sealed::of(&Key::from_bytes([8; 32]), "packs/1")] {
            assert!(other.expect("derived").open(0, &stored, size).is_none());
        }
    }
}
