//! Retention: which backups stay, which WAL they need, and deleting the rest without ever missing what is needed.
//!
//! Mark and sweep over [`crate::repository::reach`], in two phases with a grace period between them (see
//! `repository/prune.rs`). Facts are listed, the plan is a value, and only the newest generation deletes.

mod census;
mod needs;
mod policy;
mod sweep;

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, Generation, Lsn, Timestamp, WriteId};
use crate::repository::{PruneRecord, Repository};
use crate::storage::{Entry, Refused, delete_if_allowed};

use census::Census;

pub use policy::{Keep, Reason, Verdict};

/// A prune tries this many times to be on record.
const RECORDS: u32 = 5;

#[derive(Debug, Clone)]
pub struct Options {
    pub keep: Keep,
    /// How long a deleted backup's objects stay for whoever is reading them.
    pub grace: Duration,
    /// Plan only.
    pub dry_run: bool,
    /// The generation on whose behalf; the newest when `None`.
    pub generation: Option<Generation>,
}

/// What a prune did, or would do.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    pub backups: Vec<Judged>,
    /// On the way to the newest state all points from here on stay reachable.
    pub points_from: Option<Lsn>,
    pub points_from_time: Option<Timestamp>,
    /// Objects and bytes deleted now, and those of what was deleted less than the grace period ago.
    pub objects: u64,
    pub bytes: u64,
    pub bytes_later: u64,
    pub logs: u64,
    /// What the store did not let go; the next prune tries again.
    pub refused: Refused,
}

/// One backup and the rules' answer.
#[derive(Debug, serde::Serialize)]
pub struct Judged {
    pub id: BackupId,
    pub stopped_at: Timestamp,
    pub stored: u64,
    /// Why it stays; empty: it goes.
    pub reasons: Vec<String>,
}

/// Deletes what the rules do not keep.
pub async fn prune(repository: &Repository, options: &Options, events: &Events) -> Result<Report> {
    if options.keep.is_empty() {
        return Err(Error::usage("no rule says what to keep")
            .hint("name at least one, such as --keep-last 7 or --keep-points 14d; --dry-run shows what would go"));
    }
    // What the record says, and no more.
    let grace_ms = u64::try_from(options.grace.as_millis()).unwrap_or(u64::MAX);
    let options = &Options { grace: Duration::from_millis(grace_ms), ..options.clone() };
    let Some(census) = Census::take(repository).await? else {
        return Err(Error::not_found(format!("{} has no generation: there is nothing to prune", repository.address())));
    };
    if let Some(ours) = options.generation.filter(|ours| *ours != census.newest) {
        let why = format!("generation {ours} was superseded by generation {}: only the newest deletes", census.newest);
        return Err(Error::new(Kind::Fenced, why));
    }
    let candidates = census.candidates(repository).await?;
    let clock = repository.clock();
    let newest_stop = candidates.iter().map(|candidate| candidate.stopped_at).max();
    // A clock that was put back must not make everything look young, nor the future old.
    let now = newest_stop.map_or(clock.now(), |stop| stop.max(clock.now()));
    let plan = policy::decide(&candidates, &census.departures()?, &options.keep, options.grace, now);
    let mut goes: Vec<BackupId> =
        plan.verdicts.iter().filter(|verdict| !verdict.stays()).map(|verdict| verdict.id).collect();

    let points_from = match plan.points_from {
        Some(planned) => Some(told_from(repository, &census, planned).await?),
        None => None,
    };

    let ours = if options.dry_run {
        None
    } else {
        sweep::still_newest(repository, census.newest).await?;
        for id in &goes {
            repository.put_tombstone(*id).await?;
            events.emit(Event::BackupDeleted { id: *id, grace: options.grace });
        }
        let told = points_from.unwrap_or(Lsn(0));
        Some(put_on_record(repository, || record(repository, &census, told, &goes, grace_ms)).await?)
    };
    let store_now = ours.as_ref().map_or(now, |ours| ours.modified);
    let mut census = census;
    if !options.dry_run {
        census.objects = repository.backup_objects().await?;
        spare_pinned(repository, &mut census, &mut goes).await?;
        let dead = sweep::dead(&census, store_now);
        bury(repository, &dead).await?;
        if !dead.is_empty() {
            // One of them may have ended after all.
            census.objects = repository.backup_objects().await?;
        }
    }
    let grace_over = store_now.earlier_by(options.grace);
    // One that is pinned keeps what it needs, even where its tombstone could not be taken back.
    let deleted = |id: &BackupId| {
        let deleted = census.deleted_at(*id).or(goes.contains(id).then_some(store_now));
        deleted.filter(|_| !census.is_pinned(*id))
    };
    let all = census.heads.iter().map(|head| head.backup_id);
    let over = sweep::Over {
        now: all.clone().filter(|id| deleted(id).is_some_and(|deleted| deleted <= grace_over)).collect(),
        later: all.filter(|id| deleted(id).is_some()).collect(),
    };
    let (garbage, bytes_later) = sweep::find(repository, &census, &plan, options, store_now, &over).await?;
    let mut report = report(&census, &plan, points_from, &garbage, bytes_later);
    if let Some(ours) = ours {
        let deleted = sweep::delete(repository, &census, &garbage).await?;
        (report.objects, report.bytes, report.refused) = (deleted.objects, deleted.bytes, deleted.refused);
        forget_older(repository, &ours, options.grace, garbage.nobody_under_way).await?;
        events.emit(Event::Pruned { backups: goes.len() as u64, objects: report.objects, bytes: report.bytes });
        tell_refused(&report.refused, events);
    }
    Ok(report)
}

