//! The server's life under our care, in two stages: alone with us until its log is open and everything it has is in it,
//! then for everybody; and down again with the last byte.

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::server::{self, Stage};
use super::signals::{Asked, NOTICE, Signals, asked};
use super::streaming::{Expected, Streaming};
use super::{Options, Start, ending, hold, notices, schedule, summaries, telling};
use crate::archive::push::Pusher;
use crate::archive::stream::{Order, Progress, watch_lag};
use crate::clock::Clock;
use crate::error::{Error, IoContext, Kind, Result};
use crate::events::{Event, Events};
use crate::postgres::process::{Listener, Stop};
use crate::postgres::{ControlFile, Install, Postmaster, version_of};
use crate::repository::Writer;
use crate::status::Board;

/// Time of the grace period that is kept for what comes after the server's end.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(2);

/// The least age of WAL that is not durable that is worth an alarm.
pub(super) const LAG_LEAST: Duration = Duration::from_secs(5);

pub(super) async fn supervise(
    options: &Options,
    pusher: &Pusher,
    start: Start,
    signals: Signals,
    events: &Events,
) -> Result<i32> {
    let version = version_of(&options.data_dir)?;
    let install = Install::find(options.pg_bindir.as_deref(), options.search_path.as_deref(), Some(version.major))?;
    let mut keeper = Keeper {
        options,
        pusher,
        start,
        events,
        clock: pusher.repository.clock().clone(),
        install,
        signals,
        streaming: None,
        left: Progress::default(),
        deadline: None,
        board: Board::new(
            pusher.repository.clock().clone(),
            pusher.writer.claim.generation,
            pusher.repository.address(),
            options.rpo,
        ),
    };
    let _told = telling::tell(options, &keeper.board, events)?;
    hold::let_go(options)?;
    summaries::let_go(options)?;
    let private = PrivateDir::new(&keeper.clock)?;
    let first = keeper.stage(Stage::Private(&private.0)).await?;
    drop(private);
    if !first.is_reached() {
        return keeper.end(first).await;
    }
    let second = keeper.stage(Stage::Public).await?;
    keeper.end(second).await
}

/// How a server's stage ended.
struct StageEnd {
    status: ExitStatus,
    /// The stage was over, nobody asked for a stop, and nothing failed.
    over: bool,
    failure: Option<Error>,
}

impl StageEnd {
    fn is_reached(&self) -> bool {
        self.over && self.status.success() && self.failure.is_none()
    }
}

struct Keeper<'a> {
    options: &'a Options,
    pusher: &'a Pusher,
    start: Start,
    events: &'a Events,
    clock: Clock,
    install: Install,
    signals: Signals,
    /// Lives across stages; taken when it has ended.
    streaming: Option<Streaming>,
    /// How far the stream was when it ended before the server.
    left: Progress,
    /// When a stop that was asked for must be over (monotonic).
    deadline: Option<Duration>,
    board: Board,
}

