//! The stream of a supervised server, from the moment it accepts connections: its log is opened, and served.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Options, Start};
use crate::archive::claim::push_history;
use crate::archive::push::Pusher;
use crate::archive::stream::{self, Order, Progress, Stream};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::Event;
use crate::model::{Lsn, Timeline, WriteId};
use crate::postgres::data_dir::{self, OWN_DIR};
use crate::postgres::replication::{Identity, SLOT};
use crate::postgres::{Client, PostmasterFile, Replication, ServerStatus};
use crate::repository::log::{Appender, Checks, Position, Sealer};
use crate::repository::{NewWriter, Writer};

/// How often the server is asked whether it is up.
const LOOK: Duration = Duration::from_millis(50);

/// The stream's task and the ways to it.
pub(super) struct Streaming {
    pub task: JoinHandle<Result<Appender>>,
    pub orders: watch::Sender<Order>,
    pub progress: watch::Receiver<Progress>,
    /// Under which generation it writes: another one after a gap.
    pub writer: watch::Receiver<Writer>,
}

/// Between two tries to begin anew after a gap.
const AGAIN: Duration = Duration::from_secs(2);

impl Streaming {
    /// Begins to stream from the server, once it is up.
    pub fn start(options: &Options, pusher: &Pusher, start: Start, server: Expected) -> Streaming {
        let (orders, ordered) = watch::channel(Order::Run);
        let (told, progress) = watch::channel(Progress::default());
        let (wrote, writer) = watch::channel(pusher.writer.clone());
        let channels = Channels { orders: ordered, progress: told, writer: wrote };
        let task = tokio::spawn(stream(options.clone(), pusher.clone(), start, server, channels));
        Streaming { task, orders, progress, writer }
    }

    pub fn order(&self, order: Order) {
        self.orders.send_replace(order);
    }
}

/// Which server is streamed from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Expected {
    /// The one with this process number.
    Started(i32),
    /// A primary that runs there, if it is still on this timeline.
    On(Timeline),
    /// The one that was streamed from before.
    Same,
}

/// The task's ends of the ways to it.
struct Channels {
    orders: watch::Receiver<Order>,
    progress: watch::Sender<Progress>,
    writer: watch::Sender<Writer>,
}

async fn stream(
    options: Options,
    mut pusher: Pusher,
    mut start: Start,
    mut server: Expected,
    channels: Channels,
) -> Result<Appender> {
    loop {
        match one_log(&options, &pusher, start, server, &channels).await {
            // WAL that was to come next is gone on the server: a gap, and a new history after it.
            Err(error) if error.kind() == Kind::NotFound => {
                let durable = channels.progress.borrow().durable;
                pusher.events.emit(Event::WalGap { durable, why: error.to_string() });
                pusher.writer = begin_anew(&options, &pusher, &channels.orders).await?;
                channels.writer.send_replace(pusher.writer.clone());
                // It has been up for long, and is in another stage than when we began.
                (start, server) = (Start::Now, Expected::Same);
            }
            ended => return ended,
        }
    }
}

async fn one_log(
    options: &Options,
    pusher: &Pusher,
    start: Start,
    server: Expected,
    channels: &Channels,
) -> Result<Appender> {
    let clock = pusher.repository.clock();
    let identity = identify(options, server, &channels.orders, clock).await?;
    if identity.system_id != pusher.writer.claim.system_id {
        return Err(Error::refused(format!("the server that came up is another cluster: {}", identity.system_id)));
    }
    if stream::is_standby(identity.is_standby, &options.connect, &options.data_dir).await? {
        return Err(Error::refused("the server has become a standby: another one is the primary now"));
    }
    if let Expected::On(timeline) = server
        && identity.timeline != timeline
    {
        return Err(Error::refused(format!(
            "the server went from timeline {timeline} to {} meanwhile",
            identity.timeline
        )));
    }
    // Nobody could follow WAL whose timeline is unknown.
    push_history(&pusher.repository, &pusher.writer, &options.data_dir, &pusher.events).await?;
    let position = Position { timeline: identity.timeline, lsn: begin(options, pusher, start, identity)? };
    channels.progress.send_modify(|progress| {
        *progress = Progress { server: identity.flushed, entries: progress.entries, ..Progress::default() };
    });
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
    Stream::new(pusher.clone(), log, streaming, channels.orders.clone(), channels.progress.clone()).serve().await
}

/// After a gap: gives the old slot up, claims the next generation and ends our own log. Tried until the repository is
/// there again; what the server writes meanwhile is kept by nobody, and the next backup has it.
async fn begin_anew(options: &Options, pusher: &Pusher, orders: &watch::Receiver<Order>) -> Result<Writer> {
    let clock = pusher.repository.clock();
    loop {
        match try_to_begin_anew(options, pusher).await {
            Err(error) if error.kind() == Kind::Fenced => return Err(error),
            Err(error) if is_over(orders) => return Err(error),
            Err(error) => {
                pusher.events.info(format!("no new generation yet: {error}"));
                clock.sleep(AGAIN).await;
            }
            Ok(writer) => return Ok(writer),
        }
    }
}

async fn try_to_begin_anew(options: &Options, pusher: &Pusher) -> Result<Writer> {
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    client.drop_slot(SLOT).await?;
    let (repository, claim) = (&pusher.repository, &pusher.writer.claim);
    let own_dir = options.data_dir.join(OWN_DIR);
    let newest = repository.newest_generation().await?.unwrap_or(claim.generation);
    let mine =
        newest == claim.generation || Some(repository.claim(newest).await?.writer_id) == Writer::claiming(&own_dir)?;
    if !mine {
        return Err(Error::new(Kind::Fenced, format!("generation {newest} has taken over while WAL was given up"))
            .hint("another machine is the database now; this one's directory is kept as it is"));
    }
    let new = NewWriter {
        writer_id: WriteId(repository.clock().random()),
        system_id: claim.system_id,
        pg_major: claim.pg_major,
        segment_size: claim.segment_size,
        host: options.host.clone(),
    };
    Writer::note_claiming(&own_dir, new.writer_id)?;
    let claimed = repository.try_claim(Some(newest), Some(newest), &new).await?;
    let claim = claimed.ok_or_else(|| Error::refused("another machine claimed a generation first"))?;
    pusher.events.emit(Event::GenerationClaimed { generation: claim.generation, parent: claim.parent });
    Sealer { generation: claim.generation, checks: Checks::ALL }.seal_older(repository).await?;
    let writer = Writer::new(repository, claim);
    writer.save(&own_dir)?;
    Ok(writer)
}

fn is_over(orders: &watch::Receiver<Order>) -> bool {
    matches!(*orders.borrow(), Order::Finish | Order::Leave)
}

/// Waits for the server and asks where it is.
async fn identify(
    options: &Options,
    server: Expected,
    orders: &watch::Receiver<Order>,
    clock: &Clock,
) -> Result<Identity> {
    loop {
        if is_over(orders) {
            return Err(Error::postgres("the server ended before its stream began"));
        }
        let file = PostmasterFile::of_starting(&options.data_dir)?;
        let expected = |file: &PostmasterFile| !matches!(server, Expected::Started(pid) if pid != file.pid);
        if file.is_some_and(|file| expected(&file) && file.status == ServerStatus::Ready) {
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
    Ok(data_dir::history_of(&options.data_dir, timeline)?.switches.last().map(|switch| switch.at))
}
