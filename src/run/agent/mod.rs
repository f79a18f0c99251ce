//! `perennial agent`: the stream, the log, its fence and base backups for a server that something else runs (systemd,
//! Patroni, a container). It follows what that decides: it writes while the server is a primary, waits while it is a
//! standby or down, and claims a generation for each time it becomes the writer.

mod decide;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::claimant::Claimant;
use super::facts::{self, Watched};
use super::signals::{Asked, Signals, asked};
use super::streaming::{Streaming, history_of};
use super::{Options, Start, boot, ending, hold, notices, schedule, telling};
use crate::archive::push::Pusher;
use crate::archive::resume;
use crate::archive::stream::{Order, Progress, watch_lag};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::{Generation, Lsn, Timeline};
use crate::postgres::data_dir::OWN_DIR;
use crate::postgres::replication::Identity;
use crate::postgres::{Client, ControlFile, PostmasterFile, Replication, ServerStatus, version_of};
use crate::repository::{Repository, Writer};
use crate::restore;
use crate::status::Board;
use crate::storage::Store;

use decide::{Decision, Facts, Newest};

/// How often a server is looked at that is down or a standby: local reads, and a query when it is up.
const LOOK: Duration = Duration::from_millis(500);

/// After a life ended: before the next attempt.
const AGAIN: Duration = Duration::from_secs(1);

/// What an agent has of its own.
#[derive(Debug, Clone)]
pub struct Agent {
    pub options: Options,
    /// A command for `/bin/sh`, run when another has taken over.
    pub on_fenced: Option<String>,
}

