//! Making commits wait for the repository, and letting them go: as its synchronous standby we are named in
//! `synchronous_standby_names`.
//!
//! Whenever that has to change while the server runs, the name is in `postgresql.auto.conf`, put there by ALTER SYSTEM.
//! The setting is ours: the next start and every restore take it out again.

use std::time::Duration;

use tokio::sync::watch;

use super::{OnBucketLoss, Options, WhenBehind};
use crate::archive::stream::Progress;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events, Level};
use crate::postgres::replication::SLOT;
use crate::postgres::{Client, Install, conf, version_of};
use crate::repository::log::ENTRY_MAX;
use crate::status::Board;

const LOOK: Duration = Duration::from_secs(1);

/// The server is asked only once WAL has waited for this long.
const LONG: Duration = Duration::from_secs(3);

/// WAL that is younger than this when it becomes durable says that the repository keeps up.
const SOON: Duration = Duration::from_secs(1);

/// How often somebody else's change of the setting is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// How long a server may take to heed a new setting, and how often it is looked at meanwhile.
const RELOAD: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

const NAMES: &str = "synchronous_standby_names";

/// Before the server starts: what an earlier supervisor may have left.
pub(super) fn let_go(options: &Options) -> Result<()> {
    conf::forget(&options.data_dir, NAMES, SLOT)
}

/// Whether commits wait for the repository by a setting that can be taken back while the server runs.
pub(super) fn can_degrade(options: &Options) -> bool {
    options.rpo.is_zero() && options.on_bucket_loss == OnBucketLoss::Degrade
}

/// Before a server is started for everybody whose commits wait until we let them go.
pub(super) fn demand(options: &Options) -> Result<()> {
    if !can_degrade(options) {
        return Ok(());
    }
    let major = version_of(&options.data_dir)?.major;
    let install = Install::find(options.pg_bindir.as_deref(), options.search_path.as_deref(), Some(major))?;
    let configured = install.configured(&options.data_dir, &options.postgres_options, NAMES)?;
    if !configured.is_empty() && configured != SLOT {
        return Err(Error::refused(format!(
            "{NAMES} is '{configured}': --on-bucket-loss degrade has to set it itself"
        ))
        .hint(format!("take {NAMES} out of the configuration and of the options for postgres")));
    }
    conf::apply(&options.data_dir, &[(NAMES, Some(SLOT.to_owned()))])
}

/// Whether commits wait for us now.
pub(super) async fn is_set(options: &Options) -> Result<bool> {
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    Ok(waits_for_us(&client.text(&format!("current_setting('{NAMES}')")).await?))
}

/// Makes the commits of a running server wait for us, or not any more, and sees to it that the server has understood.
pub(super) async fn set(options: &Options, wait: bool, clock: &Clock) -> Result<()> {
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let setting = format!("current_setting('{NAMES}')");
    let now = client.text(&setting).await?;
    if waits_for_us(&now) == wait {
        return Ok(());
    }
    let ours = now.trim().trim_matches('"') == SLOT;
    if !now.trim().is_empty() && !ours {
        return match wait {
            true => Err(Error::refused(format!("{NAMES} is '{now}': with it commits do not wait for the repository"))
                .hint(format!(
                    "take the setting out, or make it name {SLOT} alone or among those that must all answer"
                ))),
            // Not ours to change.
            false => Ok(()),
        };
    }
    let change = if wait { format!("SET {NAMES} = {SLOT}") } else { format!("RESET {NAMES}") };
    client.execute(&format!("ALTER SYSTEM {change}")).await?;
    client.execute("SELECT pg_reload_conf()").await?;
    let deadline = clock.monotonic() + RELOAD;
    while waits_for_us(&client.text(&setting).await?) != wait {
        if clock.monotonic() > deadline {
            return Err(Error::refused(format!(
                "{NAMES} does not change: the server's command line or postgresql.conf sets it"
            ))
            .hint("take the setting out there: it has to change while the server runs"));
        }
        clock.sleep(SHORT).await;
    }
    Ok(())
}

/// Waits until the server counts on us for its commits.
pub(super) async fn confirmed(options: &Options, clock: &Clock) -> Result<()> {
    const STATE: &str = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'perennial' AND sync_state IN ('sync', 'quorum')";
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let deadline = clock.monotonic() + RELOAD;
    while client.text(STATE).await? == "0" {
        if clock.monotonic() > deadline {
            return Err(Error::postgres(
                "the server does not take us for a synchronous standby, so commits do not wait",
            )
            .retryable());
        }
        clock.sleep(SHORT).await;
    }
    Ok(())
}

