//! Compression and checksums of stored bytes.

use std::cell::RefCell;
use std::fmt;

use crate::error::{Error, Result};
use crate::model::{Malformed, hex_bytes, serde_as_text};

/// How new objects are compressed; readers need not know. Chosen by `init`, kept in the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Codec {
    /// A zstd level, 1 to 19.
    pub zstd_level: i32,
}

impl Default for Codec {
    fn default() -> Codec {
        Codec { zstd_level: 3 }
    }
}

impl Codec {
    pub fn with_level(level: i32) -> Result<Codec> {
        if !(1..=19).contains(&level) {
            return Err(Error::usage(format!("zstd level {level} is not one of 1 to 19")));
        }
        Ok(Codec { zstd_level: level })
    }

    /// One zstd frame that knows its content's size and checksum (XXH64, checked by every zstd decoder).
    pub fn compress(self, plain: &[u8]) -> Result<Vec<u8>> {
        thread_local! {
            static COMPRESSOR: RefCell<Option<Compressor>> = const { RefCell::new(None) };
        }
        let frame = COMPRESSOR.with(|slot| {
            let mut slot = slot.borrow_mut();
            let mut compressor = match slot.take().filter(|compressor| compressor.level == self.zstd_level) {
                Some(compressor) => compressor,
                None => Compressor::new(self.zstd_level)?,
            };
            let frame = compressor.compress(plain)?;
            *slot = Some(compressor);
            Ok(frame)
        });
        frame.map_err(|e: std::io::Error| Error::internal("zstd could not compress").source(e))
    }
}

/// A thread's compressor and the buffer it writes to: frames leave it at their own size, so that a large buffer is not
/// taken from and given back to the system for each.
struct Compressor {
    level: i32,
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl Compressor {
    fn new(level: i32) -> std::io::Result<Compressor> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        zstd.include_checksum(true)?;
        Ok(Compressor { level, zstd, buffer: Vec::new() })
    }

    fn compress(&mut self, plain: &[u8]) -> std::io::Result<Vec<u8>> {
        self.buffer.clear();
        self.buffer.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        self.zstd.compress_to_buffer(plain, &mut self.buffer)?;
        Ok(self.buffer.as_slice().to_vec())
    }
}

/// Decompresses one frame whose content is `size` bytes; says why when it is not.
pub fn decompress(frame: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let mut plain = Vec::new();
    decompress_to(frame, size, &mut plain)?;
    Ok(plain)
}

/// The same into a buffer that is used again.
pub fn decompress_to(frame: &[u8], size: usize, plain: &mut Vec<u8>) -> Result<(), String> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    plain.clear();
    plain.reserve(size);
    let written = DECOMPRESSOR.with(|slot| {
        let mut slot = slot.borrow_mut();
        let mut decompressor = match slot.take() {
            Some(decompressor) => decompressor,
            None => zstd::bulk::Decompressor::new()?,
        };
        let written = decompressor.decompress_to_buffer(frame, plain)?;
        *slot = Some(decompressor);
        Ok(written)
    });
    let written = written.map_err(|e: std::io::Error| format!("a frame does not decompress: {e}"))?;
    if written != size {
        return Err(format!("a frame holds {written} bytes, expected {size}"));
    }
    Ok(())
}

/// SHA-256, written as 64 hexadecimal digits: every language's standard library can check it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    pub fn of(bytes: &[u8]) -> Sha256 {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        let mut hash = [0; 32];
        hash.copy_from_slice(digest.as_ref());
        Sha256(hash)
    }
}

/// A SHA-256 of bytes that come piece by piece.
#[derive(Clone)]
pub struct Hasher(aws_lc_rs::digest::Context);

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Default for Hasher {
    fn default() -> Hasher {
        Hasher(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256))
    }
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Sha256 {
        let mut hash = [0; 32];
        hash.copy_from_slice(self.0.finish().as_ref());
        Sha256(hash)
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Sha256 {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Sha256, Malformed> {
        let hash = hex_bytes(text).map(Sha256);
        hash.ok_or_else(|| Malformed::new("SHA-256", text, "64 hexadecimal digits"))
    }
}

serde_as_text!(Sha256);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_their_size_and_refuse_damage() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let frame = Codec::default().compress(&plain).expect("compresses");
        assert_eq!(decompress(&frame, plain.len()).expect("decompresses"), plain);
        assert!(decompress(&frame, plain.len() - 1).is_err());
        let mut bad = frame.clone();
        bad[frame.len() / 2] ^= 1;
        assert!(decompress(&bad, plain.len()).is_err());
        // A decoder that has failed once must still be good for the next frame.
        assert_eq!(decompress(&frame, plain.len()).expect("decompresses"), plain);
    }

    #[test]
    fn hashes_are_those_everybody_computes() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Sha256::of(b"").to_string(), empty);
        assert_eq!(empty.parse(), Ok(Sha256::of(b"")));
        assert!("e3".parse::<Sha256>().is_err());
    }
}