impl Keeper<'_> {
    async fn stage(&mut self, stage: Stage<'_>) -> Result<StageEnd> {
        if let Stage::Public = stage {
            hold::demand(self.options)?;
        }
        let command = server::command(self.options, &self.install, stage)?;
        if let Stage::Private(_) = stage {
            let text = format!("{} -D {}", command.program.display(), self.options.data_dir.display());
            self.events.emit(Event::ServerStarting { command: text });
        }
        let mut server = Postmaster::start(&command, listener(self.events))?;
        let streaming = self.streaming.get_or_insert_with(|| {
            Streaming::start(self.options, self.pusher, self.start, Expected::Started(server.pid()))
        });
        // Until the log is open nothing is held back: everybody waits for it.
        streaming.order(match stage {
            Stage::Private(_) => Order::Hurry,
            Stage::Public => Order::Run,
        });
        let (progress, streamed) = (streaming.progress.clone(), streaming.progress.clone());
        let writer = streaming.writer.clone();
        let running = server.clone();
        let care = async {
            let care = Care {
                options: self.options,
                pusher: self.pusher,
                events: self.events,
                board: &self.board,
                server: &running,
            };
            match stage {
                Stage::Private(_) => care.until_open(progress).await,
                Stage::Public => care.for_everybody(progress, writer, self.start == Start::Now).await,
            }
        };
        tokio::pin!(care);
        let _followed = telling::follow(&self.board, streamed);
        let notice = notices::until_leaving(self.options.notices.as_deref(), &self.clock, self.events);
        tokio::pin!(notice);
        let mut noticed = false;
        let mut end = StageEnd { status: ExitStatus::from_raw(0), over: false, failure: None };
        let (mut caring, mut stop_asked) = (true, false);
        loop {
            let now = self.clock.monotonic();
            let left = self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_sub(now + LAST_WORDS));
            let (orders, task) = match &mut self.streaming {
                Some(Streaming { orders, task, .. }) => (Some(&*orders), Some(task)),
                None => (None, None),
            };
            let has_task = task.is_some();
            let hurry = || {
                if let Some(orders) = orders {
                    orders.send_replace(Order::Hurry);
                }
            };
            let stream_ended = async {
                match task {
                    Some(task) => task.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                status = server.wait() => {
                    end.status = status;
                    break;
                }
                outcome = &mut care, if caring => {
                    caring = false;
                    end.over = outcome.is_ok() && !stop_asked;
                    hurry();
                    if let Err(error) = outcome {
                        self.events.emit(Event::Stopping { why: error.to_string() });
                        end.failure = Some(error);
                    }
                    server.stop(Stop::Fast);
                }
                ended = stream_ended, if has_task => {
                    caring = false;
                    if let Some(streaming) = self.streaming.take() {
                        self.left = *streaming.progress.borrow();
                    }
                    let error = match ended {
                        Ok(Ok(_)) => Error::internal("the stream ended by itself"),
                        Ok(Err(error)) => error,
                        Err(error) => Error::internal("the stream's task ended").source(error),
                    };
                    self.events.emit(Event::Stopping { why: error.to_string() });
                    server.stop(if error.kind() == Kind::Fenced { Stop::Immediate } else { Stop::Fast });
                    end.failure = Some(error);
                }
                what = asked(&mut self.signals, &mut notice, noticed) => match what {
                    Asked::Reload => server.reload(),
                    Asked::Stop(name) => {
                        noticed |= name == NOTICE;
                        let how = if stop_asked { Stop::Immediate } else { Stop::Fast };
                        self.events.emit(Event::Stopping { why: format!("{name} received, {how:?} stop").to_lowercase() });
                        // A backup in progress holds a session that a fast stop would end anyway. What is durable last
                        // goes first: the tail of the log is on its way before the server's checkpoint begins.
                        hurry();
                        (caring, stop_asked, end.over) = (false, true, false);
                        self.deadline.get_or_insert(self.clock.monotonic() + self.options.grace);
                        server.stop(how);
                    }
                },
                () = self.clock.sleep(left), if self.deadline.is_some() && left < Duration::MAX => {
                    self.events.warning("the grace period is nearly over: the server is stopped at once");
                    server.stop(Stop::Immediate);
                    self.clock.sleep(LAST_WORDS).await;
                }
            }
        }
        telling::not_ready(&self.board, self.options)?;
        Ok(end)
    }

    /// The server is down for good: what it left is brought in, and the log ended if that was all.
    async fn end(mut self, end: StageEnd) -> Result<i32> {
        self.events.emit(Event::ServerStopped { status: end.status.to_string() });
        let streamed = self.streaming.take();
        let Progress { received, durable, .. } =
            streamed.as_ref().map_or(self.left, |streaming| *streaming.progress.borrow());
        if let Some(error) = end.failure {
            if error.kind() == Kind::Fenced {
                self.events.emit(Event::Fenced { local: received, durable });
            }
            if streamed.is_none() {
                return Err(error);
            }
            self.bring_in(streamed, end.status).await;
            return Err(error);
        }
        self.bring_in(streamed, end.status).await;
        Ok(exit_code(end.status))
    }

    async fn bring_in(&self, streaming: Option<Streaming>, status: ExitStatus) {
        let Some(streaming) = streaming else { return };
        let deadline = self.deadline.unwrap_or(self.clock.monotonic() + self.options.grace);
        streaming.order(Order::Finish);
        let progress = streaming.progress.clone();
        let left = deadline.saturating_sub(self.clock.monotonic()).max(LAST_WORDS);
        let beside = (&*self.options.beside, self.clock.monotonic() + left);
        let work = async {
            let log = streaming.task.await.map_err(|e| Error::internal("the stream's task ended").source(e))??;
            ending::release(log, self.pusher, status.success(), beside, self.events).await
        };
        let outcome = self.clock.within(left, work).await;
        let error = match outcome {
            Some(Ok(())) => return,
            Some(Err(error)) => error.to_string(),
            None => format!("the grace period of {} s is over", self.options.grace.as_secs()),
        };
        self.events.emit(Event::WalLeftBehind { durable: progress.borrow().durable, error });
    }
}

