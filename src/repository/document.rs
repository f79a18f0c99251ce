//! Small JSON documents that carry their own checksum, so that a flipped digit is damage and never another truth.
//!
//! The last field is `"check"`, the CRC-32C of every byte before the comma in front of it, eight hexadecimal digits.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

const BEFORE_CHECK: &str = ",\n  \"check\": \"";
const AFTER_CHECK: &str = "\"\n}\n";

pub fn write(document: &impl Serialize) -> Result<Vec<u8>> {
    let json = serde_json::to_string_pretty(document).map_err(|e| Error::internal("a document as JSON").source(e))?;
    let body = json.strip_suffix("\n}").ok_or_else(|| Error::internal("a document that is no JSON object"))?;
    let check = crc32c::crc32c(body.as_bytes());
    Ok(format!("{body}{BEFORE_CHECK}{check:08x}{AFTER_CHECK}").into_bytes())
}

/// Reads a document; says why when it is not whole.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
    let (body, check) = text
        .strip_suffix(AFTER_CHECK)
        .and_then(|text| text.rsplit_once(BEFORE_CHECK))
        .ok_or("it does not end with its checksum")?;
    if check != format!("{:08x}", crc32c::crc32c(body.as_bytes())) {
        return Err("its checksum does not hold".to_owned());
    }
    serde_json::from_str(text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Document {
        kind: String,
        parent: u32,
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let document = Document { kind: "test".to_owned(), parent: 7 };
        let bytes = write(&document).expect("written");
        assert_eq!(read::<Document>(&bytes), Ok(document));
        assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_ok(), "still ordinary JSON");
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(read::<Document>(&bad).is_err(), "byte {at} bit {bit}");
            }
            assert!(read::<Document>(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
