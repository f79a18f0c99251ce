//! What can go, and letting it go.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};

use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, Generation, PackId, Timestamp};
use crate::repository::manifest::{BackupHead, BackupObjects};
use crate::repository::{Repository, WalListing, layout};
use crate::storage::{Deleted, Entry};
use crate::wal::{SegmentName, WalFileName};

use super::census::Census;
use super::needs::Needs;
use super::policy::{Plan, age_of_left_behind};
use super::{Keep, Options};

/// Looks made at once, and objects deleted between two looks whether we are still the newest generation.
const PARALLEL: usize = 16;
const BATCH: usize = 500;

/// A backup that began this long ago and has not ended is taken for dead; and whoever holds on to an answer for longer than
/// this, a prune or a backup whose machine was frozen, is not reckoned with.
pub const BACKUP_MAX: Duration = Duration::from_secs(7 * 86_400);

/// What nobody needs any more.
#[derive(Debug, Default)]
pub struct Garbage {
    pub wal: Vec<Entry>,
    /// Generations whose log is needed no more.
    pub logs: Vec<Generation>,
    pub packs: Vec<Entry>,
    /// Of deleted backups whose grace is over, and of backups that died: in the order in which they must go.
    pub of_backups: Vec<Entry>,
    /// No backup was under way when packs were looked at, after our record was there: whoever begins one later sees it.
    pub nobody_under_way: bool,
}

impl Garbage {
    pub fn bytes(&self) -> u64 {
        [&self.wal, &self.packs, &self.of_backups].into_iter().flatten().map(|entry| entry.size).sum()
    }

    pub fn objects(&self) -> u64 {
        (self.wal.len() + self.packs.len() + self.of_backups.len()) as u64
    }
}

/// Which backups' objects go: with this prune, and once the grace of all that is deleted is over.
pub struct Over {
    pub now: BTreeSet<BackupId>,
    pub later: BTreeSet<BackupId>,
}

/// Finds what can go, and how many bytes more can once the grace is over. `now` is the store's clock.
pub async fn find(
    repository: &Repository,
    census: &Census,
    plan: &Plan,
    options: &Options,
    now: Timestamp,
    over: &Over,
) -> Result<(Garbage, u64)> {
    let stays = |gone: &BTreeSet<BackupId>| -> Vec<&BackupHead> {
        census.heads.iter().filter(|head| !gone.contains(&head.backup_id)).collect()
    };
    let needs_now = needs(census, plan, &stays(&over.now), now)?;
    let mut garbage = Garbage { wal: wal(census, plan, &needs_now, &options.keep, now)?, ..Garbage::default() };
    if plan.points_from.is_some() {
        garbage.logs = logs(repository, census, &needs_now, &options.keep, now).await?;
    }
    for (id, of) in &census.objects {
        if over.now.contains(id) {
            garbage.of_backups.extend(in_order(of));
        } else if of.manifest.is_none() && !is_under_way(census, *id, of, now) {
            // Its tombstone outlives it: a manifest that is put late must not bring it back.
            let old = now.earlier_by(BACKUP_MAX);
            let tombstone = of.tombstone.clone().filter(|tombstone| tombstone.modified < old);
            garbage.of_backups.extend(in_order(&BackupObjects { tombstone, ..of.clone() }));
        }
    }
    let sizes = |entries: &[Entry]| entries.iter().map(|entry| entry.size).sum::<u64>();
    let packs = packs(repository, census, over, now, now.earlier_by(options.grace)).await?;
    let wal_later = wal(census, plan, &needs(census, plan, &stays(&over.later), now)?, &options.keep, now)?;
    let of_later = census.objects.iter().filter(|(id, _)| over.later.contains(id) && !over.now.contains(id));
    let of_later: u64 = of_later.map(|(_, of)| sizes(&in_order(of))).sum();
    let later = of_later + packs.later + sizes(&wal_later).saturating_sub(sizes(&garbage.wal));
    garbage.packs = packs.now;
    garbage.nobody_under_way = packs.nobody_under_way;
    Ok((garbage, later))
}

