//! The backup that a new one builds on: what has not changed since is not stored again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use futures::TryStreamExt;

use super::changes::{Changes, FileChanges};
use super::sparse::{self, Used};
use crate::error::Result;
use crate::model::{BackupId, Generation, Lsn, PackId, SystemId, Timeline, Timestamp};
use crate::postgres::data_dir::FileItem;
use crate::repository::manifest::{BackupHead, FileEntry, Line, REGION};
use crate::repository::piece_sums::PieceSums;
use crate::repository::{BesideHead, Region, Repository, layout};
use crate::wal::{History, WalFileName};

/// Which server's, to know which backups lie in its past.
#[derive(Debug, Clone, Copy)]
pub struct Descent {
    pub generation: Generation,
    pub timeline: Timeline,
    pub system_id: SystemId,
    /// Where the new one starts. One that ended later, as the primary's may have when this is a standby, is of the same past and
    /// ahead of it: its pages may be later than ours.
    pub start: Lsn,
}

/// A backup, read.
#[derive(Debug)]
pub struct Parent {
    pub id: BackupId,
    /// When the last full backup began that it builds on.
    pub full_at: Option<Timestamp>,
    /// Pages that were changed since carry this position or a later one.
    pub start: Lsn,
    /// Every change of a page since then has moved its LSN: checksums were on, and the server has not been down since, when
    /// tools may change pages in place (pg_checksums, pg_rewind).
    pub exact: bool,
    /// What its pages were, if this disk has kept that.
    pub piece_sums: Option<Arc<PieceSums>>,
    /// Of a backup that was read.
    pub head: Option<Box<BackupHead>>,
    /// What has changed since, if WAL tells.
    pub changes: Option<Arc<Changes>>,
    pub packs: Vec<PackId>,
    /// Nothing of it is named: what was read is compared with it, to find what has changed without saying so.
    pub compared_only: bool,
    /// Numbers of packs that are not named any more, though they have something: little of them is used.
    pub left: Arc<BTreeSet<u32>>,
    files: HashMap<String, FileEntry>,
}

impl Parent {
    /// The newest backup in the server's past; `None` when there is none that could be built on.
    pub async fn find(repository: &Repository, descent: Descent, server_started: Timestamp) -> Result<Option<Parent>> {
        let Some(history) = history(repository, descent).await? else { return Ok(None) };
        let lineage = repository.lineage(descent.generation, None).await?;
        let is_past = |head: &&BackupHead| {
            lineage.contains(head.generation)
                && head.system_id == descent.system_id
                && head.region_size == REGION
                && head.stop_lsn <= descent.start
                && history.has(head.timeline, head.stop_lsn)
        };
        let sound = repository.backups().await?.sound;
        match sound.iter().filter(is_past).max_by_key(|head| head.stop_lsn) {
            Some(head) => {
                // By the server's own word for its start: a copy of its disk, or a clock that was put back, never matches.
                let exact = head.data_checksums && head.server_started == Some(server_started);
                let head = Box::new(head.clone());
                Ok(Some(Parent { exact, ..Parent::read(repository, head).await? }))
            }
            None => Ok(None),
        }
    }

    async fn read(repository: &Repository, head: Box<BackupHead>) -> Result<Parent> {
        let mut parent = Parent { full_at: head.full_at, ..Parent::new(head.backup_id, head.start_lsn) };
        let mut broken = false;
        repository
            .read_manifest(parent.id, |line| {
                broken |= !parent.add(line);
                Ok(())
            })
            .await?;
        match broken {
            true => Err(repository.corrupt(&layout::manifest(parent.id), "a file names what is not there")),
            false => Ok(Parent { head: Some(head), ..parent }),
        }
    }

    fn new(id: BackupId, start: Lsn) -> Parent {
        Parent {
            id,
            full_at: None,
            start,
            exact: false,
            piece_sums: None,
            head: None,
            changes: None,
            packs: Vec::new(),
            compared_only: false,
            left: Arc::default(),
            files: HashMap::new(),
        }
    }

    /// A snapshot of a directory beside the database.
    pub async fn beside(repository: &Repository, head: &BesideHead) -> Result<Parent> {
        let mut parent = Parent::new(head.backup_id, head.lsn);
        let (mut broken, key) = (false, head.key());
        repository
            .read_beside(&key, |line| {
                broken |= !parent.add(line);
                Ok(())
            })
            .await?;
        if broken { Err(repository.corrupt(&key, "a file names what is not there")) } else { Ok(parent) }
    }

    /// Whether the line is sound.
    fn add(&mut self, line: Line) -> bool {
        match line {
            Line::Pack(pack) => self.packs.push(pack),
            Line::File(file) if file.outside.is_none() => {
                let packs = self.packs.len();
                let is_sound =
                    |region: &Region| region.is_sound() && region.frames().all(|frame| (frame.pack as usize) < packs);
                let sound = file.regions.iter().all(is_sound);
                self.files.insert(file.path.clone(), file);
                return sound;
            }
            _ => (),
        }
        true
    }

    /// What was just copied.
    pub fn of(id: BackupId, start: Lsn, copied: &super::copy::Copied) -> Parent {
        let files = copied.files.iter().map(|file| (file.path.clone(), file.clone())).collect();
        Parent { exact: true, packs: copied.packs.clone(), files, ..Parent::new(id, start) }
    }

    /// What WAL says of a file. One with damaged pages is read, so that they are met again.
    pub fn changes_of(&self, file: &FileItem) -> Option<FileChanges> {
        let damaged = self.head.as_ref().map_or(&[][..], |head| &head.damaged);
        if damaged.iter().any(|page| page.file == file.path) {
            return None;
        }
        self.changes.as_ref()?.of(file)
    }

    /// Decides which packs are left behind: what they have is as if the last backup did not have it.
    pub async fn leave_sparse_packs(&mut self, repository: &Repository) -> Result<()> {
        let mut used: HashMap<PackId, Used> = self.packs.iter().map(|pack| (*pack, Used::default())).collect();
        let mut listing = repository.packs();
        while let Some((id, entry)) = listing.try_next().await? {
            if let Some(pack) = used.get_mut(&id) {
                pack.size = entry.size;
            }
        }
        let mut used: Vec<Used> = self.packs.iter().map(|pack| used.get(pack).copied().unwrap_or_default()).collect();
        let mut total = 0;
        for region in self.files.values().flat_map(|file| &file.regions) {
            let anew = region.stored().min(region.plain.into());
            total += anew;
            for number in region.frames().map(|frame| frame.pack).collect::<BTreeSet<_>>() {
                if let Some(pack) = used.get_mut(number as usize) {
                    pack.anew += anew;
                }
            }
        }
        self.left = Arc::new(sparse::left_behind(&used, total));
        Ok(())
    }

    /// Whether it ended behind a position.
    pub fn ends_behind(&self, lsn: Lsn) -> bool {
        self.head.as_ref().is_some_and(|head| head.stop_lsn > lsn)
    }

    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files.get(path)
    }
}

/// The history of the server's timeline, as its generation has stored it before any WAL.
async fn history(repository: &Repository, descent: Descent) -> Result<Option<History>> {
    if descent.timeline == Timeline(1) {
        return Ok(Some(History::root(descent.timeline)));
    }
    let name = WalFileName::History(descent.timeline);
    match repository.wal_head(descent.generation, name).await? {
        Some(_) => repository.timeline_history(descent.generation, descent.timeline).await.map(Some),
        None => Ok(None),
    }
}
