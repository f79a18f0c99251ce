//! The key of an encrypted repository, and its wrapped form: an age file (armored) for any number of recipients, which
//! `age -d` opens too. The key itself never changes; who may unwrap it does.

use std::fmt;
use std::io::{Read, Write};
use std::str::FromStr;

use age::armor::{ArmoredReader, ArmoredWriter, Format};
use age::{Decryptor, Encryptor, IdentityFile, x25519};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};

use crate::error::{Error, Kind, Result};
use crate::model::{Malformed, hex_bytes, serde_as_text};

const LENGTH: usize = 32;

/// What an id is derived for.
const ID_PURPOSE: &[u8] = b"perennial key id 1";

/// The secret of a repository. It is never shown by `Debug`.
#[derive(Clone)]
pub struct Key([u8; LENGTH]);

impl Key {
    pub fn random() -> Result<Key> {
        let mut bytes = [0; LENGTH];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::internal("the system gives no random bytes"))?;
        Ok(Key(bytes))
    }

    #[cfg(test)]
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Key {
        Key(bytes)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What tells this key from others and nothing else about it.
    pub fn id(&self) -> Result<KeyId> {
        struct EightBytes;
        impl KeyType for EightBytes {
            fn len(&self) -> usize {
                8
            }
        }
        let failed = |_| Error::internal("a key's id could not be derived");
        let derived = Salt::new(HKDF_SHA256, &[]).extract(&self.0);
        let mut id = [0; 8];
        derived.expand(&[ID_PURPOSE], EightBytes).and_then(|okm| okm.fill(&mut id)).map_err(failed)?;
        Ok(KeyId(id))
    }

    /// 64 hexadecimal digits, for whoever keeps it in a safe.
    pub fn to_text(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`Key::to_text`] wrote.
    pub fn from_text(text: &str) -> Option<Key> {
        hex_bytes(text.trim()).map(Key)
    }

    /// Encrypts the key for all of `recipients`.
    pub fn wrap(&self, recipients: &[Recipient]) -> Result<Vec<u8>> {
        let failed = |why: &dyn fmt::Display| Error::internal(format!("the key could not be wrapped: {why}"));
        let all = recipients.iter().map(|recipient| &recipient.0 as &dyn age::Recipient);
        let encryptor = Encryptor::with_recipients(all).map_err(|e| failed(&e))?;
        let mut wrapped = Vec::new();
        let write = || {
            let armor = ArmoredWriter::wrap_output(&mut wrapped, Format::AsciiArmor)?;
            let mut plain = encryptor.wrap_output(armor)?;
            writeln!(plain, "{}", self.to_text())?;
            plain.finish()?.finish().map(drop)
        };
        write().map_err(|e: std::io::Error| failed(&e))?;
        Ok(wrapped)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// Tells keys apart: sixteen hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyId([u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for KeyId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<KeyId, Malformed> {
        match u64::from_str_radix(text, 16) {
            Ok(number) if text.len() == 16 && KeyId(number.to_be_bytes()).to_string() == text => {
                Ok(KeyId(number.to_be_bytes()))
            }
            _ => Err(Malformed::new("key id", text, "16 hexadecimal digits")),
        }
    }
}

serde_as_text!(KeyId);

/// Somebody who may unwrap the key: `age1…`.
#[derive(Clone)]
pub struct Recipient(x25519::Recipient);

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Recipient {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Recipient, Malformed> {
        let parsed = text.trim().parse().map(Recipient);
        parsed.map_err(|_| Malformed::new("recipient", text, "an age recipient, as age-keygen prints it (age1…)"))
    }
}

/// Who could unwrap with the identities of a file's text.
pub fn recipients_of(identities: &str) -> Vec<Recipient> {
    let secrets = identities.lines().filter_map(|line| line.trim().parse::<x25519::Identity>().ok());
    secrets.map(|identity| Recipient(identity.to_public())).collect()
}

/// Unwraps a key with one of the identities of an age identity file's text. What the identities do not open is an answer
/// of its own: `None`.
pub fn unwrap(wrapped: &[u8], identities: &str) -> Result<Option<Key>> {
    let identities = IdentityFile::from_buffer(identities.as_bytes())
        .map_err(|e| e.to_string())
        .and_then(|file| file.into_identities().map_err(|e| e.to_string()))
        .map_err(|why| {
            Error::usage(format!("the identity cannot be read: {why}"))
                .hint("an identity file is what age-keygen writes: lines of AGE-SECRET-KEY-1…")
        })?;
    let damaged = |why: &dyn fmt::Display| Error::damaged(format!("the wrapped key cannot be read: {why}"));
    let decryptor = Decryptor::new(ArmoredReader::new(wrapped)).map_err(|e| damaged(&e))?;
    let mut plain = match decryptor.decrypt(identities.iter().map(|identity| &**identity as &dyn age::Identity)) {
        Ok(plain) => plain,
        Err(age::DecryptError::NoMatchingKeys) => return Ok(None),
        Err(error) => return Err(damaged(&error)),
    };
    let mut text = String::new();
    plain.read_to_string(&mut text).map_err(|e| damaged(&e))?;
    Key::from_text(&text).map(Some).ok_or_else(|| damaged(&"it is not a key"))
}

/// Why nothing can be read without an identity.
pub fn no_identity(address: &str) -> Error {
    Error::new(Kind::Denied, format!("{address} is encrypted, and no identity is named")).hint(
        "name the file with the age identity: --identity FILE, PERENNIAL_IDENTITY_FILE, or identity_file in the configuration",
    )
}

#[cfg(test)]
mod tests {
    use age::secrecy::ExposeSecret;

    use super::*;

    fn identity() -> (String, Recipient) {
        let identity = x25519::Identity::generate();
        (identity.to_string().expose_secret().to_owned(), Recipient(identity.to_public()))
    }

    #[test]
    fn every_recipient_unwraps_the_key_and_nobody_else() {
        let (first, second, stranger) = (identity(), identity(), identity());
        let key = Key::random().expect("random");
        let wrapped = key.wrap(&[first.1, second.1]).expect("wrapped");
        for secret in [&first.0, &second.0] {
            let unwrapped = unwrap(&wrapped, secret).expect("read").expect("opened");
            assert_eq!(unwrapped.bytes(), key.bytes());
            assert_eq!(unwrapped.id().expect("derived"), key.id().expect("derived"));
        }
        assert!(unwrap(&wrapped, &stranger.0).expect("read").is_none());
        assert_eq!(unwrap(&wrapped, "nonsense").expect_err("no identity").kind(), Kind::Usage);
        assert_eq!(unwrap(&wrapped[..wrapped.len() / 2], &first.0).expect_err("cut").kind(), Kind::Damaged);
    }
}