fn tell_refused(refused: &Refused, events: &Events) {
    if let (Some(why), true) = (&refused.why, refused.objects > 0) {
        let (objects, bytes) = (refused.objects, refused.bytes);
        events.emit(Event::DeletesRefused { objects, bytes, why: why.clone() });
    }
}

/// A pin that was put while we decided counts: whoever put it looked afterwards, and found the backup there.
async fn spare_pinned(repository: &Repository, census: &mut Census, goes: &mut Vec<BackupId>) -> Result<()> {
    for (id, of) in &mut census.objects {
        if goes.contains(id) && !of.pins.is_empty() {
            repository.take_tombstone_back(*id).await?;
            of.tombstone = None;
            goes.retain(|gone| gone != id);
        }
    }
    Ok(())
}

/// Backups that will not end cannot come to be any more, whatever their machine still has on its way: nothing need be kept for
/// them. One that has ended after all looks for a tombstone last, as we look for its manifest: one of the two sees the other.
async fn bury(repository: &Repository, dead: &[BackupId]) -> Result<()> {
    for id in dead {
        repository.put_tombstone(*id).await?;
    }
    if dead.is_empty() {
        return Ok(());
    }
    let objects = repository.backup_objects().await?;
    for id in dead.iter().filter(|id| objects.get(*id).is_some_and(|of| of.manifest.is_some())) {
        repository.take_tombstone_back(*id).await?;
    }
    Ok(())
}

/// A prune that ends beside us may take our record away with those before its own.
async fn put_on_record(repository: &Repository, record: impl Fn() -> PruneRecord) -> Result<Entry> {
    for _ in 0..RECORDS {
        if let Some(ours) = repository.put_prune(&record()).await? {
            return Ok(ours);
        }
    }
    Err(Error::refused("others prune this repository at the same time").hint("prune again once they have ended"))
}

/// From where on missing WAL is damage. What an earlier prune, or a copy of single backups, has left holes in before its own
/// mark stays so, whatever the rules are now.
async fn told_from(repository: &Repository, census: &Census, planned: Lsn) -> Result<Lsn> {
    let before = match repository.points_from().await {
        // Whatever it said is told as damage from now on: rather too much than too little.
        Err(error) if error.kind() == Kind::Damaged => Lsn(0),
        read => read?,
    };
    let has_holes = match &census.main {
        Some(main) if planned < before => main.view()?.coverage(planned).through < before,
        _ => false,
    };
    Ok(if has_holes { before } else { planned })
}

