//! A backup's manifest: the commit marker, and the full description of one base backup.
//!
//! A head (who, where in WAL, how much), then the list of its files (`lines.rs`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::layout::OfBackup;
use super::lines::{Heads, object};
use super::{Repository, layout};
use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, Generation, Lsn, PackId, RepositoryId, SystemId, Timeline, Timestamp, WriteId};
use crate::storage::{Body, Entry};
use crate::wal::SegmentSize;

pub use super::lines::{Database, Directory, FileEntry, Line, Lines, LinesWriter, Link};
pub use super::region::{Pages, Patch, REGION, Region};

const FORMAT: &str = "perennial/backup/1";

/// Heads read at once.
const PARALLEL: usize = 16;

/// What a list of backups shows, and what a plan needs; a few kB at the front of the object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupHead {
    pub format: String,
    pub write_id: WriteId,
    pub backup_id: BackupId,
    pub repository_id: RepositoryId,
    pub system_id: SystemId,
    pub generation: Generation,
    pub timeline: Timeline,
    pub pg_major: u32,
    /// `server_version`, for people.
    pub pg_version: String,
    pub segment_size: SegmentSize,
    pub region_size: u64,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub started_at: Timestamp,
    /// By the server's clock, after the stop: commits from here on are not in the backup but in its WAL.
    pub stopped_at: Timestamp,
    /// When the server had been started: which run of it this backup is of. Absent in backups of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_started: Option<Timestamp>,
    /// The next transaction id when the backup ended (low 32 bits).
    pub next_xid: u32,
    /// Whether the cluster checks its pages.
    pub data_checksums: bool,
    /// Contents for the restored directory's `backup_label` and `tablespace_map`.
    pub backup_label: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace_map: Option<String>,
    pub tablespaces: Vec<Tablespace>,
    pub files: u64,
    /// Bytes of all files, bytes of the packs that this backup has put itself, and how many packs it needs.
    pub bytes: u64,
    pub stored: u64,
    pub packs: u64,
    /// The backup it was compared with, whose packs it needs too. It stands without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// When the last backup began that has stored everything anew, itself or one that it builds on, one upon the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_at: Option<Timestamp>,
    /// Pages whose checksum did not hold, at most [`DAMAGED_MAX`] of them, and how many in all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedPage>,
    #[serde(default)]
    pub damaged_pages: u64,
    #[serde(flatten)]
    pub lines: Lines,
}

impl BackupHead {
    /// The head, completed with what the lines came to, and the manifest: it and the lines.
    pub fn with(mut self, lines: LinesWriter) -> Result<(BackupHead, Body)> {
        let (lines, frames) = lines.finish()?;
        self.format = FORMAT.to_owned();
        self.lines = lines;
        let body = object(&self, frames)?;
        Ok((self, body))
    }
}

/// The head of a backup without files.
#[cfg(test)]
pub fn backup_head(generation: u32, timeline: u32, start: u64, stop: u64) -> BackupHead {
    BackupHead {
        format: FORMAT.to_owned(),
        write_id: WriteId([0; 16]),
        backup_id: BackupId { generation: Generation(generation), start: Lsn(start), nonce: 0 },
        repository_id: RepositoryId([0; 16]),
        system_id: SystemId(1),
        generation: Generation(generation),
        timeline: Timeline(timeline),
        pg_major: 15,
        pg_version: String::new(),
        segment_size: SegmentSize::try_from(16 << 20).expect("16 MB"),
        region_size: REGION,
        start_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        started_at: Timestamp::from_unix_micros(start as i64),
        stopped_at: Timestamp::from_unix_micros(stop as i64),
        server_started: None,
        next_xid: 0,
        data_checksums: true,
        backup_label: String::new(),
        tablespace_map: None,
        tablespaces: Vec::new(),
        files: 0,
        bytes: 0,
        stored: 0,
        packs: 0,
        parent: None,
        full_at: None,
        damaged: Vec::new(),
        damaged_pages: 0,
        lines: Lines::none(),
    }
}

impl Heads for BackupHead {
    const FORMAT: &str = FORMAT;

    fn lines(&self) -> &Lines {
        &self.lines
    }
}

/// How many damaged pages the head names.
pub const DAMAGED_MAX: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    pub oid: u32,
    /// Where it was; `None` for one that lives in place, inside `pg_tblspc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPage {
    pub file: String,
    pub block: u32,
}

