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
use crate::events::{Event, Events};
use crate::postgres::replication::SLOT;
use crate::postgres::{Client, Install, conf, version_of};
use crate::status::Board;

const LOOK: Duration = Duration::from_secs(1);

/// The server is asked only once WAL has waited for this long.
const LONG: Duration = Duration::from_secs(3);

/// WAL that is younger than this when it becomes durable says that the repository keeps up.
const SOON: Duration = Duration::from_secs(1);

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

/// Makes the commits of a running server wait for us, or not any more. A setting of somebody else's stays.
pub(super) async fn set(options: &Options, wait: bool) -> Result<()> {
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let now = client.text(&format!("current_setting('{NAMES}')")).await?;
    if now.contains(SLOT) == wait {
        return Ok(());
    }
    if !now.is_empty() && now != SLOT {
        return Err(Error::refused(format!("{NAMES} is '{now}': commits cannot be made to wait for the repository"))
            .hint(format!("name {SLOT} in {NAMES} yourself, or take the setting out")));
    }
    let change = if wait { format!("SET {NAMES} = {SLOT}") } else { format!("RESET {NAMES}") };
    client.execute(&format!("ALTER SYSTEM {change}")).await?;
    client.execute("SELECT pg_reload_conf()").await
}

/// Holds commits back and lets them go, for as long as the server runs.
pub(super) async fn watch(
    options: &Options,
    progress: watch::Receiver<Progress>,
    board: &Board,
    (clock, events): (&Clock, &Events),
) {
    let bound = options.max_wal_behind.filter(|_| options.when_behind == WhenBehind::Block);
    let mut changed = false;
    loop {
        clock.sleep(LOOK).await;
        let Progress { durable, waiting_since, connected, .. } = *progress.borrow();
        let waited = waiting_since.map_or(Duration::ZERO, |since| clock.monotonic().saturating_sub(since));
        let looked = match bound {
            _ if can_degrade(options) => degrade(options, waited, connected, events, &mut changed).await,
            Some(most) if !options.rpo.is_zero() => {
                hold(options, most.0, (waited, durable), events, &mut changed).await
            }
            _ => return std::future::pending().await,
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
    events: &Events,
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
        set(options, hold).await?;
        *held = hold;
        events.emit(Event::HeldBack { behind, held: hold });
    }
    Ok(())
}

/// At an RPO of zero commits do not wait any more once one has waited for too long, until the repository keeps up again.
async fn degrade(
    options: &Options,
    waited: Duration,
    connected: bool,
    events: &Events,
    degraded: &mut bool,
) -> Result<()> {
    let degrade = if *degraded { waited > SOON || !connected } else { waited > options.bucket_loss_after };
    if degrade != *degraded {
        set(options, !degrade).await?;
        *degraded = degrade;
        events.emit(Event::Degraded { waited, degraded: degrade });
    }
    Ok(())
}
