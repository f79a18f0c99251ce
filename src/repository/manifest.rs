//! A backup's manifest: the commit marker, and the full description of one base backup.
//!
//! A head (who, where in WAL, how much), then zstd frames of JSON lines: packs, directories, links, files with their
//! regions, and an end line with the count. Line by line, so that neither writer nor reader holds more than it needs
//! of a large one, and any language reads it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::codec::{Codec, Sha256, decompress};
use super::layout::OfBackup;
use super::{Repository, envelope, layout};
use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, Generation, Lsn, PackId, RepositoryId, SystemId, Timeline, Timestamp, WriteId};
use crate::storage::{Body, Created, Entry};
use crate::wal::SegmentSize;

pub use super::region::{Pages, Patch, REGION, Region};

const FORMAT: &str = "perennial/backup/1";

/// Lines are gathered to about this many bytes before they become a frame.
const LINES_FRAME: usize = 1 << 20;

/// Heads read at once.
const PARALLEL: usize = 16;

/// Largest frame of lines a reader accepts.
const LINES_FRAME_MAX: u64 = 64 << 20;

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
    /// Pages whose checksum did not hold, at most [`DAMAGED_MAX`] of them, and how many in all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedPage>,
    #[serde(default)]
    pub damaged_pages: u64,
    /// Size of each frame of lines: stored, plain.
    pub frames: Vec<(u64, u64)>,
    /// SHA-256 of all frames of lines.
    pub frames_sha256: Sha256,
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

/// One line of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    /// Packs are numbered in the order of their lines, from 0.
    Pack(PackId),
    Dir(Directory),
    Link(Link),
    File(FileEntry),
    /// The last line: how many came before it.
    End(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    pub path: String,
    pub mode: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub path: String,
    pub target: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Below the data directory; tablespaces are under `pg_tblspc/<oid>/`.
    pub path: String,
    pub mode: u32,
    /// Names of the owner and the group, for people: a restored file belongs to whoever restores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    pub size: u64,
    /// Last modification, seconds since the epoch.
    pub mtime: i64,
    /// For a configuration file from outside the data directory: where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<String>,
    /// For files of pages: which file it was on its disk, as inode and time of birth in nanoseconds. The same path may be
    /// another file later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub birth: Option<String>,
    pub regions: Vec<Region>,
}

impl FileEntry {
    /// CRC-32C of the whole file, from those of its regions.
    pub fn crc32c(&self) -> u32 {
        let mut regions = self.regions.iter();
        let first = regions.next().map_or(0, |region| region.crc);
        regions.fold(first, |crc, region| crc32c::crc32c_combine(crc, region.crc, region.plain as usize))
    }
}

/// Writes lines into frames.
#[derive(Debug)]
pub struct ManifestWriter {
    codec: Codec,
    lines: Vec<u8>,
    count: u64,
    frames: Vec<(u64, u64)>,
    stored: Vec<Bytes>,
}

impl ManifestWriter {
    pub fn new(codec: Codec) -> ManifestWriter {
        ManifestWriter { codec, lines: Vec::new(), count: 0, frames: Vec::new(), stored: Vec::new() }
    }

    pub fn add(&mut self, line: &Line) -> Result<()> {
        serde_json::to_writer(&mut self.lines, line)
            .map_err(|e| Error::internal("a manifest line as JSON").source(e))?;
        self.lines.push(b'\n');
        self.count += 1;
        if self.lines.len() >= LINES_FRAME { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let frame = self.codec.compress(&self.lines)?;
        self.frames.push((frame.len() as u64, self.lines.len() as u64));
        self.stored.push(Bytes::from(frame));
        self.lines.clear();
        Ok(())
    }

    /// Ends the lines and puts the head, completed with what they came to, in front.
    pub fn finish(mut self, mut head: BackupHead) -> Result<Body> {
        let count = self.count;
        self.add(&Line::End(count))?;
        if !self.lines.is_empty() {
            self.flush()?;
        }
        let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        self.stored.iter().for_each(|frame| hash.update(frame));
        head.frames_sha256.0.copy_from_slice(hash.finish().as_ref());
        head.format = FORMAT.to_owned();
        head.frames = self.frames;
        let mut body = Body::from(envelope::wrap(&head)?);
        self.stored.into_iter().for_each(|frame| body.push(frame));
        Ok(body)
    }
}

/// The objects of one backup, as a listing shows them.
#[derive(Debug, Clone, Default)]
pub struct BackupObjects {
    pub manifest: Option<Entry>,
    pub begun: Option<Entry>,
    pub tombstone: Option<Entry>,
    pub pins: Vec<Entry>,
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
        let key = layout::manifest(backup);
        match self.store.create(&key, body).await? {
            Created::Now => Ok(()),
            Created::AlreadyThere => Err(Error::internal(format!("{} is there already", self.url(&key)))),
        }
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

