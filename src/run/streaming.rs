//! The stream of a supervised server, from the moment it accepts connections: its log is opened, and served.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Options, Start};
use crate::archive::claim::push_history;
use crate::archive::push::Pusher;
use crate::archive::stream::{self, Order, Progress, Stream};
use crate::clock::Clock;
use crate::error::{Error, IoContext, Result};
use crate::model::{Lsn, Timeline};
use crate::postgres::replication::Identity;
use crate::postgres::{PostmasterFile, Replication, ServerStatus};
use crate::repository::log::{Appender, Checks, Position};
use crate::wal::{History, WalFileName};

/// How often the server is asked whether it is up.
const LOOK: Duration = Duration::from_millis(50);

/// The stream's task and the ways to it.
pub(super) struct Streaming {
    pub task: JoinHandle<Result<Appender>>,
    pub orders: watch::Sender<Order>,
    pub progress: watch::Receiver<Progress>,
}

impl Streaming {
    /// Begins to stream from the server with this process number, once it is up.
    pub fn start(options: &Options, pusher: &Pusher, start: Start, server: i32) -> Streaming {
        let (orders, ordered) = watch::channel(Order::Run);
        let (told, progress) = watch::channel(Progress::default());
        let task = tokio::spawn(stream(options.clone(), pusher.clone(), start, server, (ordered, told)));
        Streaming { task, orders, progress }
    }

    pub fn order(&self, order: Order) {
        self.orders.send_replace(order);
    }
}

async fn stream(
    options: Options,
    pusher: Pusher,
    start: Start,
    server: i32,
    (orders, progress): (watch::Receiver<Order>, watch::Sender<Progress>),
) -> Result<Appender> {
    let clock = pusher.repository.clock().clone();
    let identity = identify(&options, server, &orders, &clock).await?;
    if identity.system_id != pusher.writer.claim.system_id {
        return Err(Error::refused(format!("the server that came up is another cluster: {}", identity.system_id)));
    }
    // Nobody could follow WAL whose timeline is unknown.
    push_history(&pusher.repository, &pusher.writer, &options.data_dir, &pusher.events).await?;
    let position = Position { timeline: identity.timeline, lsn: begin(&options, &pusher, start, identity)? };
    progress.send_modify(|progress| progress.server = identity.flushed);
    let (repository, generation) = (pusher.repository.clone(), pusher.writer.claim.generation);
    let log = Appender::open(repository, generation, position, options.heartbeat, Checks::ALL)?;
    let streaming = stream::Options {
        data_dir: options.data_dir.clone(),
        connect: options.connect.clone(),
        rpo: options.rpo,
        linger: options.linger,
        in_flight: options.in_flight,
        heartbeat: options.heartbeat,
    };
    Stream::new(pusher, log, streaming, orders, progress).serve().await
}

/// Waits for the server and asks where it is.
async fn identify(options: &Options, server: i32, orders: &watch::Receiver<Order>, clock: &Clock) -> Result<Identity> {
    loop {
        if *orders.borrow() == Order::Finish {
            return Err(Error::postgres("the server ended before its stream began"));
        }
        let file = PostmasterFile::of_starting(&options.data_dir)?;
        if file.is_some_and(|file| file.pid == server && file.status == ServerStatus::Ready) {
            let connected = Replication::connect(&options.connect, &options.data_dir, clock).await;
            let identity = match connected {
                Ok(mut connection) => connection.identify().await,
                Err(error) => Err(error),
            };
            match identity {
                Err(error) if error.is_retryable() => (),
                answer => return answer,
            }
        }
        clock.sleep(LOOK).await;
    }
}

/// The start of the segment in which the log's WAL begins.
fn begin(options: &Options, pusher: &Pusher, start: Start, identity: Identity) -> Result<Lsn> {
    let lsn = match start {
        Start::Continue(position) if position.timeline == identity.timeline => position.lsn,
        Start::Fork | Start::Continue(_) => left_at(options, identity.timeline)?.unwrap_or(identity.flushed),
        Start::Now => identity.flushed,
    };
    let size = pusher.writer.claim.segment_size;
    Ok(size.start_of(size.number_at(lsn)))
}

/// Where the ancestor of a timeline was left.
fn left_at(options: &Options, timeline: Timeline) -> Result<Option<Lsn>> {
    if timeline == Timeline(1) {
        return Ok(None);
    }
    let path = options.data_dir.join(format!("pg_wal/{}", WalFileName::History(timeline)));
    let text = std::fs::read_to_string(&path).on("read", &path)?;
    let history = History::parse(timeline, &text).map_err(|e| Error::damaged(format!("{}: {e}", path.display())))?;
    Ok(history.switches.last().map(|switch| switch.at))
}
