//! One backup in a second place, and of WAL what makes it one: an archive of single states, each to be restored to its own end.
//! A place may hold several, or a copy of all; WAL between them is not missing there, and a record says so.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::TryStreamExt;

use super::{Copy, Report, generations_of};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events, Level};
use crate::model::{BackupId, Generation, Lsn, PackId, WriteId};
use crate::repository::layout::OfBackup;
use crate::repository::manifest::{BackupHead, Backups};
use crate::repository::reach::View;
use crate::repository::{BackupWal, PruneRecord, Repository, WalIndex, WalListing, layout};
use crate::storage::{Entry, Store};

/// The two places, and as the source's repository what is read of it: of an encrypted one that takes the key.
#[derive(Debug, Clone)]
pub struct CopyOne {
    pub copy: Copy,
    pub source: Repository,
    /// The second place above any encryption.
    pub target: Arc<dyn Store>,
    pub backup: BackupId,
}

/// What makes a backup one.
struct Needed {
    head: BackupHead,
    /// Its manifest and what hangs on it. What comes later may name packs that were not looked at.
    objects: Vec<(OfBackup, Entry)>,
    packs: BTreeSet<PackId>,
    wal: BackupWal,
}

impl CopyOne {
    pub async fn run(&self, clock: &Clock, events: &Events) -> Result<Report> {
        let (copy, mut report) = (&self.copy, Report::default());
        self.of_backup().await?;
        copy.begin(clock).await?;
        let generations = generations_of(&*copy.from).await?;
        copy.has_no_life_of_its_own(&generations).await?;
        self.was_not_deleted_there().await?;
        let needed = self.needed().await?;
        let keys: BTreeSet<String> = needed.packs.iter().map(|pack| layout::pack(*pack)).collect();
        copy.missing_of(layout::PACKS, &|key| keys.contains(key), &mut report).await?;
        self.are_there(layout::PACKS, &keys).await?;
        // A claim names its parent, and numbers have no holes.
        for generation in (1..=needed.head.generation.0).map(Generation) {
            if !copy.claim(generation, &mut report).await? {
                return Err(self.source.missing(&layout::claim(generation)));
            }
        }
        self.note_holes(&needed).await?;
        for generation in needed.wal.listed.iter().map(|listing| listing.generation) {
            copy.missing_in_order(&layout::wal_dir(generation), &|key| needed.wal.keys.contains(key), &mut report)
                .await?;
        }
        self.are_there(layout::GENERATIONS, &needed.wal.keys).await?;
        let text = format!("{} objects copied; the manifest comes last", report.objects);
        events.emit(Event::Note { level: Level::Detail, text });
        copy.has_no_life_of_its_own(&generations).await?;
        self.manifest(needed.objects, &mut report).await?;
        // A prune of the second place may have been deleting meanwhile.
        self.are_there(layout::PACKS, &keys).await?;
        Ok(report)
    }

    /// The objects of the backup, while it exists.
    async fn of_backup(&self) -> Result<Vec<(OfBackup, Entry)>> {
        self.copy.backups().await?.remove(&self.backup).ok_or_else(|| {
            Error::not_found(format!("{} has no backup {}", self.source.address(), self.backup))
                .hint("`perennial list` shows the backups")
        })
    }

    /// What was deleted there exists no more, whatever is put there.
    async fn was_not_deleted_there(&self) -> Result<()> {
        let key = layout::tombstone(self.backup);
        match self.copy.to.read(&key, 0..1).await? {
            None => Ok(()),
            Some(_) => Err(Error::refused(format!("backup {} was deleted from {}", self.backup, self.copy.to.url("")))
                .hint("once the grace period is over a prune there takes the rest of it away; then copy it again")),
        }
    }

    async fn needed(&self) -> Result<Needed> {
        let source = &self.source;
        let head = source.backup_head(self.backup).await?;
        let objects = self.of_backup().await?;
        let mut packs: BTreeSet<PackId> = source.packs_of(self.backup).await?.into_iter().collect();
        for (_, entry) in objects.iter().filter(|(what, _)| *what == OfBackup::Beside) {
            packs.extend(source.packs_of_beside(&entry.key).await?);
        }
        let wal = source.wal_of_backup(&head).await?;
        Ok(Needed { head, objects, packs, wal })
    }

