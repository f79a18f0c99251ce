//! A bound on the WAL that waits on the local disk: past it, commits wait too (`--when-behind block`).
//!
//! We become the server's synchronous standby for as long as it takes, by ALTER SYSTEM. The setting is ours: the next
//! start and every restore take it out of `postgresql.auto.conf` again.

use std::time::Duration;

use tokio::sync::watch;

use super::{Options, WhenBehind};
use crate::archive::stream::Progress;
use crate::clock::Clock;
use crate::error::Result;
use crate::events::{Event, Events};
use crate::postgres::replication::SLOT;
use crate::postgres::{Client, conf};

const LOOK: Duration = Duration::from_secs(1);

/// The server is asked only once WAL has waited for this long.
const LONG: Duration = Duration::from_secs(3);

/// Before the server starts: what an earlier supervisor may have left.
pub(super) fn let_go(options: &Options) -> Result<()> {
    conf::forget(&options.data_dir, "synchronous_standby_names", SLOT)
}

/// Holds commits back and lets them go, for as long as the server runs.
pub(super) async fn watch(options: &Options, progress: watch::Receiver<Progress>, clock: &Clock, events: &Events) {
    let Some(most) = options.max_wal_behind.filter(|_| options.when_behind == WhenBehind::Block) else {
        return std::future::pending().await;
    };
    let mut held = false;
    loop {
        clock.sleep(LOOK).await;
        if let Err(error) = look(options, most.0, &progress, (clock, events), &mut held).await {
            events.warning(format!("how much WAL waits cannot be told: {error}"));
        }
    }
}

async fn look(
    options: &Options,
    most: u64,
    progress: &watch::Receiver<Progress>,
    (clock, events): (&Clock, &Events),
    held: &mut bool,
) -> Result<()> {
    let Progress { durable, waiting_since, .. } = *progress.borrow();
    let waits = waiting_since.is_some_and(|since| clock.monotonic().saturating_sub(since) > LONG);
    if !waits && !*held {
        return Ok(());
    }
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let behind = client.flushed().await?.bytes_since(durable);
    // Let go well below the bound, or it would be on and off.
    let hold = if *held { behind > most / 2 } else { behind > most };
    if hold != *held {
        let change = if hold {
            format!("SET synchronous_standby_names = {SLOT}")
        } else {
            "RESET synchronous_standby_names".to_owned()
        };
        client.execute(&format!("ALTER SYSTEM {change}")).await?;
        client.execute("SELECT pg_reload_conf()").await?;
        *held = hold;
        events.emit(Event::HeldBack { behind, held: hold });
    }
    Ok(())
}