fn record(repository: &Repository, census: &Census, points_from: Lsn, goes: &[BackupId], grace_ms: u64) -> PruneRecord {
    PruneRecord {
        kind: "perennial/prune".to_owned(),
        format: 1,
        write_id: WriteId(repository.clock().random()),
        generation: census.newest,
        at: repository.clock().now(),
        points_from,
        deleted: goes.to_vec(),
        grace_ms,
    }
}

/// Only the newest record tells from where on WAL is there. But a prune that is older may still be deleting: its record goes
/// once ours keeps backups from all that it may take, packs and WAL, and every backup that was under way has ended, or after a
/// week.
async fn forget_older(repository: &Repository, ours: &Entry, grace: Duration, nobody_under_way: bool) -> Result<()> {
    let mut records = repository.prunes().await?;
    records.pop();
    let reach = (ours.modified.earlier_by(grace), &ours.key);
    let points_from = repository.points_from_of(&ours.key).await?;
    for record in records.iter().filter(|record| record.key != ours.key) {
        let is_old = record.modified < ours.modified.earlier_by(sweep::BACKUP_MAX);
        let theirs = match repository.prune_record(&record.key).await {
            // Nobody knows how far it reaches.
            Err(error) if error.kind() == Kind::Damaged => None,
            read => read?,
        };
        // Of two that reach as far one stays.
        let is_covered = theirs
            .is_some_and(|theirs| theirs.points_from <= points_from && (theirs.reach(record), &record.key) < reach);
        if is_old || (nobody_under_way && is_covered) {
            delete_if_allowed(repository.store(), &record.key).await?;
        }
    }
    Ok(())
}