    /// Whether all that is needed has arrived: what goes at the source meanwhile is not copied.
    async fn are_there(&self, directory: &str, keys: &BTreeSet<String>) -> Result<()> {
        let mut missing = keys.clone();
        let mut listing = self.copy.to.list(directory, None);
        while let Some(entry) = listing.try_next().await? {
            missing.remove(&entry.key);
        }
        match missing.first() {
            Some(key) => Err(self.source.missing(key)),
            None => Ok(()),
        }
    }

    /// Where the target will have a hole that is none at the source, a record says that nothing is missing there, as after a
    /// prune.
    async fn note_holes(&self, needed: &Needed) -> Result<()> {
        let target =
            Repository::assume(Arc::clone(&self.target), self.source.descriptor().clone(), self.source.clock());
        let Some(tip) = target.newest_generation().await? else { return Ok(()) };
        let lineage = target.lineage(tip, None).await?;
        let mut listed = target.list_wal(lineage.claims().iter().map(|claim| claim.generation)).await?;
        let before = target.index_of(&lineage, &listed).await?;
        for (listing, of_source) in pairs(&mut listed, &needed.wal.listed) {
            let new = of_source.entries.iter().filter(|entry| needed.wal.keys.contains(&entry.key));
            let new: Vec<Entry> = new.filter(|entry| !has(&listing.entries, entry)).cloned().collect();
            listing.entries.extend(new);
        }
        // Histories are read at the source: they have not been copied yet.
        let after = self.source.index_of(&lineage, &listed).await?;
        let Backups { sound: mut heads, .. } = target.backups().await?;
        let others = heads.clone();
        heads.retain(|head| head.backup_id != self.backup);
        heads.push(needed.head.clone());
        let holes = |index: &WalIndex, heads: &[BackupHead]| -> BTreeSet<u64> {
            let view = index.newest_timeline().and_then(|timeline| View::new(&lineage, index, timeline));
            view.map_or_else(BTreeSet::new, |view| view.holes(heads))
        };
        let new: BTreeSet<u64> = holes(&after, &heads).difference(&holes(&before, &others)).copied().collect();
        let size = lineage.tip().segment_size;
        let starts = heads.iter().map(|head| head.start_lsn);
        let behind = new.last().and_then(|hole| starts.filter(|start| size.number_at(*start) > *hole).min());
        match behind {
            Some(points_from) if points_from > target.points_from().await? => {
                target.put_prune(&record(&target, tip, points_from)).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Makes it visible, if it still exists.
    async fn manifest(&self, mut of: Vec<(OfBackup, Entry)>, report: &mut Report) -> Result<()> {
        self.of_backup().await?;
        let there: BTreeSet<String> =
            self.copy.to.list(layout::BACKUPS, None).map_ok(|entry| entry.key).try_collect().await?;
        of.retain(|(what, entry)| *what != OfBackup::Begun && !there.contains(&entry.key));
        let (manifest, others): (Vec<_>, Vec<_>) = of.into_iter().partition(|(what, _)| *what == OfBackup::Manifest);
        report.backups += manifest.len() as u64;
        for objects in [others, manifest] {
            self.copy.all(objects.into_iter().map(|(_, entry)| entry).collect(), report).await?;
        }
        Ok(())
    }
}

/// The listings of the same generations in both places.
fn pairs<'a>(
    target: &'a mut [WalListing],
    source: &'a [WalListing],
) -> impl Iterator<Item = (&'a mut WalListing, &'a WalListing)> {
    target.iter_mut().filter_map(|listing| {
        let same = source.iter().find(|of| of.generation == listing.generation)?;
        Some((listing, same))
    })
}

fn has(entries: &[Entry], wanted: &Entry) -> bool {
    entries.iter().any(|entry| entry.key == wanted.key)
}

fn record(target: &Repository, generation: Generation, points_from: Lsn) -> PruneRecord {
    PruneRecord {
        kind: "perennial/prune".to_owned(),
        format: 1,
        write_id: WriteId(target.clock().random()),
        generation,
        at: target.clock().now(),
        points_from,
        deleted: Vec::new(),
        // It deletes nothing; whoever asks is told the most that a prune could.
        grace_ms: 0,
    }
}
