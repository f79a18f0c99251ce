//! WAL summaries of a server that we started: switched on, so that backups read only what has changed, and off again if the
//! summarizer does not get on. PostgreSQL keeps all WAL that is not summarized yet, and a disk must not fill up for the sake
//! of a faster backup.
//!
//! The setting is in `postgresql.auto.conf`, because it may have to change while the server runs. It is ours: the next
//! start and every restore take it out again. Whoever sets it himself, anywhere, is not interfered with.

use std::time::Duration;

use super::Options;
use crate::clock::Clock;
use crate::error::Result;
use crate::events::Events;
use crate::model::{Lsn, human_bytes};
use crate::postgres::summaries::{OURS, Pace, SETTING};
use crate::postgres::{Client, conf, version_of};

/// How often a server is looked at whose WAL cannot be summarized yet, and one whose WAL is.
const LOOK: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// The summarizer is given up when it has read nothing new for this long, though this much WAL is there to be read. Idle
/// it sleeps for half a minute at most.
const STUCK: Duration = Duration::from_secs(180);
const WAITING: u64 = 64 << 20;

/// Before the server starts: what an earlier supervisor has left.
pub(super) fn let_go(options: &Options) -> Result<()> {
    conf::forget(&options.data_dir, SETTING, OURS)
}

/// What a look at the server has come to.
enum Next {
    /// Not yet.
    Wait,
    /// It summarizes its WAL.
    Watch,
    /// Not ours to decide any more.
    Leave,
}

/// For as long as the server runs.
pub(super) async fn watch(options: &Options, (clock, events): (&Clock, &Events)) {
    if !version_of(&options.data_dir).is_ok_and(|version| version.has_wal_summaries) {
        return std::future::pending().await;
    }
    let mut pace = None;
    loop {
        let looked = match &mut pace {
            None => switch_on(options).await,
            Some(pace) => look(options, pace, (clock, events)).await,
        };
        match looked {
            Ok(Next::Wait) => clock.sleep(LOOK).await,
            Ok(Next::Watch) => {
                pace.get_or_insert_with(|| Pace::new(clock.monotonic()));
                clock.sleep(LOOK_AGAIN).await;
            }
            Ok(Next::Leave) => return std::future::pending().await,
            Err(error) if error.is_retryable() => clock.sleep(LOOK).await,
            Err(error) => {
                events.warning(format!("{SETTING} is not looked after, backups may read every page: {error}"));
                return std::future::pending().await;
            }
        }
    }
}

/// Once no WAL of an older timeline is left. The summarizer would begin there, and cannot go on where the last segment of a
/// timeline has never come to this machine (PostgreSQL has cured this in July 2026, "Prevent walsummarizer from getting
/// stuck at a timeline switch"). What is left goes with the checkpoints that follow, a base backup's at the latest.
async fn switch_on(options: &Options) -> Result<Next> {
    const OLDER: &str = "EXISTS (SELECT FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'
                         AND left(name, 8) COLLATE \"C\" < left(pg_walfile_name(pg_current_wal_lsn()), 8))";
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let source = client.text(&format!("SELECT source FROM pg_settings WHERE name = '{SETTING}'")).await?;
    if source != "default" {
        return Ok(Next::Leave);
    }
    if client.text(OLDER).await? == "true" {
        return Ok(Next::Wait);
    }
    client.execute(&format!("ALTER SYSTEM SET {SETTING} = {OURS}")).await?;
    client.execute("SELECT pg_reload_conf()").await?;
    Ok(Next::Watch)
}

/// Switches it off, unless somebody else has set it since, if the summarizer does not get on.
async fn look(options: &Options, pace: &mut Pace, (clock, events): (&Clock, &Events)) -> Result<Next> {
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let ours = format!("EXISTS (SELECT FROM pg_file_settings WHERE name = '{SETTING}' AND setting = '{OURS}')");
    if client.text(&ours).await? != "true" {
        return Ok(Next::Leave);
    }
    let (pending, flushed) = (client.summarizer().await?.pending, client.flushed().await?);
    if !is_stuck(pace, pending, flushed, clock.monotonic()) {
        return Ok(Next::Watch);
    }
    client.execute(&format!("ALTER SYSTEM RESET {SETTING}")).await?;
    client.execute("SELECT pg_reload_conf()").await?;
    events.warning(format!(
        "WAL summaries are switched off: the summarizer has stood at {pending} for {} s, with {} of WAL to read, which \
         PostgreSQL keeps for it. Backups read every page until the next start; the server's log says why",
        STUCK.as_secs(),
        human_bytes(flushed.bytes_since(pending))
    ));
    Ok(Next::Leave)
}

fn is_stuck(pace: &mut Pace, pending: Lsn, flushed: Lsn, now: Duration) -> bool {
    pace.idle(pending, now) > STUCK && flushed.bytes_since(pending) > WAITING
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_summarizer_that_has_work_and_does_none_is_given_up() {
        let minute = Duration::from_secs(60);
        let much = |pending: u64| Lsn(pending + (65 << 20));
        let mut pace = Pace::new(Duration::ZERO);
        assert!(!is_stuck(&mut pace, Lsn(100), much(100), minute), "it has come here");
        assert!(!is_stuck(&mut pace, Lsn(100), Lsn(200), minute * 60), "there is nothing to do");
        assert!(is_stuck(&mut pace, Lsn(100), much(100), minute * 61));
        assert!(!is_stuck(&mut pace, Lsn(101), much(101), minute * 62), "it gets on");
        assert!(!is_stuck(&mut pace, Lsn(101), much(101), minute * 65));
        assert!(is_stuck(&mut pace, Lsn(50), much(50), minute * 66), "it fails and begins anew, again and again");
    }
}
