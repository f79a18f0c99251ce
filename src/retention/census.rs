//! Everything a prune has to know, listed once: in memory about 200 bytes for each object of WAL, and each pack while packs
//! are looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::error::{Error, Result};
use crate::model::{BackupId, Generation, Lsn, Timeline, Timestamp};
use crate::repository::manifest::{BackupHead, BackupObjects};
use crate::repository::reach::{Coverage, View};
use crate::repository::{Claim, Lineage, Repository, WalIndex, WalListing, layout, tips};
use crate::wal::{History, WalFileName};

use super::policy::{Candidate, Departure, Way};

/// Heads of manifests read at once.
const PARALLEL: usize = 16;

/// One history: a newest generation with its ancestors, and their WAL.
pub struct Branch {
    lineage: Lineage,
    index: WalIndex,
    /// Its newest timeline.
    timeline: Timeline,
}

impl Branch {
    pub fn view(&self) -> Result<View<'_>> {
        View::new(&self.lineage, &self.index, self.timeline)
            .ok_or_else(|| Error::internal(format!("timeline {} has no history", self.timeline)))
    }
}

pub struct Census {
    pub newest: Generation,
    claims: Vec<Claim>,
    pub objects: BTreeMap<BackupId, BackupObjects>,
    /// Of all backups that have a manifest, deleted ones too.
    pub heads: Vec<BackupHead>,
    pub listed: Vec<WalListing>,
    /// The way to the newest state; `None` while there is no WAL.
    pub main: Option<Branch>,
    /// How far the newest state's history is reached from each backup that lies on it.
    coverages: BTreeMap<BackupId, Coverage>,
    /// For each backup that is not on it, the history that it belongs to, if any leads on from it.
    pub left_behind: BTreeMap<BackupId, Arc<Branch>>,
    /// Which generations have stored the history of a timeline.
    histories: BTreeSet<(Timeline, Generation)>,
}

impl Census {
    /// Looks at all of the repository but its packs. A manifest that cannot be read is an error: nobody knows what it
    /// needs.
    pub async fn take(repository: &Repository) -> Result<Option<Census>> {
        let claims = repository.claims(repository.generations().await?).await?;
        let Some(newest) = claims.iter().map(|claim| claim.generation).max() else { return Ok(None) };
        let objects = repository.backup_objects().await?;
        let ids = objects.iter().filter(|(_, of)| of.manifest.is_some()).map(|(id, _)| *id);
        let reads: Vec<_> = ids.map(|id| repository.backup_head(id)).collect();
        let heads: Vec<BackupHead> = futures::stream::iter(reads).buffered(PARALLEL).try_collect().await.map_err(|e: Error| {
            e.hint("nothing is deleted while a manifest cannot be read: bring it back, or delete that backup's directory by hand")
        })?;
        let listed = repository.list_wal(claims.iter().map(|claim| claim.generation)).await?;
        let main = branch(repository, &claims, newest, &listed).await?;
        let coverages = match &main {
            Some(main) => coverages(&main.view()?, &heads),
            None => BTreeMap::new(),
        };
        let histories = histories(&listed);
        let left_behind = BTreeMap::new();
        let mut census = Census { newest, claims, objects, heads, listed, main, coverages, left_behind, histories };
        census.find_left_behind(repository).await?;
        Ok(Some(census))
    }

    async fn find_left_behind(&mut self, repository: &Repository) -> Result<()> {
        let mut branches: BTreeMap<Generation, Option<Arc<Branch>>> = BTreeMap::new();
        for head in self.heads.iter().filter(|head| !self.coverages.contains_key(&head.backup_id)) {
            let mut ends: Vec<Generation> = tips(&self.claims);
            ends.push(head.generation);
            for end in ends.into_iter().filter(|end| *end != self.newest) {
                let known = match branches.get(&end) {
                    Some(known) => known.clone(),
                    None => branch(repository, &self.claims, end, &self.listed).await?.map(Arc::new),
                };
                branches.insert(end, known.clone());
                let Some(branch) = known else { continue };
                if branch.view()?.coverage_of(head).is_some() {
                    self.left_behind.insert(head.backup_id, branch);
                    break;
                }
            }
        }
        Ok(())
    }

    /// How far the newest state's history is reached from a backup, if it lies on it.
    pub fn main_coverage(&self, head: &BackupHead) -> Option<&Coverage> {
        self.coverages.get(&head.backup_id)
    }