/// A tombstone goes last: while anything of a backup is there, it must not come back.
fn in_order(of: &BackupObjects) -> Vec<Entry> {
    let rest = of.pins.iter().chain(&of.begun).chain(&of.beside).chain(&of.manifest).chain(&of.tombstone);
    rest.cloned().collect()
}

fn is_under_way(census: &Census, id: BackupId, of: &BackupObjects, now: Timestamp) -> bool {
    let begun = of.begun.as_ref().filter(|_| of.manifest.is_none() && of.tombstone.is_none());
    id.generation >= census.newest && begun.is_some_and(|begun| begun.modified >= now.earlier_by(BACKUP_MAX))
}

/// Backups that have begun and will not end: those of a machine that was replaced, and very old ones.
pub fn dead(census: &Census, now: Timestamp) -> Vec<BackupId> {
    let dead = |(id, of): &(&BackupId, &BackupObjects)| {
        of.manifest.is_none() && of.tombstone.is_none() && of.begun.is_some() && !is_under_way(census, **id, of, now)
    };
    census.objects.iter().filter(dead).map(|(id, _)| *id).collect()
}

fn needs(census: &Census, plan: &Plan, needed: &[&BackupHead], now: Timestamp) -> Result<Needs> {
    let mut needs = Needs::default();
    let Some(main) = &census.main else { return Ok(needs) };
    let view = main.view()?;
    if let Some(from) = plan.points_from {
        needs.add_all_since(&view, from);
    }
    let known: BTreeSet<BackupId> = census.heads.iter().map(|head| head.backup_id).collect();
    // Listed after our record was there. One of a standby begins at that one's last restart point, which may lie before the
    // last backup's start.
    for (id, of) in &census.objects {
        let has_ended_since = of.manifest.is_some() && !known.contains(id);
        if has_ended_since || is_under_way(census, *id, of, now) {
            needs.add_all_since(&view, id.start);
        }
    }
    for head in needed {
        let goes = !plan.verdicts.iter().any(|verdict| verdict.id == head.backup_id && verdict.stays());
        match (census.main_coverage(head), census.left_behind.get(&head.backup_id)) {
            // A restore from it may be under way, to any point.
            (Some(_), _) if goes => needs.add_all_since(&view, head.start_lsn),
            (Some(_), _) => needs.add_backup(&view, head),
            (None, Some(branch)) => needs.add_all_since(&branch.view()?, head.start_lsn),
            (None, None) => (),
        }
    }
    Ok(needs)
}

/// Segments nobody needs. What lies on no way to the newest state goes by age alone.
fn wal(census: &Census, plan: &Plan, needs: &Needs, keep: &Keep, now: Timestamp) -> Result<Vec<Entry>> {
    // Without a backup on the way nobody can say what its WAL is needed for: by the first one, perhaps, that is under way.
    let (Some(main), Some(_)) = (&census.main, plan.points_from) else { return Ok(Vec::new()) };
    let view = main.view()?;
    let size = view.segment_size();
    let old = now.earlier_by(age_of_left_behind(keep));
    let mut garbage = Vec::new();
    for listing in &census.listed {
        for entry in &listing.entries {
            let segment = match layout::parse_wal_file(&entry.key) {
                Some((_, WalFileName::Segment(name) | WalFileName::Partial(name) | WalFileName::Backup(name, _))) => {
                    name
                }
                Some((_, WalFileName::History(_))) | None => continue,
            };
            let Some(number) = segment.number(size) else { continue };
            let on_the_way = view.lineage.contains(listing.generation) && view.is_on_the_way(segment.timeline, number);
            let needed = needs.has(listing.generation, segment.timeline, number);
            let is_old =
                || -> Result<bool> { Ok(entry.modified <= old && census.left_at(segment.timeline)?.at <= old) };
            if !needed && (on_the_way || is_old()?) {
                garbage.push(entry.clone());
            }
        }
    }
    Ok(garbage)
}

