//! What is done by schedule while a server runs: base backups, with pruning after them, drills, verifications, copies.

use std::time::Duration;

use tokio::sync::watch;

use crate::archive::push::Pusher;
use crate::backup;
use crate::drill;
use crate::error::{Kind, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, Timestamp};
use crate::repository::Writer;
use crate::restore::{self, Reachable, Target};
use crate::retention;
use crate::status::Board;

use super::Options;

/// Between two copies, whatever is asked for.
const LEAST_PAUSE: Duration = Duration::from_millis(100);

const FIRST_RETRY: Duration = Duration::from_secs(15);
const LONGEST_RETRY: Duration = Duration::from_secs(600);

/// How long until a backup is due: at once without one, otherwise a period after the last.
pub fn until_due(last: Option<Timestamp>, now: Timestamp, every: Duration) -> Duration {
    match last {
        None => Duration::ZERO,
        Some(last) => {
            let age = Duration::from_secs_f64(now.seconds_since(last).max(0.0));
            every.saturating_sub(age)
        }
    }
}

/// Whether the next backup is to store everything anew: when the last one that did began so long ago, or nobody knows when.
/// Never by a period of zero.
pub fn is_full_due(last_full: Option<Timestamp>, now: Timestamp, every: Duration) -> bool {
    !every.is_zero() && until_due(last_full, now, every).is_zero()
}

/// Takes backups for as long as the server runs; ends only when another machine has taken over. `at_once`: the history
/// begins anew here, whatever backups there are of what came before.
async fn backups(
    options: &Options,
    pusher: &Pusher,
    mut at_once: bool,
    (events, board): (&Events, &Board),
) -> Result<()> {
    let clock = pusher.repository.clock();
    let mut retry = FIRST_RETRY;
    loop {
        match next(options, pusher, at_once, events).await {
            Ok(id) => {
                (at_once, retry) = (false, FIRST_RETRY);
                if let Some(id) = id {
                    board.backup(id.to_string());
                }
                prune(options, pusher, events).await?;
            }
            Err(error) if error.kind() == Kind::Fenced => return Err(error),
            Err(error) => {
                events.emit(Event::BackupFailed { error: error.to_string(), next_try: retry });
                clock.sleep(retry).await;
                retry = (retry * 2).min(LONGEST_RETRY);
            }
        }
    }
}