    /// Where and when the way to the newest state left `timeline`: when the timeline that goes on from there began. What is
    /// not known was left just now.
    pub fn left_at(&self, timeline: Timeline) -> Result<Departure> {
        let claimed = |generation| self.claims.iter().find(|claim| claim.generation == generation);
        let newest = claimed(self.newest).map_or(Timestamp::from_unix_micros(i64::MAX), |claim| claim.claimed_at);
        let unknown = Departure { fork: Lsn(0), at: newest };
        let Some(main) = &self.main else { return Ok(unknown) };
        let view = main.view()?;
        let descent = main.index.history(timeline).unwrap_or(History::root(timeline));
        let past = descent.switches.iter().rev().map(|switch| switch.timeline);
        let spans: Vec<_> = view.history.spans().collect();
        for ancestor in std::iter::once(timeline).chain(past) {
            let Some(place) = spans.iter().position(|(of, ..)| *of == ancestor) else { continue };
            let Some((next, fork, _)) = spans.get(place + 1) else { return Ok(unknown) };
            let of_next = self.histories.range((*next, Generation(0))..=(*next, Generation(u32::MAX)));
            let began = of_next.map(|(_, generation)| *generation).find(|by| view.lineage.contains(*by));
            let by = began.and_then(claimed);
            return Ok(Departure { fork: *fork, at: by.map_or(newest, |claim| claim.claimed_at) });
        }
        Ok(unknown)
    }

    /// Where whole segments were left behind.
    pub fn departures(&self) -> Result<Vec<Departure>> {
        let Some(main) = &self.main else { return Ok(Vec::new()) };
        let view = main.view()?;
        let mut timelines = BTreeSet::new();
        for listing in &self.listed {
            for (_, name) in listing.entries.iter().filter_map(|entry| layout::parse_wal_file(&entry.key)) {
                let WalFileName::Segment(name) = name else { continue };
                let Some(number) = name.number(view.segment_size()) else { continue };
                if !(view.lineage.contains(listing.generation) && view.is_on_the_way(name.timeline, number)) {
                    timelines.insert(name.timeline);
                }
            }
        }
        timelines.into_iter().map(|timeline| self.left_at(timeline)).collect()
    }

    pub fn is_pinned(&self, id: BackupId) -> bool {
        self.objects.get(&id).is_some_and(|of| !of.pins.is_empty())
    }

    pub fn is_deleted(&self, id: BackupId) -> bool {
        self.objects.get(&id).is_some_and(|of| of.tombstone.is_some())
    }

    /// When a backup was deleted, by the store's clock.
    pub fn deleted_at(&self, id: BackupId) -> Option<Timestamp> {
        self.objects.get(&id)?.tombstone.as_ref().map(|tombstone| tombstone.modified)
    }

    /// The backups that exist, as the rules see them.
    pub async fn candidates(&self, repository: &Repository) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for head in self.heads.iter().filter(|head| !self.is_deleted(head.backup_id)) {
            let way = match self.main_coverage(head) {
                Some(to) => Way::Main { through: to.through },
                None => Way::LeftBehind { at: self.left_at(head.timeline)?.at },
            };
            let mut pins = Vec::new();
            for pin in self.objects.get(&head.backup_id).into_iter().flat_map(|of| &of.pins) {
                pins.push(repository.pin_reason(pin).await?);
            }
            candidates.push(Candidate {
                id: head.backup_id,
                start: head.start_lsn,
                stop: head.stop_lsn,
                started_at: head.started_at,
                stopped_at: head.stopped_at,
                way,
                pins,
            });
        }
        Ok(candidates)
    }
}

fn coverages(view: &View<'_>, heads: &[BackupHead]) -> BTreeMap<BackupId, Coverage> {
    heads.iter().filter_map(|head| Some((head.backup_id, view.coverage_of(head)?))).collect()
}

fn histories(listed: &[WalListing]) -> BTreeSet<(Timeline, Generation)> {
    let names =
        listed.iter().flat_map(|listing| &listing.entries).filter_map(|entry| layout::parse_wal_file(&entry.key));
    let of_timelines = names.filter_map(|(generation, name)| match name {
        WalFileName::History(timeline) => Some((timeline, generation)),
        _ => None,
    });
    of_timelines.collect()
}

async fn branch(
    repository: &Repository,
    claims: &[Claim],
    tip: Generation,
    listed: &[WalListing],
) -> Result<Option<Branch>> {
    let Some(lineage) = Lineage::of(claims, tip) else { return Ok(None) };
    let index = repository.index_of(&lineage, listed).await?;
    let Some(timeline) = index.newest_timeline() else { return Ok(None) };
    if index.history(timeline).is_none() {
        let missing = repository.missing(&layout::wal_file(tip, WalFileName::History(timeline)));
        return Err(missing.context("nothing is deleted while a history cannot be followed"));
    }
    Ok(Some(Branch { lineage, index, timeline }))
}