fn report(
    census: &Census,
    plan: &policy::Plan,
    points_from: Option<Lsn>,
    garbage: &sweep::Garbage,
    bytes_later: u64,
) -> Report {
    let head = |id: BackupId| census.heads.iter().find(|head| head.backup_id == id);
    let judged = plan.verdicts.iter().filter_map(|verdict| {
        let head = head(verdict.id)?;
        Some(Judged {
            id: verdict.id,
            stopped_at: head.stopped_at,
            stored: head.stored,
            reasons: verdict.reasons.iter().map(ToString::to_string).collect(),
        })
    });
    let from = |points_from| census.heads.iter().filter(move |head| head.start_lsn >= points_from);
    let base = points_from.and_then(|points_from| from(points_from).min_by_key(|head| head.start_lsn));
    Report {
        backups: judged.collect(),
        points_from: base.map(|head| head.stop_lsn),
        points_from_time: base.map(|head| head.stopped_at),
        objects: garbage.objects(),
        bytes: garbage.bytes(),
        bytes_later,
        logs: garbage.logs.len() as u64,
        refused: Refused::default(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::Clock;
    use crate::model::{PackId, SystemId};
    use crate::repository::manifest::{BackupHead, Line, LinesWriter, backup_head};
    use crate::repository::{Codec, NewWriter, layout};
    use crate::storage::faulty::Faulty;
    use crate::storage::{Adapter, Body, Store};
    use crate::wal::SegmentSize;

    const PACKS: [PackId; 3] = [PackId([1; 16]), PackId([2; 16]), PackId([3; 16])];

    /// A generation, a backup that was deleted with its pack, and two packs that are nobody's.
    async fn repository() -> (Faulty, Repository, BackupId) {
        let store = Faulty::new(Arc::new(Adapter::memory()));
        let clock = Clock::system();
        let (repository, _) = Repository::init(Arc::new(store.clone()), Codec::default(), &clock).await.expect("made");
        let new = NewWriter {
            writer_id: WriteId([0; 16]),
            system_id: SystemId(1),
            pg_major: 15,
            segment_size: SegmentSize::try_from(16 << 20).expect("16 MB"),
            host: String::new(),
        };
        repository.try_claim(None, None, &new).await.expect("asked").expect("claimed");
        for pack in PACKS {
            store.create(&layout::pack(pack), &Body::from(vec![pack.0[0]; 100])).await.expect("put");
        }
        let head = backup_head(1, 1, 40, 80);
        let head = BackupHead { repository_id: repository.descriptor().repository_id, packs: 1, ..head };
        let mut lines = LinesWriter::new(Codec::default());
        lines.add(&Line::Pack(PACKS[0])).expect("added");
        let (head, body) = head.with(lines).expect("written");
        repository.put_manifest(head.backup_id, &body).await.expect("put");
        repository.put_tombstone(head.backup_id).await.expect("put");
        (store, repository, head.backup_id)
    }

    async fn prune_now(repository: &Repository) -> Report {
        let keep = Keep { last: 1, ..Keep::default() };
        let options = Options { keep, grace: Duration::ZERO, dry_run: false, generation: None };
        prune(repository, &options, &Events::silent()).await.expect("pruned")
    }

    async fn is_there(store: &Faulty, key: &str) -> bool {
        store.read(key, 0..1).await.expect("read").is_some()
    }

    #[tokio::test]
    async fn what_a_lock_keeps_stays_alone_and_goes_once_the_lock_is_gone() {
        let (store, repository, id) = repository().await;
        let (manifest, tombstone) = (layout::manifest(id), layout::tombstone(id));
        store.keep(&[&layout::pack(PACKS[1]), &manifest]);
        let report = prune_now(&repository).await;
        // The tombstone was not even tried: without it the backup would be there again, and its pack is gone.
        assert_eq!((report.objects, report.refused.objects), (2, 3), "{report:?}");
        assert!(report.bytes >= 200 && report.refused.bytes > 100, "{report:?}");
        assert!(report.refused.why.as_ref().is_some_and(|why| why.contains("locked on purpose")), "{report:?}");
        assert!(is_there(&store, &manifest).await && is_there(&store, &tombstone).await);
        assert_eq!(repository.backup_ids().await.expect("listed"), []);
        let gone = [is_there(&store, &layout::pack(PACKS[0])).await, is_there(&store, &layout::pack(PACKS[2])).await];
        assert_eq!(gone, [false, false], "the others go");

        let again = prune_now(&repository).await;
        assert_eq!((again.objects, again.refused.objects), (0, 3), "once each time, not for ever");
        store.keep(&[]);
        let last = prune_now(&repository).await;
        assert_eq!((last.objects, last.refused.clone()), (3, Refused::default()), "{last:?}");
        assert!(!is_there(&store, &manifest).await && !is_there(&store, &tombstone).await);
    }

    #[tokio::test]
    async fn the_record_of_a_prune_that_may_take_more_wal_stays() {
        let (_, repository, _) = repository().await;
        let record = |points_from, at: Timestamp| PruneRecord {
            kind: "perennial/prune".to_owned(),
            format: 1,
            write_id: WriteId(repository.clock().random()),
            generation: Generation(1),
            at,
            points_from,
            deleted: Vec::new(),
            grace_ms: 1000,
        };
        let now = repository.clock().now();
        for (points_from, hours) in [(Lsn(0), 3), (Lsn(1000), 2)] {
            let at = now.earlier_by(Duration::from_secs(3600 * hours));
            repository.put_prune(&record(points_from, at)).await.expect("put").expect("there");
        }
        prune_now(&repository).await;
        let mut left = Vec::new();
        for entry in repository.prunes().await.expect("listed") {
            left.push(repository.points_from_of(&entry.key).await.expect("read"));
        }
        assert_eq!(left, [Lsn(1000), Lsn(0)], "of the others ours takes as much");
        assert_eq!(repository.latest_points_from().await.expect("read"), Lsn(1000));
    }

    #[tokio::test]
    async fn where_nothing_can_be_deleted_a_repository_is_made_and_pruned_all_the_same() {
        let store = Faulty::new(Arc::new(Adapter::memory()));
        store.keep(&[""]);
        let made = Repository::init(Arc::new(store.clone()), Codec::default(), &Clock::system()).await;
        assert!(made.is_ok(), "{made:?}");
        let (store, repository, id) = repository().await;
        store.keep(&[""]);
        let report = prune_now(&repository).await;
        assert_eq!(report.objects, 0, "{report:?}");
        assert!(report.refused.objects >= 4 && is_there(&store, &layout::manifest(id)).await, "{report:?}");
    }
}
