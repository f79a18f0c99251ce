//! Records of drills: what was restored, how long it took, what was looked at, and what was wrong.

use serde::{Deserialize, Serialize};

use super::{Repository, layout};
use crate::error::Result;
use crate::model::{BackupId, Timestamp, WriteId};

/// `drills/<…>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// Always `perennial/drill`.
    pub kind: String,
    pub format: u32,
    pub write_id: WriteId,
    /// When it began, by the machine's clock.
    pub at: Timestamp,
    pub backup: Option<BackupId>,
    pub target: String,
    /// Bytes of the restored files.
    pub bytes: u64,
    /// Until the files were there; until the server had recovered; and all of it, checks included.
    pub restore_seconds: f64,
    pub recovery_seconds: f64,
    pub seconds: f64,
    /// What was looked at and found right, and what could not be looked at.
    pub checked: Vec<String>,
    pub left_out: Vec<String>,
    /// What was wrong; empty: the drill went well.
    pub failures: Vec<String>,
    pub cure: Option<String>,
}

impl DrillRecord {
    pub fn begun(repository: &Repository, at: Timestamp) -> DrillRecord {
        DrillRecord {
            kind: "perennial/drill".to_owned(),
            format: 1,
            write_id: WriteId(repository.clock().random()),
            at,
            backup: None,
            target: String::new(),
            bytes: 0,
            restore_seconds: 0.0,
            recovery_seconds: 0.0,
            seconds: 0.0,
            checked: Vec::new(),
            left_out: Vec::new(),
            failures: Vec::new(),
            cure: None,
        }
    }
}

impl Repository {
    /// Records a drill.
    pub async fn put_drill(&self, record: &DrillRecord) -> Result<()> {
        self.put_record(layout::DRILLS, &layout::drill(record.at, record.write_id), record).await
    }

    /// The record of the last drill.
    pub async fn last_drill(&self) -> Result<Option<DrillRecord>> {
        self.last_record(layout::DRILLS).await
    }
}