/// Logs of replaced writers that hold nothing needed that is not stored as whole segments too.
async fn logs(
    repository: &Repository,
    census: &Census,
    needs: &Needs,
    keep: &Keep,
    now: Timestamp,
) -> Result<Vec<Generation>> {
    let Some(main) = &census.main else { return Ok(Vec::new()) };
    let view = main.view()?;
    let size = view.segment_size();
    let old = now.earlier_by(age_of_left_behind(keep));
    let mut garbage = Vec::new();
    for WalListing { generation, run, entries, .. } in &census.listed {
        let Some(run) = run.filter(|_| *generation != census.newest) else { continue };
        let stored: HashSet<WalFileName> =
            entries.iter().filter_map(|entry| layout::parse_wal_file(&entry.key)).map(|(_, name)| name).collect();
        let has_more = |number: u64| {
            needs.has(*generation, run.timeline, number)
                && !stored.contains(&WalFileName::Segment(SegmentName::new(run.timeline, number, size)))
        };
        let mut numbers = size.number_at(run.start)..=size.number_before(run.end);
        let on_the_way = view.lineage.contains(*generation)
            && numbers.clone().all(|number| view.is_on_the_way(run.timeline, number));
        if numbers.any(has_more) {
            continue;
        }
        let is_old = || async {
            let written = repository.log_written_at(*generation).await?;
            Ok::<_, Error>(written.is_none_or(|written| written <= old) && census.left_at(run.timeline)?.at <= old)
        };
        if on_the_way || is_old().await? {
            garbage.push(*generation);
        }
    }
    Ok(garbage)
}

struct DeadPacks {
    now: Vec<Entry>,
    /// Bytes of those that will be dead once the grace is over.
    later: u64,
    nobody_under_way: bool,
}

/// Since when the packs were put that backups under way may name, if there are such backups.
async fn named_under_way(
    repository: &Repository,
    census: &Census,
    objects: &BTreeMap<BackupId, BackupObjects>,
    now: Timestamp,
) -> Result<Option<Timestamp>> {
    let under_way = objects.iter().filter(|(id, of)| is_under_way(census, **id, of, now));
    let mut first = None;
    for begun in under_way.filter_map(|(_, of)| of.begun.as_ref()) {
        let since = repository.packs_since(begun).await.map_err(|e| {
            e.hint("nothing is deleted while nobody knows what a backup under way needs: delete that object by hand once the backup has ended")
        })?;
        // One that has ended meanwhile may have named anything.
        let since = since.unwrap_or(Timestamp::from_unix_micros(i64::MIN));
        first = Some(first.map_or(since, |first: Timestamp| first.min(since)));
    }
    Ok(first)
}