/// Whether with this setting no commit returns before we have it (manual section 20.6.2): we are among the first of
/// which so many must answer, or all must.
fn waits_for_us(setting: &str) -> bool {
    let setting = setting.trim();
    let (any, rest) = match setting.split_at_checked(4) {
        Some((word, rest)) if word.trim_end().eq_ignore_ascii_case("any") => (true, rest),
        _ => (false, setting.strip_prefix("FIRST").or(setting.strip_prefix("first")).unwrap_or(setting)),
    };
    let (count, names) = match rest.trim().strip_suffix(')').and_then(|rest| rest.split_once('(')) {
        Some((count, names)) => (count.trim().parse::<usize>().unwrap_or(0), names),
        None => (1, rest),
    };
    let names: Vec<&str> = names.split(',').map(|name| name.trim().trim_matches('"')).collect();
    let at = names.iter().position(|name| *name == SLOT);
    at.is_some_and(|at| if any { count >= names.len() } else { at < count })
}

/// Holds commits back and lets them go, for as long as the server runs.
pub(super) async fn watch(
    options: &Options,
    progress: watch::Receiver<Progress>,
    board: &Board,
    (clock, events): (&Clock, &Events),
) {
    let bound = options.max_wal_behind.filter(|_| options.when_behind == WhenBehind::Block);
    let (mut changed, mut looked_at) = (false, clock.monotonic());
    loop {
        clock.sleep(LOOK).await;
        let Progress { durable, server, waiting_since, connected, .. } = *progress.borrow();
        let waited = waiting_since.map_or(Duration::ZERO, |since| clock.monotonic().saturating_sub(since));
        let looked = match bound {
            _ if can_degrade(options) => {
                let keeps_up = connected && waited <= SOON && server.bytes_since(durable) < ENTRY_MAX as u64;
                degrade(options, waited, keeps_up, (clock, events), &mut changed).await
            }
            _ if options.rpo.is_zero() => still_waits(options, clock, events, &mut looked_at).await,
            Some(most) => hold(options, most.0, (waited, durable), (clock, events), &mut changed).await,
            None => return std::future::pending().await,
        };
        board.degraded(changed && can_degrade(options));
        if let Err(error) = looked {
            events.warning(format!("whether commits are to wait for the repository could not be settled: {error}"));
        }
    }
}

/// Past the bound of an RPO above zero commits wait too.
async fn hold(
    options: &Options,
    most: u64,
    (waited, durable): (Duration, crate::model::Lsn),
    (clock, events): (&Clock, &Events),
    held: &mut bool,
) -> Result<()> {
    if waited <= LONG && !*held {
        return Ok(());
    }
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let behind = client.flushed().await?.bytes_since(durable);
    // Let go well below the bound, or it would be on and off.
    let hold = if *held { behind > most / 2 } else { behind > most };
    if hold != *held {
        set(options, hold, clock).await?;
        *held = hold;
        events.emit(Event::HeldBack { behind, held: hold });
    }
    Ok(())
}

/// At an RPO of zero commits do not wait any more once one has waited for too long, until the repository has what there
/// is and keeps up again.
async fn degrade(
    options: &Options,
    waited: Duration,
    keeps_up: bool,
    (clock, events): (&Clock, &Events),
    degraded: &mut bool,
) -> Result<()> {
    let degrade = if *degraded { !keeps_up } else { waited > options.bucket_loss_after };
    if degrade != *degraded {
        set(options, !degrade, clock).await?;
        *degraded = degrade;
        events.emit(Event::Degraded { waited, degraded: degrade });
    }
    Ok(())
}

/// Looks now and again whether somebody has changed what makes commits wait.
async fn still_waits(options: &Options, clock: &Clock, events: &Events, looked_at: &mut Duration) -> Result<()> {
    if clock.monotonic().saturating_sub(*looked_at) < LOOK_AGAIN {
        return Ok(());
    }
    *looked_at = clock.monotonic();
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let now = client.text(&format!("current_setting('{NAMES}')")).await?;
    if !waits_for_us(&now) {
        let text =
            format!("{NAMES} was changed to '{now}': commits do not wait for the repository, --rpo 0 does not hold");
        events.emit(Event::Note { level: Level::Alarm, text });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::waits_for_us;

    #[test]
    fn commits_wait_for_us_only_if_nobody_else_can_answer_instead() {
        for yes in [
            "perennial",
            "\"perennial\"",
            "perennial, s2",
            "FIRST 1 (perennial)",
            "1 (perennial, s2)",
            "FIRST 2 (s2, perennial)",
            "ANY 2 (perennial, s2)",
            "first 1 (perennial,s2)",
        ] {
            assert!(waits_for_us(yes), "{yes}");
        }
        for no in [
            "",
            "*",
            "s2",
            "s2, perennial",
            "perennial_dr",
            "FIRST 1 (s2, perennial)",
            "ANY 1 (perennial, s2)",
            "any 1 (s2, perennial)",
        ] {
            assert!(!waits_for_us(no), "{no}");
        }
    }
}
