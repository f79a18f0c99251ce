//! The head that every zstd object of a repository starts with: JSON and its CRC-32C in a skippable zstd frame.
//!
//! `zstd -d` passes over such a frame (RFC 8878, section 3.1.2), so the object still opens with the ordinary tool, and
//! its first bytes carry the random write id that tells whose write it was.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Magic number of the head's frame; any of 0x184D2A50 to 0x184D2A5F is skippable.
const HEAD_MAGIC: u32 = 0x184D_2A50;

/// A head never grows beyond this; readers fetch this much to have it for sure.
pub const HEAD_MAX: u64 = 64 << 10;

/// The head's frame.
pub fn wrap(head: &impl Serialize) -> Result<Vec<u8>> {
    let mut json =
        serde_json::to_vec(head).map_err(|e| Error::internal("a head cannot be written as JSON").source(e))?;
    json.extend_from_slice(&crc32c::crc32c(&json).to_le_bytes());
    if json.len() as u64 + 8 > HEAD_MAX {
        return Err(Error::refused(format!(
            "a head of {} bytes, no reader takes more than {HEAD_MAX}",
            json.len() + 8
        )));
    }
    skippable(HEAD_MAGIC, &json)
}

/// A skippable frame around `payload`.
pub fn skippable(magic: u32, payload: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(payload.len()).map_err(|_| Error::internal("a frame of over 4 GB"))?;
    let mut frame = Vec::with_capacity(payload.len() + 8);
    frame.extend_from_slice(&magic.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Reads the head at the start of an object: the head and the length of its frame. Says why when it cannot.
pub fn unwrap<T: DeserializeOwned>(bytes: &[u8], format: &str) -> Result<(T, usize), String> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let (Some(magic), Some(length)) = (word(0), word(4)) else { return Err("it is shorter than a head".to_owned()) };
    if magic != HEAD_MAGIC || u64::from(length) + 8 > HEAD_MAX {
        return Err("it does not start with a head".to_owned());
    }
    let end = 8 + length as usize;
    let payload = bytes.get(8..end).ok_or("its head is cut short")?;
    let (json, check) = payload.split_last_chunk::<4>().ok_or("its head is too short")?;
    if crc32c::crc32c(json) != u32::from_le_bytes(*check) {
        return Err("the checksum of its head does not hold".to_owned());
    }
    #[derive(serde::Deserialize)]
    struct Format<'a> {
        #[serde(borrow)]
        format: std::borrow::Cow<'a, str>,
    }
    let named: Format = serde_json::from_slice(json).map_err(|e| format!("its head is not readable: {e}"))?;
    if named.format != format {
        return Err(format!("its head says '{}', expected '{format}'", named.format.escape_debug()));
    }
    let head = serde_json::from_slice(json).map_err(|e| format!("its head is not readable: {e}"))?;
    Ok((head, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Head {
        format: String,
        number: u32,
    }

    #[test]
    fn a_head_reads_back_and_zstd_passes_over_it() {
        let head = Head { format: "test/1".to_owned(), number: 7 };
        let mut object = wrap(&head).expect("wrapped");
        let length = object.len();
        object.extend(zstd::bulk::compress(b"payload", 3).expect("compressed"));
        assert_eq!(unwrap::<Head>(&object, "test/1"), Ok((head, length)));
        assert_eq!(zstd::stream::decode_all(&object[..]).expect("decodes"), b"payload");
    }

    #[test]
    fn a_cut_or_foreign_head_says_so() {
        let object = wrap(&Head { format: "test/1".to_owned(), number: 7 }).expect("wrapped");
        for cut in 0..object.len() {
            assert!(unwrap::<Head>(&object[..cut], "test/1").is_err(), "cut at {cut}");
        }
        assert!(unwrap::<Head>(&object, "test/2").expect_err("other format").contains("test/1"));
        assert!(unwrap::<Head>(b"not an object at all", "test/1").is_err());
    }
}
