//! `perennial.json`: says that this is a repository, of which format, and who it is.

use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::document;
use super::vault::Encryption;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::model::{RepositoryId, Timestamp};

/// The format this program writes, and the one of encrypted repositories. Readers refuse a higher `min_reader` than their
/// own.
const FORMAT: u32 = 1;
const ENCRYPTED: u32 = 2;

/// Written once by `init`, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Always `perennial/repository`.
    pub kind: String,
    pub format: u32,
    pub min_reader: u32,
    pub repository_id: RepositoryId,
    pub created_at: Timestamp,
    pub created_by: String,
    pub codec: Codec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
}

impl Descriptor {
    pub(super) fn new(codec: Codec, encryption: Option<Encryption>, clock: &Clock) -> Descriptor {
        let format = if encryption.is_some() { ENCRYPTED } else { FORMAT };
        Descriptor {
            kind: "perennial/repository".to_owned(),
            format,
            min_reader: format,
            repository_id: RepositoryId(clock.random()),
            created_at: clock.now(),
            created_by: concat!("perennial ", env!("CARGO_PKG_VERSION")).to_owned(),
            codec,
            encryption,
        }
    }

    pub(super) fn parse(bytes: &[u8], url: &str) -> Result<Descriptor> {
        let damaged = |why: String| {
            Error::damaged(format!("{url} is not the descriptor of a repository: {why}"))
                .hint("bring the object back from a copy or an older version of the bucket")
        };
        let versions: Versions = document::read(bytes).map_err(damaged)?;
        if versions.kind != "perennial/repository" {
            return Err(damaged(format!("its kind is '{}'", versions.kind)));
        }
        if versions.min_reader > ENCRYPTED {
            return Err(Error::refused(format!(
                "{url} needs a reader of format {}, this program reads up to {ENCRYPTED}",
                versions.min_reader
            ))
            .hint("use a newer version of perennial"));
        }
        document::read(bytes).map_err(damaged)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        document::write(self)
    }
}

/// The part that must be readable in every version.
#[derive(Deserialize)]
struct Versions {
    kind: String,
    min_reader: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_repository_of_the_future_is_refused_not_misread() {
        let future = serde_json::json!({"kind": "perennial/repository", "min_reader": 3, "something": "new"});
        let future = document::write(&future).expect("written");
        assert_eq!(Descriptor::parse(&future, "u").expect_err("too new").kind(), Kind::Refused);
        for damaged in [
            &b""[..],
            b"{}",
            b"{\"kind\":\"other\",\"min_reader\":1}",
            b"{\"kind\":\"perennial/repository\",\"min_reader\":1}",
        ] {
            assert_eq!(Descriptor::parse(damaged, "u").expect_err("damaged").kind(), Kind::Damaged);
        }
        let descriptor = Descriptor::new(Codec::default(), None, &Clock::system());
        assert_eq!(Descriptor::parse(&descriptor.to_bytes().expect("json"), "u").expect("reads back"), descriptor);
    }
}
