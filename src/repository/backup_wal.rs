//! The WAL without which a backup is none, as the objects that hold it.

use std::collections::BTreeSet;

use super::manifest::BackupHead;
use super::reach::View;
use super::{Repository, WalListing, WalSource, layout};
use crate::error::{Error, Result};
use crate::wal::WalFileName;

#[derive(Debug, Clone)]
pub struct BackupWal {
    /// Of its segments, the one behind them if that is whole, and the history files of its timeline.
    pub keys: BTreeSet<String>,
    /// What its generation and the ancestors have in all.
    pub listed: Vec<WalListing>,
}

impl Repository {
    /// Finds what a restore of this backup to its own end needs. Missing WAL is damage.
    pub async fn wal_of_backup(&self, head: &BackupHead) -> Result<BackupWal> {
        let lineage = self.lineage(head.generation, None).await?;
        let listed = self.list_wal(lineage.claims().iter().map(|claim| claim.generation)).await?;
        let index = self.index_of(&lineage, &listed).await?;
        let history = WalFileName::History(head.timeline);
        let view = View::new(&lineage, &index, head.timeline)
            .ok_or_else(|| self.missing(&layout::wal_file(head.generation, history)))?;
        if view.coverage_of(head).is_none() {
            return Err(Error::damaged(format!("backup {} lacks WAL that it needs", head.backup_id))
                .hint("`perennial verify` says what is missing; choose another backup (`perennial list`)"));
        }
        let mut keys = BTreeSet::new();
        for (name, place) in view.segments_of(head) {
            let key = layout::wal_file(place.generation, WalFileName::Segment(name));
            let is_needed = name.start(view.segment_size()) < Some(head.stop_lsn);
            match place.source {
                WalSource::Object { .. } => {
                    keys.insert(key);
                }
                // It waited for whole segments; the one behind them may not be whole yet, and is not needed then.
                WalSource::Log { .. } if is_needed => return Err(self.missing(&key)),
                WalSource::Log { .. } => (),
            }
        }
        let is_history = |key: &str| layout::parse_wal_file(key).is_some_and(|(_, name)| name == history);
        let entries = listed.iter().flat_map(|listing| &listing.entries);
        keys.extend(entries.filter(|entry| is_history(&entry.key)).map(|entry| entry.key.clone()));
        Ok(BackupWal { keys, listed })
    }
}