/// The objects of one backup, as a listing shows them.
#[derive(Debug, Clone, Default)]
pub struct BackupObjects {
    pub manifest: Option<Entry>,
    pub begun: Option<Entry>,
    pub tombstone: Option<Entry>,
    pub pins: Vec<Entry>,
    /// Snapshots of directories beside the database.
    pub beside: Vec<Entry>,
}

/// What a look at all backups found.
#[derive(Debug, Default)]
pub struct Backups {
    pub sound: Vec<BackupHead>,
    pub damaged: Vec<Error>,
}

impl Repository {
    /// Makes the backup visible.
    pub async fn put_manifest(&self, backup: BackupId, body: &Body) -> Result<()> {
        self.put_new(&layout::manifest(backup), body).await
    }

    /// The ids of all backups that exist, in order of position: neither unfinished nor deleted.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>> {
        let all = self.backup_objects().await?;
        Ok(all
            .into_iter()
            .filter(|(_, of)| of.manifest.is_some() && of.tombstone.is_none())
            .map(|(id, _)| id)
            .collect())
    }

    /// What is listed of backups, in order of position.
    pub async fn backup_objects(&self) -> Result<BTreeMap<BackupId, BackupObjects>> {
        let mut all: BTreeMap<BackupId, BackupObjects> = BTreeMap::new();
        let mut listing = self.store.list(layout::BACKUPS, None);
        while let Some(entry) = listing.try_next().await? {
            let Some((id, what)) = layout::parse_backup(&entry.key) else { continue };
            let of = all.entry(id).or_default();
            match what {
                OfBackup::Manifest => of.manifest = Some(entry),
                OfBackup::Begun => of.begun = Some(entry),
                OfBackup::Tombstone => of.tombstone = Some(entry),
                OfBackup::Pin => of.pins.push(entry),
                OfBackup::Beside => of.beside.push(entry),
            }
        }
        Ok(all)
    }

    /// The heads of all backups that can be read, in order of position, and what is wrong with the others. One that is
    /// damaged must not stand in the way of those that are not.
    pub async fn backups(&self) -> Result<Backups> {
        let reads: Vec<_> = self.backup_ids().await?.into_iter().map(|id| self.look_for(id)).collect();
        let looks: Vec<_> = futures::stream::iter(reads).buffered(PARALLEL).try_collect().await?;
        let mut backups = Backups::default();
        for look in looks.into_iter().flatten() {
            match look {
                Ok(head) => backups.sound.push(head),
                Err(error) => backups.damaged.push(error),
            }
        }
        Ok(backups)
    }

    /// One that was deleted since the listing is none.
    async fn look_for(&self, id: BackupId) -> Result<Option<Result<BackupHead>>> {
        match self.find_manifest(id).await {
            Ok(found) => Ok(found.map(|(head, ..)| Ok(head))),
            Err(error) if error.kind() == Kind::Damaged => Ok(Some(Err(error))),
            Err(error) => Err(error),
        }
    }

    pub async fn backup_head(&self, backup: BackupId) -> Result<BackupHead> {
        Ok(self.manifest_start(backup).await?.0)
    }

    async fn manifest_start(&self, backup: BackupId) -> Result<(BackupHead, u64)> {
        self.find_manifest(backup).await?.ok_or_else(|| self.missing(&layout::manifest(backup)))
    }

    async fn find_manifest(&self, backup: BackupId) -> Result<Option<(BackupHead, u64)>> {
        let key = layout::manifest(backup);
        let Some((head, at)) = self.head_of_lines::<BackupHead>(&key).await? else { return Ok(None) };
        if head.backup_id != backup || head.repository_id != self.descriptor.repository_id {
            return Err(self.corrupt(&key, "it is the manifest of another backup"));
        }
        Ok(Some((head, at)))
    }

    /// The packs a manifest names.
    pub async fn packs_of(&self, backup: BackupId) -> Result<Vec<PackId>> {
        let (head, at) = self.manifest_start(backup).await?;
        self.packs_in(&layout::manifest(backup), at, &head.lines).await
    }

    /// Reads the whole manifest, handing each line over in order, `End` not included.
    pub async fn read_manifest(
        &self,
        backup: BackupId,
        mut line: impl FnMut(Line) -> Result<()> + Send,
    ) -> Result<BackupHead> {
        let (head, at) = self.manifest_start(backup).await?;
        let mut next = |next| line(next).map(ControlFlow::Continue);
        self.read_lines(&layout::manifest(backup), at, &head.lines, &mut next).await?;
        Ok(head)
    }
}