    async fn manifest_start(&self, backup: BackupId) -> Result<(BackupHead, u64, u64)> {
        self.find_manifest(backup).await?.ok_or_else(|| self.missing(&layout::manifest(backup)))
    }

    async fn find_manifest(&self, backup: BackupId) -> Result<Option<(BackupHead, u64, u64)>> {
        let key = layout::manifest(backup);
        let Some(chunk) = self.store.read(&key, 0..envelope::HEAD_MAX).await? else { return Ok(None) };
        let (head, length): (BackupHead, usize) =
            envelope::unwrap(&chunk.bytes, FORMAT).map_err(|why| self.corrupt(&key, why))?;
        let frames: u64 = head.frames.iter().map(|(stored, _)| stored).sum();
        if length as u64 + frames != chunk.object_size {
            return Err(self.corrupt(&key, format!("it is {} bytes long, its head says otherwise", chunk.object_size)));
        }
        if head.backup_id != backup || head.repository_id != self.descriptor.repository_id {
            return Err(self.corrupt(&key, "it is the manifest of another backup"));
        }
        Ok(Some((head, length as u64, chunk.object_size)))
    }

    /// The packs a manifest names. They come first: no more of it is read.
    pub async fn packs_of(&self, backup: BackupId) -> Result<Vec<PackId>> {
        let mut packs = Vec::new();
        let take = |line| match line {
            Line::Pack(pack) => {
                packs.push(pack);
                Ok(ControlFlow::Continue(()))
            }
            _ => Ok(ControlFlow::Break(())),
        };
        self.walk_manifest(backup, take).await?;
        Ok(packs)
    }

    /// Reads the whole manifest, handing each line over in order, `End` not included.
    pub async fn read_manifest(
        &self,
        backup: BackupId,
        mut line: impl FnMut(Line) -> Result<()>,
    ) -> Result<BackupHead> {
        self.walk_manifest(backup, |next| line(next).map(ControlFlow::Continue)).await
    }

    /// Reads a manifest line by line until `line` has had enough.
    async fn walk_manifest(
        &self,
        backup: BackupId,
        mut line: impl FnMut(Line) -> Result<ControlFlow<()>>,
    ) -> Result<BackupHead> {
        let key = layout::manifest(backup);
        let (head, mut at, _) = self.manifest_start(backup).await?;
        let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        let mut count = 0;
        let mut ended = false;
        for (stored, plain) in &head.frames {
            if *plain > LINES_FRAME_MAX {
                return Err(self.corrupt(&key, "a frame is too large"));
            }
            let frame = self.must_read(&key, at..at + stored).await?.bytes;
            hash.update(&frame);
            let text = decompress(&frame, *plain as usize).map_err(|why| self.corrupt(&key, why))?;
            for json in text.split(|byte| *byte == b'\n').filter(|json| !json.is_empty()) {
                match serde_json::from_slice(json).map_err(|e| self.corrupt(&key, e))? {
                    Line::End(lines) if lines == count && !ended => ended = true,
                    Line::End(_) => return Err(self.corrupt(&key, "it ends at the wrong place")),
                    next if !ended => {
                        if line(next)?.is_break() {
                            return Ok(head);
                        }
                    }
                    _ => return Err(self.corrupt(&key, "it goes on after its end")),
                }
                count += 1;
            }
            at += stored;
        }
        if !ended {
            return Err(self.corrupt(&key, "it has no end"));
        }
        if hash.finish().as_ref() != head.frames_sha256.0 {
            return Err(self.corrupt(&key, "the checksum of its lines does not hold"));
        }
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_file_is_that_of_its_joined_regions() {
        let content: Vec<u8> = (0..2_500_000u32).map(|n| (n % 251) as u8).collect();
        let frame = crate::repository::pack::FrameRef { pack: 0, offset: 0, stored: 0, sha256: Sha256::of(b"") };
        let whole = |part: &[u8]| Region::whole(frame, part.len() as u32, crc32c::crc32c(part));
        let regions = content.chunks(REGION as usize).map(whole);
        let mut file = FileEntry {
            path: "base/1/1".into(),
            mode: 0o600,
            owner: None,
            size: content.len() as u64,
            mtime: 0,
            outside: None,
            birth: None,
            regions: regions.collect(),
        };
        assert_eq!(file.crc32c(), crc32c::crc32c(&content));
        file.regions.clear();
        assert_eq!(file.crc32c(), 0);
    }

    #[test]
    fn lines_are_plain_json() {
        let line = Line::Dir(Directory { path: "base/1".to_owned(), mode: 0o700 });
        let json = serde_json::to_string(&line).expect("json");
        assert_eq!(json, r#"{"dir":{"path":"base/1","mode":448}}"#);
        assert_eq!(serde_json::from_str::<Line>(&json).expect("reads back"), line);
    }
}
