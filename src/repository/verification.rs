//! Records of verifications by schedule: which part of the repository was read, and what was found. The next one reads the
//! part after it.

use serde::{Deserialize, Serialize};

use super::{Repository, layout};
use crate::error::Result;
use crate::model::{Timestamp, WriteId};

/// `verifications/<…>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Always `perennial/verification`.
    pub kind: String,
    pub format: u32,
    pub write_id: WriteId,
    /// When it began, by the machine's clock.
    pub at: Timestamp,
    /// Which of how many parts was read, counted from 0.
    pub part: u32,
    pub parts: u32,
    /// What was looked at in all, and bytes read to check their content.
    pub backups: u64,
    pub packs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// What was wrong, a hundred at most; empty: nothing.
    pub findings: Vec<String>,
}

impl Verification {
    pub fn begun(repository: &Repository, at: Timestamp) -> Verification {
        Verification {
            kind: "perennial/verification".to_owned(),
            format: 1,
            write_id: WriteId(repository.clock().random()),
            at,
            part: 0,
            parts: 1,
            backups: 0,
            packs: 0,
            segments: 0,
            bytes: 0,
            seconds: 0.0,
            findings: Vec::new(),
        }
    }
}

impl Repository {
    pub async fn put_verification(&self, record: &Verification) -> Result<()> {
        let key = layout::verification(record.at, record.write_id);
        self.put_record(layout::VERIFICATIONS, &key, record).await
    }

    /// The record of the last one.
    pub async fn last_verification(&self) -> Result<Option<Verification>> {
        self.last_record(layout::VERIFICATIONS).await
    }
}