/// Packs that no backup names, and none under way can come to name.
async fn packs(
    repository: &Repository,
    census: &Census,
    over: &Over,
    now: Timestamp,
    grace_over: Timestamp,
) -> Result<DeadPacks> {
    let listed: Vec<(PackId, Entry)> = repository.packs().try_collect().await?;
    // Anew, and after the packs: a backup that has ended meanwhile speaks for its own by its manifest. And after our record:
    // a backup that is not here yet will see that, and names nothing of what we may delete.
    let objects = repository.backup_objects().await?;
    let under_way = named_under_way(repository, census, &objects, now).await?;
    let may_be_named =
        |entry: &Entry| entry.modified > grace_over || under_way.is_some_and(|since| entry.modified >= since);
    let (mut marked, mut marked_later): (BTreeSet<PackId>, BTreeSet<PackId>) = Default::default();
    let needed = objects.iter().filter(|(id, of)| of.manifest.is_some() && !over.now.contains(id));
    let reads = needed.map(|(id, of)| async move {
        let mut packs = repository.packs_of(*id).await?;
        for snapshot in &of.beside {
            let named = repository.packs_of_beside(&snapshot.key).await;
            packs.extend(named.map_err(|e| {
                e.hint(
                    "nothing is deleted while a snapshot cannot be read: bring it back, or delete that object by hand",
                )
            })?);
        }
        Ok::<_, Error>((*id, packs))
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(PARALLEL);
    while let Some((id, packs)) = reads.try_next().await? {
        if !over.later.contains(&id) {
            marked_later.extend(&packs);
        }
        marked.extend(packs);
    }
    let mut dead = DeadPacks { now: Vec::new(), later: 0, nobody_under_way: under_way.is_none() };
    for (pack, entry) in listed {
        match (marked.contains(&pack), marked_later.contains(&pack)) {
            (false, _) if !may_be_named(&entry) => dead.now.push(entry),
            (true, false) => dead.later += entry.size,
            _ => (),
        }
    }
    Ok(dead)
}

/// Deletes it, as far as the store lets it go. Whatever interrupts this, nothing needed is missing, and the next prune goes on.
/// Entries of logs are not counted but where they are refused: they repeat what segments have, or nobody needs.
pub async fn delete(repository: &Repository, census: &Census, garbage: &Garbage) -> Result<Deleted> {
    let store = repository.store();
    for generation in &garbage.logs {
        still_newest(repository, census.newest).await?;
        repository.pass_whole_log(*generation).await?;
    }
    let mut of_logs = Deleted::default();
    for (generation, entries) in passed(repository, census).await? {
        in_batches(repository, census, &entries, &mut of_logs).await?;
        repository.forget_bounds(generation, repository.log_bound_number(generation).await?).await?;
    }
    let mut deleted = Deleted { refused: of_logs.refused, ..Deleted::default() };
    for entries in [&garbage.wal, &garbage.packs] {
        in_batches(repository, census, entries, &mut deleted).await?;
    }
    still_newest(repository, census.newest).await?;
    let mut kept = BTreeSet::new();
    for entry in &garbage.of_backups {
        let backup = layout::parse_backup(&entry.key).map(|(id, _)| id);
        // What comes after it must not go before it: the tombstone is the last.
        if kept.contains(&backup) {
            deleted.keep(entry.size);
        } else if !deleted.one(store, &entry.key, entry.size).await? {
            kept.insert(backup);
        }
    }
    Ok(deleted)
}

async fn in_batches(repository: &Repository, census: &Census, entries: &[Entry], deleted: &mut Deleted) -> Result<()> {
    for batch in entries.chunks(BATCH) {
        still_newest(repository, census.newest).await?;
        deleted.all(repository.store(), batch.iter().map(|entry| (entry.key.clone(), entry.size))).await?;
    }
    Ok(())
}

/// What the bounds of replaced writers' logs have passed and is there still. The newest writer lets its own go.
async fn passed(repository: &Repository, census: &Census) -> Result<Vec<(Generation, Vec<Entry>)>> {
    let older =
        census.listed.iter().map(|listing| listing.generation).filter(|generation| *generation != census.newest);
    let looks: Vec<_> = older
        .map(|generation| async move { Ok::<_, Error>((generation, repository.passed_entries(generation).await?)) })
        .collect();
    let passed: Vec<_> = futures::stream::iter(looks).buffered(PARALLEL).try_collect().await?;
    Ok(passed.into_iter().filter(|(_, entries)| !entries.is_empty()).collect())
}

/// Only the newest generation deletes: another one may have decided otherwise since.
pub async fn still_newest(repository: &Repository, newest: Generation) -> Result<()> {
    match repository.newest_generation().await? {
        Some(found) if found == newest => Ok(()),
        found => Err(Error::new(
            Kind::Fenced,
            format!(
                "generation {} was claimed while generation {newest} was deleting: nothing more is deleted",
                found.map_or_else(String::new, |found| found.to_string())
            ),
        )
        .hint("prune again: what is left over is found by the next one")),
    }
}
