//! When the next base backup is due. Pure but for the loop.

use std::time::Duration;

use crate::archive::push::Pusher;
use crate::backup;
use crate::error::Result;
use crate::events::{Event, Events};
use crate::model::Timestamp;
use crate::restore::Reachable;

use super::Options;

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

/// Takes backups for as long as the server runs.
pub(super) async fn backups(options: &Options, pusher: &Pusher, events: &Events) {
    let clock = pusher.repository.clock();
    let mut retry = FIRST_RETRY;
    loop {
        let outcome = next(options, pusher, events).await;
        match outcome {
            Ok(()) => retry = FIRST_RETRY,
            Err(error) => {
                events.emit(Event::BackupFailed { error: error.to_string(), next_try: retry });
                clock.sleep(retry).await;
                retry = (retry * 2).min(LONGEST_RETRY);
            }
        }
    }
}

async fn next(options: &Options, pusher: &Pusher, events: &Events) -> Result<()> {
    let repository = &pusher.repository;
    let last = last_backup(pusher).await?;
    repository.clock().sleep(until_due(last, repository.clock().now(), options.backup_every)).await;
    let backup = backup::Options {
        data_dir: options.data_dir.clone(),
        connect: options.connect.clone(),
        generation: pusher.writer.claim.generation,
        // The first one protects: it must not wait for a checkpoint spread over minutes.
        fast: last.is_none(),
        fail_on_damage: false,
        wal_timeout: Duration::from_secs(3600),
    };
    backup::run(repository, &backup, events).await.map(drop)
}

/// When the newest backup that leads to this generation ended.
async fn last_backup(pusher: &Pusher) -> Result<Option<Timestamp>> {
    let found = Reachable::find(&pusher.repository, Some(pusher.writer.claim.generation), None).await?;
    let Some(reachable) = found else { return Ok(None) };
    let newest = reachable.view()?.usable(&reachable.backups).last().map(|(head, _)| head.stopped_at);
    Ok(newest)
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
}