/// After a backup those that are too old by now go. What fails is done by the next one.
async fn prune(options: &Options, pusher: &Pusher, events: &Events) -> Result<()> {
    if options.keep.is_empty() {
        return Ok(());
    }
    let rules = retention::Options {
        keep: options.keep.clone(),
        grace: options.prune_grace,
        dry_run: false,
        generation: Some(pusher.writer.claim.generation),
    };
    match retention::prune(&pusher.repository, &rules, events).await {
        Err(error) if error.kind() == Kind::Fenced => Err(error),
        Err(error) => {
            events.warning(format!("old backups could not be deleted: {error}"));
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Base backups under the generation that is written now: after a gap the history begins anew, with a backup at once.
pub(super) async fn follow(
    options: &Options,
    pusher: &Pusher,
    mut writer: watch::Receiver<Writer>,
    mut begins_anew: bool,
    (events, board): (&Events, &Board),
) -> Result<()> {
    loop {
        let pusher = Pusher { writer: writer.borrow_and_update().clone(), ..pusher.clone() };
        board.generation(pusher.writer.claim.generation);
        tokio::select! {
            ended = backups(options, &pusher, begins_anew, (events, board)) => return ended,
            () = drills(options, &pusher, events) => (),
            () = copies(options, &pusher, events) => (),
            () = verifications(options, &pusher, events) => (),
            changed = writer.changed() => {
                if changed.is_err() {
                    return std::future::pending().await;
                }
                begins_anew = true;
            }
        }
    }
}

/// Keeps a second place current for as long as the server runs. What fails is made up for by the next copy.
async fn copies(options: &Options, pusher: &Pusher, events: &Events) {
    let Some(also) = &options.also else { return std::future::pending().await };
    let clock = pusher.repository.clock();
    loop {
        let copied = async { (also.open)()?.run(clock, events).await };
        match copied.await {
            Ok(report) if report.objects > 0 => events.info(format!("copied: {} objects", report.objects)),
            Ok(_) => (),
            Err(error) => events.alarm(format!("the second place is not current: {error}")),
        }
        clock.sleep(also.every.max(LEAST_PAUSE)).await;
    }
}

/// Drills for as long as the server runs. How one goes is told as it ends; one that could not be held is told too.
async fn drills(options: &Options, pusher: &Pusher, events: &Events) {
    let Some(drills) = &options.drill else { return std::future::pending().await };
    let repository = &pusher.repository;
    let wanted = drill::Options {
        directory: drills.directory.clone(),
        target: Target::Newest,
        amcheck: true,
        assertions: drills.checks.clone(),
        database: None,
        user: options.connect.user.clone(),
        preload: false,
        keep: false,
        pg_bindir: options.pg_bindir.clone(),
        search_path: options.search_path.clone(),
        fetch_command: options.fetch_command.clone(),
    };
    loop {
        let held = async {
            let last = repository.last_drill().await?.map(|record| record.at);
            repository.clock().sleep(until_due(last, repository.clock().now(), drills.every)).await;
            first_backup(pusher).await?;
            drill::run(repository, &wanted, events).await
        };
        if let Err(error) = held.await {
            events.warning(format!("no drill could be held: {error}"));
            repository.clock().sleep(LONGEST_RETRY).await;
        }
    }
}

/// Verifies the repository for as long as the server runs, a part of it each time. What could not be looked at is tried again.
async fn verifications(options: &Options, pusher: &Pusher, events: &Events) {
    let Some(verify) = options.verify else { return std::future::pending().await };
    let (repository, clock) = (&pusher.repository, pusher.repository.clock());
    loop {
        let looked = async {
            let last = repository.last_verification().await?.map(|record| record.at);
            clock.sleep(until_due(last, clock.now(), verify.every)).await;
            first_backup(pusher).await?;
            restore::verify_next(repository, verify.share, events).await
        };
        if let Err(error) = looked.await {
            events.warning(format!("the repository could not be verified: {error}"));
            clock.sleep(LONGEST_RETRY).await;
        }
    }
}

/// Waits for the first backup: before it there is nothing to prove.
async fn first_backup(pusher: &Pusher) -> Result<()> {
    while last_backup(pusher).await?.ended.is_none() {
        pusher.repository.clock().sleep(FIRST_RETRY).await;
    }
    Ok(())
}

/// Takes the next backup when it is due; `None` when one was taken elsewhere meanwhile, of a standby.
async fn next(options: &Options, pusher: &Pusher, at_once: bool, events: &Events) -> Result<Option<BackupId>> {
    let repository = &pusher.repository;
    let clock = repository.clock();
    let mut last = last_backup(pusher).await?;
    let wait = |last: &Last| until_due(last.ended.filter(|_| !at_once), clock.now(), options.backup_every);
    let first = wait(&last);
    if !first.is_zero() {
        clock.sleep(first).await;
        let before = std::mem::replace(&mut last, last_backup(pusher).await?);
        // By another's clock it may be due never: what was waited for is taken.
        if last.ended != before.ended && !wait(&last).is_zero() {
            return Ok(None);
        }
    }
    let backup = backup::Options {
        data_dir: options.data_dir.clone(),
        connect: options.connect.clone(),
        generation: pusher.writer.claim.generation,
        // The first one protects: it must not wait for a checkpoint spread over minutes.
        fast: at_once || last.ended.is_none(),
        of_standby: false,
        fail_on_damage: false,
        full: is_full_due(last.full, clock.now(), options.full_every),
        max_rate: options.max_rate,
        wal_timeout: Duration::from_secs(3600),
        beside: options.beside.clone(),
    };
    backup::run(repository, &backup, events).await.map(|done| Some(done.head.backup_id))
}

/// What the repository says of the backups up to now.
#[derive(Debug, Default)]
struct Last {
    /// When the newest ended from which everything up to now can be reached.
    ended: Option<Timestamp>,
    /// When the last full one began that the newest builds on.
    full: Option<Timestamp>,
}

async fn last_backup(pusher: &Pusher) -> Result<Last> {
    let found = Reachable::find(&pusher.repository, Some(pusher.writer.claim.generation), None).await?;
    let Some(reachable) = found else { return Ok(Last::default()) };
    let usable = reachable.view()?.usable(&reachable.backups);
    let whole = usable.iter().rev().find(|(_, coverage)| !coverage.gap);
    Ok(Last { ended: whole.map(|(head, _)| head.stopped_at), full: usable.last().and_then(|(head, _)| head.full_at) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_due_at_once_without_one_and_a_period_after_the_last() {
        let at = |seconds: i64| Timestamp::from_unix_micros(seconds * 1_000_000);
        let day = Duration::from_secs(86_400);
        assert_eq!(until_due(None, at(0), day), Duration::ZERO);
        assert_eq!(until_due(Some(at(0)), at(3600), day), Duration::from_secs(86_400 - 3600));
        assert_eq!(until_due(Some(at(0)), at(90_000), day), Duration::ZERO);
        assert_eq!(until_due(Some(at(500)), at(0), day), day, "a clock that was put back");
    }

    #[test]
    fn a_backup_is_a_full_one_once_the_last_full_one_is_old_enough() {
        let at = |days: i64| Timestamp::from_unix_micros(days * 86_400 * 1_000_000);
        let days = |days: u64| Duration::from_secs(days * 86_400);
        assert!(!is_full_due(Some(at(1)), at(30), days(30)));
        assert!(is_full_due(Some(at(1)), at(31), days(30)));
        assert!(is_full_due(None, at(31), days(30)), "nobody has noted when the last one was");
        assert!(!is_full_due(None, at(31), Duration::ZERO) && !is_full_due(Some(at(1)), at(31), Duration::ZERO));
    }
}
