//! Everything a prune has to know, listed once.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::model::{BackupId, Generation, Timestamp};
use crate::repository::manifest::{BackupHead, BackupObjects};
use crate::repository::reach::{Coverage, View};
use crate::repository::{Claim, Lineage, Repository, WalIndex, WalListing, layout, tips};
use crate::wal::WalFileName;

use super::policy::{Candidate, Way};

/// One history: a newest generation with its ancestors, and their WAL.
pub struct Branch {
    lineage: Lineage,
    index: WalIndex,
    /// Its newest timeline.
    timeline: crate::model::Timeline,
}

impl Branch {
    pub fn view(&self) -> Result<View<'_>> {
        View::new(&self.lineage, &self.index, self.timeline)
            .ok_or_else(|| Error::internal(format!("timeline {} has no history", self.timeline)))
    }
}

pub struct Census {
    pub newest: Generation,
    pub objects: BTreeMap<BackupId, BackupObjects>,
    /// Of all backups that have a manifest, deleted ones too.
    pub heads: Vec<BackupHead>,
    pub listed: Vec<WalListing>,
    /// The way to the newest state; `None` while there is no WAL.
    pub main: Option<Branch>,
    /// For each backup that is not on it, the history that it belongs to, if any leads on from it.
    pub left_behind: BTreeMap<BackupId, Branch>,
}

impl Census {
    /// Looks at all of the repository but its packs. A manifest that cannot be read is an error: nobody knows what it
    /// needs.
    pub async fn take(repository: &Repository) -> Result<Option<Census>> {
        let claims = repository.claims(repository.generations().await?).await?;
        let Some(newest) = claims.iter().map(|claim| claim.generation).max() else { return Ok(None) };
        let objects = repository.backup_objects().await?;
        let mut heads = Vec::new();
        for (id, _) in objects.iter().filter(|(_, of)| of.manifest.is_some()) {
            heads.push(repository.backup_head(*id).await.map_err(|e| {
                e.hint("nothing is deleted while a manifest cannot be read: bring it back, or delete that backup's directory by hand")
            })?);
        }
        let listed = repository.list_wal(claims.iter().map(|claim| claim.generation)).await?;
        let main = branch(repository, &claims, newest, &listed).await?;
        let mut census = Census { newest, objects, heads, listed, main, left_behind: BTreeMap::new() };
        census.find_left_behind(repository, &claims).await?;
        Ok(Some(census))
    }

    async fn find_left_behind(&mut self, repository: &Repository, claims: &[Claim]) -> Result<()> {
        let off: Vec<BackupHead> =
            self.heads.iter().filter(|head| !matches!(self.main_coverage(head), Ok(Some(_)))).cloned().collect();
        for head in off {
            let mut ends: Vec<Generation> = tips(claims);
            ends.push(head.generation);
            for end in ends.into_iter().filter(|end| *end != self.newest) {
                let Some(branch) = branch(repository, claims, end, &self.listed).await? else { continue };
                if branch.view()?.coverage_of(&head).is_some() {
                    self.left_behind.insert(head.backup_id, branch);
                    break;
                }
            }
        }
        Ok(())
    }

    /// How far the newest state's history is reached from a backup, if it lies on it.
    pub fn main_coverage(&self, head: &BackupHead) -> Result<Option<Coverage>> {
        match &self.main {
            Some(main) => Ok(main.view()?.coverage_of(head)),
            None => Ok(None),
        }
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
            let way = self.main_coverage(head)?.map_or(Way::LeftBehind, |to| Way::Main { through: to.through });
            let mut pins = Vec::new();
            for pin in self.objects.get(&head.backup_id).into_iter().flat_map(|of| &of.pins) {
                pins.push(repository.pin_reason(pin).await?);
            }
            candidates.push(Candidate {
                id: head.backup_id,
                start: head.start_lsn,
                started_at: head.started_at,
                stopped_at: head.stopped_at,
                way,
                pins,
            });
        }
        Ok(candidates)
    }
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
