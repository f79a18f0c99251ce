//! What a prune leaves behind: tombstones of backups, its own record, and pins that keep a backup from it.
//!
//! Deleting has two phases. A backup that goes gets a tombstone and does not exist any more, but what it needs stays for
//! a grace period, so that a restore or a backup that is under way elsewhere loses nothing; then its objects go. All
//! ages are counted by the store's own clock, from one object to another.

use serde::{Deserialize, Serialize};

use super::{DOCUMENT_MAX, Repository, document, layout};
use crate::error::Result;
use crate::model::{BackupId, Generation, Lsn, Timestamp, WriteId};
use crate::storage::{Body, Entry, read_small};

/// `prunes/<…>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneRecord {
    /// Always `perennial/prune`.
    pub kind: String,
    pub format: u32,
    pub write_id: WriteId,
    /// Under which generation, and when by the machine's clock.
    pub generation: Generation,
    pub at: Timestamp,
    /// On the way to the newest state WAL before this is kept only as far as backups need it themselves.
    pub points_from: Lsn,
    /// Backups that were given a tombstone.
    pub deleted: Vec<BackupId>,
}

/// `backups/<id>/…`: `begun`, `deleted` and pins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    kind: String,
    format: u32,
    write_id: WriteId,
    at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Repository {
    fn note(&self, kind: &str, reason: Option<String>) -> Note {
        let write_id = WriteId(self.clock.random());
        Note { kind: format!("perennial/{kind}"), format: 1, write_id, at: self.clock.now(), reason }
    }

    async fn put_note(&self, key: &str, note: &Note) -> Result<()> {
        self.store.create(key, &Body::from(document::write(note)?)).await.map(drop)
    }

    /// Says that a backup has begun, before anything of it is uploaded.
    pub async fn backup_begins(&self, id: BackupId) -> Result<()> {
        self.put_note(&layout::begun(id), &self.note("begun", None)).await
    }

    /// The backup has its manifest, which speaks for its packs from now on.
    pub async fn backup_ended(&self, id: BackupId) -> Result<()> {
        self.store.delete(&layout::begun(id)).await
    }

    /// From here on the backup does not exist.
    pub async fn put_tombstone(&self, id: BackupId) -> Result<()> {
        self.put_note(&layout::tombstone(id), &self.note("tombstone", None)).await
    }

    /// The backup exists again: nothing of it has gone yet.
    pub async fn take_tombstone_back(&self, id: BackupId) -> Result<()> {
        self.store.delete(&layout::tombstone(id)).await
    }

    /// Keeps a backup whatever the rules say.
    pub async fn pin(&self, id: BackupId, reason: &str) -> Result<()> {
        let note = self.note("pin", Some(reason.to_owned()));
        self.put_note(&layout::pin(id, note.write_id), &note).await
    }

    /// Takes all pins of a backup away.
    pub async fn unpin(&self, id: BackupId) -> Result<()> {
        let of = self.backup_objects().await?.remove(&id).unwrap_or_default();
        for pin in of.pins {
            self.store.delete(&pin.key).await?;
        }
        Ok(())
    }

    /// Why a backup is pinned.
    pub async fn pin_reason(&self, pin: &Entry) -> Result<String> {
        let bytes = read_small(self.store(), &pin.key, DOCUMENT_MAX).await?;
        let note: Option<Note> = match bytes {
            Some(bytes) => Some(document::read(&bytes).map_err(|why| self.corrupt(&pin.key, why))?),
            // Taken away since it was listed; it counts once more.
            None => None,
        };
        Ok(note.and_then(|note| note.reason).unwrap_or_default())
    }

    /// Records a prune; returns what the store's clock says of the moment.
    pub async fn put_prune(&self, record: &PruneRecord) -> Result<Timestamp> {
        let key = layout::prune(record.at, record.write_id);
        self.store.create(&key, &Body::from(document::write(record)?)).await?;
        let entry = self.prunes().await?.into_iter().find(|entry| entry.key == key);
        entry.map(|entry| entry.modified).ok_or_else(|| self.missing(&key))
    }

    /// The records of prunes, oldest first.
    pub async fn prunes(&self) -> Result<Vec<Entry>> {
        Ok(self.store.list_level(layout::PRUNES).await?.entries)
    }

    /// Before which position WAL was pruned on the way to the newest state, as the last prune left it; zero for never.
    pub async fn points_from(&self) -> Result<Lsn> {
        let last: Option<PruneRecord> = self.last_record(layout::PRUNES).await?;
        Ok(last.map_or(Lsn(0), |record| record.points_from))
    }
}