/// What is done for a running server.
struct Care<'a> {
    options: &'a Options,
    pusher: &'a Pusher,
    events: &'a Events,
    board: &'a Board,
    server: &'a Postmaster,
}

type Watcher = tokio::sync::watch::Receiver<crate::archive::stream::Progress>;

impl Care<'_> {
    /// Until the log is open and has all that the server had when it came up. Nobody else has seen anything of it yet.
    async fn until_open(&self, mut progress: Watcher) -> Result<()> {
        let clock = self.pusher.repository.clock();
        let began = clock.monotonic();
        let data_dir = &self.options.data_dir;
        let recovering = server::is_recovering(data_dir);
        if self.server.until_ready(data_dir, clock).await?.is_none() {
            return std::future::pending().await;
        }
        if recovering {
            let timeline = ControlFile::read(data_dir, version_of(data_dir)?)?.newest_timeline();
            self.events.emit(Event::RecoveryDone { timeline, elapsed: clock.monotonic() - began });
        }
        let target = progress.wait_for(|progress| progress.connected).await.map(|progress| progress.server);
        let Ok(target) = target else { return std::future::pending().await };
        let durable = progress.wait_for(|progress| progress.opened && progress.durable >= target).await;
        match durable {
            Ok(_) => Ok(()),
            Err(_) => std::future::pending().await,
        }
    }

    /// For as long as it runs; ends only with an error.
    async fn for_everybody(
        &self,
        mut progress: Watcher,
        writer: tokio::sync::watch::Receiver<Writer>,
        begins_anew: bool,
    ) -> Result<()> {
        let clock = self.pusher.repository.clock();
        let up = self.server.until_ready(&self.options.data_dir, clock).await?;
        let (Some(up), Ok(_)) = (up, progress.wait_for(|progress| progress.connected).await.map(drop)) else {
            return std::future::pending().await;
        };
        telling::ready(self.board, self.options)?;
        self.events.emit(Event::Ready { port: up.port, generation: self.pusher.writer.claim.generation });
        let limit = (self.options.rpo * 3).max(LAG_LEAST);
        let lag = watch_lag(progress.clone(), limit, clock.clone(), self.events.clone());
        tokio::select! {
            ended = schedule::follow(self.options, self.pusher, writer, begins_anew, (self.events, self.board)) => ended,
            () = hold::watch(self.options, progress, self.board, (clock, self.events)) => Ok(()),
            () = lag => Ok(()),
            () = summaries::watch(self.options, (clock, self.events)) => Ok(()),
        }
    }
}

/// A directory for the socket of the first stage, which nobody else can enter. Short, because a socket's path must be.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new(clock: &Clock) -> Result<PrivateDir> {
        let path = PathBuf::from(format!("/tmp/perennial-{:08x}", u32::from_le_bytes(clock.random())));
        std::fs::DirBuilder::new().mode(0o700).create(&path).on("create directory", &path)?;
        Ok(PrivateDir(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The server's own code; 128 and the signal's number when a signal ended it, as a shell would say.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

/// Passes the server's lines on, and hears what is to be told of them. The words are those of PostgreSQL in English
/// (replication/syncrep.c); with another `lc_messages` this one goes unheard.
fn listener(events: &Events) -> Listener {
    const CANCELLED: &str = "canceling wait for synchronous replication due to user request";
    let events = events.clone();
    Box::new(move |line| {
        events.emit(Event::ServerSays { line: line.to_owned() });
        if line.contains(CANCELLED) {
            events.emit(Event::WaitCancelled);
        }
    })
}
