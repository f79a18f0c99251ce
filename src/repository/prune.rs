//! What a prune leaves behind: tombstones of backups, its own record, and pins that keep a backup from it.
//!
//! Deleting has two phases. A backup that goes gets a tombstone and does not exist any more, but what it needs stays for
//! a grace period, so that a restore or a backup that is under way elsewhere loses nothing; then its objects go. All
//! ages are counted by the store's own clock, from one object to another.
//!
//! A prune and a backup may each begin while the other is at work. Each first says what it may touch, then looks for the
//! other: a prune's record says how young a pack it deletes, a backup's announcement how old a pack it names. So at least one
//! of the two sees the other, whatever happens in between (docs/decisions/0024-what-a-dead-backup-left.md).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DOCUMENT_MAX, Repository, document, layout};
use crate::error::Result;
use crate::model::{BackupId, Generation, Lsn, Timestamp, WriteId};
use crate::storage::{Body, Entry, delete_if_allowed, read_small};

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
    /// Packs that no manifest names are not deleted if they are younger than this, counted back from the record.
    #[serde(default)]
    pub grace_ms: u64,
}

impl PruneRecord {
    /// Packs that were put up to this moment may be what it is deleting, by the store's clock; `entry` is the record as listed.
    pub fn reach(&self, entry: &Entry) -> Timestamp {
        entry.modified.earlier_by(Duration::from_millis(self.grace_ms))
    }
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    packs_since: Option<Timestamp>,
}

impl Repository {
    fn note(&self, kind: &str) -> Note {
        let (write_id, at) = (WriteId(self.clock.random()), self.clock.now());
        Note { kind: format!("perennial/{kind}"), format: 1, write_id, at, reason: None, packs_since: None }
    }

    async fn put_note(&self, key: &str, note: &Note) -> Result<()> {
        self.store.create(key, &Body::from(document::write(note)?)).await.map(drop)
    }

    /// Says that a backup has begun, before anything of it is uploaded, and that it may name packs which others have put since
    /// a moment of the store's clock, though no manifest does.
    pub async fn backup_begins(&self, id: BackupId, packs_since: Option<Timestamp>) -> Result<()> {
        self.put_note(&layout::begun(id), &Note { packs_since, ..self.note("begun") }).await
    }

    /// Since when the packs were put that a backup under way may name, its own and those of others, by the store's clock;
    /// `None` when it has ended since it was listed.
    pub async fn packs_since(&self, begun: &Entry) -> Result<Option<Timestamp>> {
        let Some(bytes) = read_small(self.store(), &begun.key, DOCUMENT_MAX).await? else { return Ok(None) };
        let note: Note = document::read(&bytes).map_err(|why| self.corrupt(&begun.key, why))?;
        Ok(Some(note.packs_since.map_or(begun.modified, |since| since.min(begun.modified))))
    }

    /// The backup has its manifest, which speaks for its packs from now on.
    pub async fn backup_ended(&self, id: BackupId) -> Result<()> {
        self.store.delete(&layout::begun(id)).await
    }

    /// From here on the backup does not exist.
    pub async fn put_tombstone(&self, id: BackupId) -> Result<()> {
        self.put_note(&layout::tombstone(id), &self.note("tombstone")).await
    }

    pub async fn has_tombstone(&self, id: BackupId) -> Result<bool> {
        Ok(read_small(self.store(), &layout::tombstone(id), DOCUMENT_MAX).await?.is_some())
    }

    /// The backup exists again: nothing of it has gone yet. Where the store lets nothing be deleted it stays as it is.
    pub async fn take_tombstone_back(&self, id: BackupId) -> Result<()> {
        delete_if_allowed(self.store(), &layout::tombstone(id)).await
    }

    /// Keeps a backup whatever the rules say.
    pub async fn pin(&self, id: BackupId, reason: &str) -> Result<()> {
        let note = Note { reason: Some(reason.to_owned()), ..self.note("pin") };
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

    /// Records a prune, before it looks for what can go; as listed, with the store's word of the moment. `None` when another
    /// prune, that reaches as far, has ended just now and taken it away.
    pub async fn put_prune(&self, record: &PruneRecord) -> Result<Option<Entry>> {
        let key = layout::prune(record.at, record.write_id);
        self.store.create(&key, &Body::from(document::write(record)?)).await?;
        Ok(self.prunes().await?.into_iter().find(|entry| entry.key == key))
    }

    /// Packs that were put up to this moment of the store's clock may be what a prune on record is deleting, if no manifest
    /// names them; `None` when the record has gone since it was listed.
    pub async fn prune_reach(&self, record: &Entry) -> Result<Option<Timestamp>> {
        Ok(self.prune_record(&record.key).await?.map(|read| read.reach(record)))
    }

    /// The records of prunes, oldest first.
    pub async fn prunes(&self) -> Result<Vec<Entry>> {
        Ok(self.store.list_level(layout::PRUNES).await?.entries)
    }

    /// The highest position of which a prune on record has said that all WAL from there on stays: any of them may still be deleting.
    pub async fn latest_points_from(&self) -> Result<Lsn> {
        let mut latest = Lsn(0);
        for entry in self.prunes().await? {
            latest = latest.max(self.points_from_of(&entry.key).await?);
        }
        Ok(latest)
    }

    /// What a record says of it; zero of one that has gone, because another says as much.
    pub async fn points_from_of(&self, record: &str) -> Result<Lsn> {
        Ok(self.prune_record(record).await?.map_or(Lsn(0), |read| read.points_from))
    }

    /// A record by its key; `None` when it has gone since it was listed.
    pub async fn prune_record(&self, key: &str) -> Result<Option<PruneRecord>> {
        let Some(bytes) = read_small(self.store(), key, DOCUMENT_MAX).await? else { return Ok(None) };
        document::read(&bytes).map(Some).map_err(|why| self.corrupt(key, why))
    }

    /// Before which position WAL was pruned on the way to the newest state, as the last prune left it; zero for never.
    pub async fn points_from(&self) -> Result<Lsn> {
        let last: Option<PruneRecord> = self.last_record(layout::PRUNES).await?;
        Ok(last.map_or(Lsn(0), |record| record.points_from))
    }
}
