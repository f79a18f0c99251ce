//! `perennial agent`: the stream, the log, its fence and base backups for a server that something else runs (systemd,
//! Patroni, a container). It follows what that decides: it writes while the server is a primary, waits while it is a
//! standby or down, and claims a generation for each time it becomes the writer.

mod decide;
mod join;
mod life;

use std::sync::Arc;
use std::time::Duration;

use super::facts::Watched;
use super::signals::Signals;
use super::{Options, hold, telling};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::Generation;
use crate::postgres::{PostmasterFile, ServerStatus};
use crate::restore;
use crate::status::Board;
use crate::storage::Store;

use life::{End, Life};

/// After a life ended: before the next attempt, at least and at most.
const AGAIN: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How long the server may take to let commits go when the agent stops.
const LET_GO: Duration = Duration::from_secs(8);

/// What an agent has of its own.
#[derive(Debug, Clone)]
pub struct Agent {
    pub options: Options,
    /// A command for `/bin/sh`, run when another has taken over.
    pub on_fenced: Option<String>,
}

/// Runs until it is stopped or fenced; returns its exit code.
pub async fn run(store: Arc<dyn Store>, agent: &Agent, clock: &Clock, events: &Events) -> Result<i32> {
    let options = &agent.options;
    let _lock = restore::lock(&options.data_dir)?;
    let mut signals = Signals::new()?;
    let address = store.url("").trim_end_matches('/').to_owned();
    let board = Board::new(clock.clone(), Generation(0), address, options.rpo);
    let _told = telling::tell(options, &board, events)?;
    let mut watched = Watched::default();
    let mut wait = AGAIN;
    loop {
        let began = clock.monotonic();
        let joined = tokio::select! {
            joined = join::join(Arc::clone(&store), options, &mut watched, (clock, events)) => joined,
            never = let_go_in_time(options, &board, clock, events) => never,
            name = signals.stop() => {
                return Ok(stop(name, options, clock, events).await);
            }
        };
        let ended = match joined {
            Ok(joined) => Life { options, joined, board: &board, clock, events }.live(&mut signals).await,
            Err(error) => Err(error),
        };
        match ended {
            Ok(End::Stopped) => return Ok(0),
            Ok(End::Again(error)) => {
                events.info(format!("not writing any more: {error}"));
                // What ends at once, again and again, must not fill the repository with claims.
                wait = if clock.monotonic() - began > LONGEST_WAIT { AGAIN } else { (wait * 2).min(LONGEST_WAIT) };
            }
            Err(error) if error.kind() == Kind::Fenced => {
                shout(agent, &error, events).await;
                return Err(error);
            }
            Err(error) if error.is_retryable() => {
                events.warning(error.to_string());
                wait = (wait * 2).min(LONGEST_WAIT);
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = clock.sleep(wait) => (),
            name = signals.stop() => {
                return Ok(stop(name, options, clock, events).await);
            }
        }
    }
}

/// Stops an agent that writes nothing now.
async fn stop(name: &str, options: &Options, clock: &Clock, events: &Events) -> i32 {
    events.emit(Event::Stopping { why: format!("{} received", name.to_lowercase()) });
    let_go(options, clock, events).await;
    0
}

/// Commits do not wait for an agent that is not there; somebody else's setting stays.
async fn let_go(options: &Options, clock: &Clock, events: &Events) {
    let file = PostmasterFile::of_starting(&options.data_dir).ok().flatten();
    let up = file.is_some_and(|file| file.status == ServerStatus::Ready && file.is_alive(&options.data_dir));
    if up && let Some(Err(error)) = clock.within(LET_GO, hold::set(options, false, clock)).await {
        events.warning(format!("commits may wait for an agent that is not there any more: {error}"));
    }
}

/// While the repository is away the agent cannot even begin: with `--on-bucket-loss degrade` commits do not wait for that.
async fn let_go_in_time<T>(options: &Options, board: &Board, clock: &Clock, events: &Events) -> T {
    if hold::can_degrade(options) {
        clock.sleep(options.bucket_loss_after).await;
        if hold::is_set(options).await.unwrap_or_default() {
            let_go(options, clock, events).await;
            board.degraded(true);
            events.emit(Event::Degraded { waited: options.bucket_loss_after, degraded: true });
        }
    }
    std::future::pending().await
}

/// Tells the operator's command that this server is not the database any more.
async fn shout(agent: &Agent, error: &Error, events: &Events) {
    let Some(command) = &agent.on_fenced else { return };
    events.warning(format!("running the command of --on-fenced: {command}"));
    let status = tokio::process::Command::new("/bin/sh")
        .args(["-c", command])
        .env("PGDATA", &agent.options.data_dir)
        .env("PERENNIAL_FENCED", error.to_string())
        .status()
        .await;
    match status {
        Ok(status) if status.success() => (),
        Ok(status) => events.warning(format!("the command of --on-fenced ended with {status}")),
        Err(error) => events.warning(format!("the command of --on-fenced could not be run: {error}")),
    }
}