/// How a life as the writer ended.
enum End {
    /// The server went down for good, or became something else: look again.
    Again(Error),
    /// A stop was asked for.
    Stopped,
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
    loop {
        let joined = tokio::select! {
            joined = join(Arc::clone(&store), options, &mut watched, (clock, events)) => joined,
            name = signals.stop() => {
                events.emit(Event::Stopping { why: format!("{} received", name.to_lowercase()) });
                return Ok(0);
            }
        };
        let life = async {
            let (pusher, start) = joined?;
            Life { options, pusher, start, board: &board, clock, events }.live(&mut signals).await
        };
        match life.await {
            Ok(End::Stopped) => return Ok(0),
            Ok(End::Again(error)) => {
                events.info(format!("not writing any more: {error}"));
                clock.sleep(AGAIN).await;
            }
            Err(error) if error.kind() == Kind::Fenced => {
                shout(agent, &error, events).await;
                return Err(error);
            }
            Err(error) if error.is_retryable() => {
                events.warning(error.to_string());
                clock.sleep(AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    }
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

/// Waits until the server is a primary that may be written for, and claims.
async fn join(
    store: Arc<dyn Store>,
    options: &Options,
    watched: &mut Watched,
    (clock, events): (&Clock, &Events),
) -> Result<(Pusher, Start)> {
    let mut told = None;
    loop {
        let identity = until_primary(options, clock, events).await?;
        let repository = Repository::open(Arc::clone(&store), clock).await?;
        let facts = gather(&repository, options, identity, watched).await?;
        let decision = decide::decide(&facts);
        if told.as_ref() != Some(&decision) {
            events.emit(Event::Decided { decision: decision.to_string() });
            told = Some(decision.clone());
        }
        let (newest, start) = match decision {
            Decision::Refuse(refusal) => return Err(refusal.into()),
            Decision::Spare { .. } => {
                clock.sleep(super::patience_between_looks(options)).await;
                continue;
            }
            Decision::Begin { newest } => (newest, Start::Now),
            // What lies between the log's end and the fork is in no log: the history begins anew, with a base backup.
            Decision::Follow { newest, at, end } => (Some(newest), if at <= end { Start::Fork } else { Start::Now }),
            Decision::Continue { newest } => (Some(newest), Start::Now),
        };
        let continues = facts.ours.is_some() && facts.ours == newest.as_ref().map(|newest| newest.generation);
        let newest = newest.map(|newest| newest.generation);
        let claimant = Claimant { options, clock, events };
        let Some(writer) = claimant.claim(&repository, newest, newest).await? else { continue };
        let sealed = claimant.seal_older(&repository, writer.claim.generation).await?;
        let last = sealed.into_iter().find(|view| view.end().is_some());
        let start = match last {
            Some(last) if continues && start == Start::Now && !options.adopt => {
                if let Some(why) = resume::diverges(&repository, &last, &options.data_dir).await? {
                    return Err(Error::refused(format!("the server does not continue the repository: {why}")).hint(
                        "its disk was put back in time, or another wrote under its name; if it is the database all the same, start once with --adopt",
                    ));
                }
                last.end().map_or(Start::Now, Start::Continue)
            }
            _ => start,
        };
        let pusher = Pusher { repository, writer, data_dir: options.data_dir.clone(), events: events.clone() };
        return Ok((pusher, start));
    }
}

/// Waits until a primary runs in the data directory.
async fn until_primary(options: &Options, clock: &Clock, events: &Events) -> Result<Identity> {
    let mut told = false;
    loop {
        match look(options, clock).await {
            Ok(Some(identity)) => return Ok(identity),
            Ok(None) => {
                if !std::mem::replace(&mut told, true) {
                    events.info(format!("waiting until a primary runs in {}", options.data_dir.display()));
                }
            }
            Err(error) if error.is_retryable() => (),
            Err(error) => return Err(error),
        }
        clock.sleep(LOOK).await;
    }
}

/// The primary that runs there; `None` for a standby, or nobody.
async fn look(options: &Options, clock: &Clock) -> Result<Option<Identity>> {
    let up = |file: &PostmasterFile| file.status == ServerStatus::Ready && file.is_alive(&options.data_dir);
    if !PostmasterFile::of_starting(&options.data_dir)?.is_some_and(|file| up(&file)) {
        return Ok(None);
    }
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    if client.text("pg_is_in_recovery()").await? == "true" {
        return Ok(None);
    }
    let identity = Replication::connect(&options.connect, &options.data_dir, clock).await?.identify().await?;
    if on_disk(options)? != identity.timeline {
        // A server that was promoted a moment ago: its control file follows with the next checkpoint, and tells us.
        client.execute("CHECKPOINT").await?;
    }
    Ok(Some(identity))
}

fn on_disk(options: &Options) -> Result<Timeline> {
    Ok(ControlFile::read(&options.data_dir, version_of(&options.data_dir)?)?.newest_timeline())
}

async fn gather(
    repository: &Repository,
    options: &Options,
    identity: Identity,
    watched: &mut Watched,
) -> Result<Facts> {
    let own_dir = options.data_dir.join(OWN_DIR);
    let claim = match repository.newest_generation().await? {
        Some(newest) => Some(repository.claim(newest).await?),
        None => None,
    };
    facts::finish_claim(&own_dir, Some(repository), claim.as_ref())?;
    let noted = Writer::load(&own_dir)?;
    let same = |writer: &Writer| writer.descriptor.repository_id == repository.descriptor().repository_id;
    let ours = noted.filter(same).map(|writer| writer.claim.generation);
    let newest = match claim {
        Some(claim) => {
            let view = repository.log(claim.generation).await?;
            let silent = watched.is_silent(&view, repository.clock().monotonic(), options.takeover_after);
            let gone = view.seal.is_some() || view.end().is_none() || silent;
            let holder = if gone { boot::Holder::Gone } else { boot::Holder::MayLive };
            Some(Newest { end: view.end(), claim, holder })
        }
        None => None,
    };
    let history = history_of(options, identity.timeline)?;
    Ok(Facts { system_id: identity.system_id, history, ours, newest, adopt: options.adopt })
}

/// One life as the writer: under one generation, and those that follow gaps.
struct Life<'a> {
    options: &'a Options,
    pusher: Pusher,
    start: Start,
    board: &'a Board,
    clock: &'a Clock,
    events: &'a Events,
}

impl Life<'_> {
    async fn live(&self, signals: &mut Signals) -> Result<End> {
        let Life { options, pusher, board, clock, events, .. } = self;
        let mut streaming = Streaming::start(options, pusher, self.start, None);
        let _followed = telling::follow(board, streaming.progress.clone());
        let care = self.care(streaming.progress.clone(), streaming.writer.clone());
        let notice = notices::until_leaving(options.notices.as_deref(), clock, events);
        tokio::pin!(care, notice);
        let end = loop {
            tokio::select! {
                ended = &mut streaming.task => {
                    let error = match ended {
                        Ok(Ok(_)) => Error::internal("the stream ended by itself"),
                        Ok(Err(error)) => error,
                        Err(error) => Error::internal("the stream's task ended").source(error),
                    };
                    break self.ended(error, &streaming);
                }
                error = &mut care => {
                    streaming.order(Order::Leave);
                    let _ = clock.within(options.grace, &mut streaming.task).await;
                    break self.ended(error, &streaming);
                }
                what = asked(signals, &mut notice, false) => {
                    if let Asked::Stop(name) = what {
                        events.emit(Event::Stopping { why: format!("{} received", name.to_lowercase()) });
                        break self.leave(streaming).await.map(|()| End::Stopped);
                    }
                }
            }
        };
        telling::not_ready(board, options)?;
        end
    }

    /// What is done while the stream runs; returns only with what went wrong.
    async fn care(&self, mut progress: watch::Receiver<Progress>, writer: watch::Receiver<Writer>) -> Error {
        let Life { options, pusher, board, clock, events, .. } = self;
        if progress.wait_for(|progress| progress.connected && progress.opened).await.is_err() {
            return std::future::pending().await;
        }
        let begun = async {
            hold::set(options, options.rpo.is_zero()).await?;
            telling::ready(board, options)?;
            let port = PostmasterFile::read(&options.data_dir)?.map_or(0, |file| file.port);
            events.emit(Event::Ready { port, generation: pusher.writer.claim.generation });
            Ok(())
        };
        if let Err(error) = begun.await {
            return error;
        }
        let limit = (options.rpo * 3).max(super::supervisor::LAG_LEAST);
        let lag = watch_lag(progress.clone(), limit, (*clock).clone(), (*events).clone());
        tokio::select! {
            ended = schedule::follow(options, pusher, writer, self.start == Start::Now, (events, board)) => match ended {
                Err(error) => error,
                Ok(()) => Error::internal("the schedule ended by itself"),
            },
            () = hold::watch(options, progress, board, (clock, events)) => std::future::pending().await,
            () = lag => std::future::pending().await,
        }
    }

    fn ended(&self, error: Error, streaming: &Streaming) -> Result<End> {
        if error.kind() == Kind::Fenced {
            let progress = *streaming.progress.borrow();
            self.events
                .emit(Event::Fenced { local: progress.server.max(progress.received), durable: progress.durable });
            return Err(error);
        }
        Ok(End::Again(error))
    }

    /// Stops writing: what was received is brought in; commits do not wait for us any more; and the log of a server that
    /// has ended is ended too.
    async fn leave(&self, streaming: Streaming) -> Result<()> {
        let runs = || -> Result<bool> {
            Ok(PostmasterFile::read(&self.options.data_dir)?.is_some_and(|file| file.is_alive(&self.options.data_dir)))
        };
        let alive = runs()?;
        streaming.order(if alive { Order::Leave } else { Order::Finish });
        if alive
            && self.options.rpo.is_zero()
            && let Err(error) = hold::set(self.options, false).await
        {
            self.events.warning(format!("commits wait for an agent that is not there any more: {error}"));
        }
        let durable = || -> Lsn { streaming.progress.borrow().durable };
        let outcome = self.clock.within(self.options.grace, streaming.task).await;
        let error = match outcome {
            Some(Ok(Ok(log))) if !alive => match ending::release(log, &self.pusher, true, self.events).await {
                Ok(()) => return Ok(()),
                Err(error) => error.to_string(),
            },
            Some(Ok(Ok(_))) => {
                self.events
                    .info(format!("WAL up to {} is in the repository; the server goes on without us", durable()));
                return Ok(());
            }
            Some(Ok(Err(error))) => error.to_string(),
            Some(Err(error)) => error.to_string(),
            None => format!("the grace period of {} s is over", self.options.grace.as_secs()),
        };
        self.events.emit(Event::WalLeftBehind { durable: durable(), error });
        Ok(())
    }
}
