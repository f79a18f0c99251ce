//! WAL as the server flushes it, into the log of our generation: every second, or for every commit.
//!
//! One task does it all, so that order needs no locks: it receives, cuts entries, sends several at once, acknowledges
//! what is durable up to there, and has complete segments stored. What is not durable yet is bounded: one entry being
//! filled and those on their way; beyond that nothing is received, and the server keeps the WAL for our slot.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::compact::Compactor;
use super::pace::Pace;
use super::push::Pusher;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events, Level};
use crate::model::Lsn;
use crate::postgres::replication::Received;
use crate::postgres::{Client, ConnectOptions, PostmasterFile, Replication, ServerStatus};
use crate::repository::log::{Appender, Durable, ENTRY_MAX};
use crate::repository::{Codec, Frame};

/// How often the server hears from us at least (`wal_receiver_status_interval` of a standby is 10 s by default).
const REPORT: Duration = Duration::from_secs(5);

/// Pieces up to this size are compressed on the spot; larger ones on a thread of their own.
const SMALL: usize = 64 << 10;

/// A connection from which nothing was read for this long is given up until there is room again: a walsender that cannot
/// send can neither be ended nor let go of its slot, and a checkpoint that wants either would wait for us.
const FULL: Duration = Duration::from_secs(5);

/// A request with WAL that took longer than this is worth a line to whoever looks for details.
const SLOW: Duration = Duration::from_millis(300);

const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    pub connect: ConnectOptions,
    /// The greatest age of WAL that is not durable. Zero: commits wait for us, so nothing is held back.
    pub rpo: Duration,
    /// At an RPO of zero, how long a commit waits for company while entries are on their way.
    pub linger: Duration,
    /// Entries on their way at once.
    pub in_flight: usize,
    /// An idle writer shows that it lives this often; zero for never.
    pub heartbeat: Duration,
}

/// What the stream is to do, as the server's keeper knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Run,
    /// The server is stopping: nothing is held back any more.
    Hurry,
    /// The server has ended: what is left is brought in, then the stream ends.
    Finish,
    /// The server goes on without us: what was received is brought in, then the stream ends.
    Leave,
}

/// How far the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The log's first entry is durable: nobody else is the writer.
    pub opened: bool,
    pub connected: bool,
    pub received: Lsn,
    pub durable: Lsn,
    /// How far the server was when it last said so.
    pub server: Lsn,
    /// Since when the oldest byte waits that is not durable (monotonic).
    pub waiting_since: Option<Duration>,
    pub entries: u64,
}

/// An entry that is not durable yet: where it ends, when its first byte came, and when it was cut.
struct OnItsWay {
    end: Lsn,
    since: Duration,
    sent: Duration,
}

pub struct Stream {
    options: Options,
    log: Appender,
    compactor: Compactor,
    system_id: crate::model::SystemId,
    codec: Codec,
    segment_size: u64,
    clock: Clock,
    events: Events,
    orders: watch::Receiver<Order>,
    progress: watch::Sender<Progress>,
    /// Received and not yet in an entry; when the first byte of it came.
    buffer: BytesMut,
    oldest: Option<Duration>,
    waiting: VecDeque<OnItsWay>,
    pace: Pace,
    /// Nothing is held back until this position.
    hurry_until: Lsn,
    last_append: Duration,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream({:?})", self.log)
    }
}

impl Stream {
    /// Streams into `log`, which was opened at the start of a segment.
    pub fn new(
        pusher: Pusher,
        log: Appender,
        options: Options,
        orders: watch::Receiver<Order>,
        progress: watch::Sender<Progress>,
    ) -> Stream {
        let claim = &pusher.writer.claim;
        let clock = pusher.repository.clock().clone();
        let at = log.end().lsn;
        progress.send_modify(|progress| {
            progress.received = at;
            progress.durable = at;
            progress.server = progress.server.max(at);
        });
        Stream {
            pace: Pace::new(options.rpo),
            options,
            system_id: claim.system_id,
            codec: pusher.repository.descriptor().codec,
            segment_size: claim.segment_size.bytes(),
            events: pusher.events.clone(),
            compactor: Compactor::new(pusher, at),
            log,
            last_append: clock.monotonic(),
            clock,
            orders,
            progress,
            buffer: BytesMut::new(),
            oldest: None,
            waiting: VecDeque::new(),
            hurry_until: Lsn(0),
        }
    }

    /// Streams until it is ordered to finish and everything that was received is durable. Lost connections are made
    /// again. Ends with an error when the log was taken from us, or WAL we need is gone.
    pub async fn serve(mut self) -> Result<Appender> {
        let mut wait = FIRST_WAIT;
        loop {
            self.until_up().await?;
            if self.is_over() {
                break;
            }
            let ended = match self.connect().await {
                Ok(connection) => {
                    wait = FIRST_WAIT;
                    self.with_connection(connection).await?
                }
                Err(error) if error.is_retryable() || self.is_over() => error,
                Err(error) => return Err(error),
            };
            self.note(|progress| progress.connected = false);
            match *self.orders.borrow() {
                Order::Finish | Order::Leave => break,
                Order::Run => self.events.info(format!("the stream of WAL is interrupted: {ended}")),
                Order::Hurry => (),
            }
            self.pass(wait).await?;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        self.finish().await?;
        Ok(self.log)
    }

    fn is_over(&self) -> bool {
        matches!(*self.orders.borrow(), Order::Finish | Order::Leave)
    }

    /// Where the next byte to come belongs.
    fn received(&self) -> Lsn {
        Lsn(self.log.end().lsn.0 + self.buffer.len() as u64)
    }

    /// Waits until the server takes connections, or has ended for good: asked too early, it says so in its log.
    async fn until_up(&mut self) -> Result<()> {
        let up = |file: PostmasterFile| file.status == ServerStatus::Ready;
        while !self.is_over() && !PostmasterFile::of_starting(&self.options.data_dir)?.is_some_and(up) {
            self.pass(FIRST_WAIT).await?;
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<Replication> {
        let mut connection = Replication::connect(&self.options.connect, &self.options.data_dir, &self.clock).await?;
        let identity = connection.identify().await?;
        if is_standby(identity.is_standby, &self.options.connect, &self.options.data_dir).await? {
            return Err(Error::refused("the server has become a standby: another one is the primary now"));
        }
        let (at, timeline) = (self.received(), self.log.end().timeline);
        if identity.system_id != self.system_id {
            return Err(Error::refused(format!(
                "the server is system {}, this generation belongs to system {}",
                identity.system_id, self.system_id
            )));
        }
        if identity.timeline != timeline {
            return Err(Error::refused(format!(
                "the server went from timeline {timeline} to {}: that is another generation",
                identity.timeline
            ))
            .hint("start again: `perennial run` claims a new generation"));
        }
        if identity.flushed < at {
            return Err(Error::damaged(format!(
                "the server's WAL ends at {}, {at} was received from it before: its disk lost what it had flushed",
                identity.flushed
            ))
            .hint("do not trust this disk; start on another machine, or with an empty directory"));
        }
        connection.ensure_slot(&self.options.data_dir).await?;
        connection.start(at, timeline).await?;
        connection.report(at, self.log.durable().position.lsn).await?;
        self.note(|progress| progress.connected = true);
        Ok(connection)
    }

    /// Streams until the connection ends; returns why it did.
    async fn with_connection(&mut self, mut connection: Replication) -> Result<Error> {
        let mut next_report = self.clock.monotonic() + REPORT;
        let mut full_since = None;
        loop {
            self.compactor.start(self.log.durable());
            while self.is_due() {
                self.append_some().await?;
            }
            let now = self.clock.monotonic();
            let room = self.has_room();
            full_since = if room { None } else { full_since.or(Some(now)) };
            let give_up = full_since.map_or(Duration::MAX, |since: Duration| since + FULL);
            if give_up <= now {
                return Ok(Error::unreachable("the repository takes no WAL: no more is received until it does"));
            }
            let alarm = self.next_alarm(now).min(next_report).min(give_up);
            tokio::select! {
                biased;
                landed = self.log.landed(), if self.log.in_flight() > 0 => {
                    if self.landed(landed?) && let Err(error) = self.report(&mut connection).await {
                        return Ok(error);
                    }
                }
                ordered = self.orders.changed() => {
                    if ordered.is_err() {
                        return Err(Error::internal("the stream's keeper is gone"));
                    }
                    if *self.orders.borrow() == Order::Leave {
                        return Ok(Error::postgres("we leave it"));
                    }
                }
                received = connection.receive(), if room => match received {
                    Ok(Received::Ended) => return Ok(Error::postgres("the server ended it")),
                    Ok(received) => self.take(received)?,
                    Err(error) if error.is_retryable() => return Ok(error),
                    Err(error) => return Err(error),
                },
                done = self.compactor.progress(), if self.compactor.is_busy() => done?,
                () = self.clock.sleep(alarm.saturating_sub(now)) => (),
            }
            if self.clock.monotonic() >= next_report {
                next_report = self.clock.monotonic() + REPORT;
                if let Err(error) = self.report(&mut connection).await {
                    return Ok(error);
                }
            }
        }
    }

    /// `&mut`, because a shared reference to what is on its way could not be held while it waits.
    async fn report(&mut self, connection: &mut Replication) -> Result<()> {
        let (received, durable) = (self.received(), self.log.durable().position.lsn);
        connection.report(received, durable).await
    }

    fn take(&mut self, received: Received) -> Result<()> {
        match received {
            Received::Wal { start, server_end, bytes } => {
                let at = self.received();
                if start != at {
                    return Err(Error::postgres(format!("the server streams {start} where {at} was to come")));
                }
                if self.buffer.is_empty() {
                    self.oldest = Some(self.clock.monotonic());
                }
                self.buffer.extend_from_slice(&bytes);
                let (received, since) = (self.received(), self.waiting_since());
                self.note(|progress| {
                    progress.received = received;
                    progress.server = server_end.max(received);
                    progress.waiting_since = since;
                });
            }
            Received::KeepAlive { server_end, wants_reply } => {
                self.note(|progress| progress.server = server_end);
                if wants_reply {
                    // A server that stops asks like this until everything is confirmed.
                    self.hurry_until = self.received();
                }
            }
            Received::Ended => (),
        }
        Ok(())
    }

    /// Whether an entry is to be cut now.
    fn is_due(&self) -> bool {
        if self.buffer.is_empty() || self.log.in_flight() >= self.options.in_flight {
            return false;
        }
        let whole = self.cut() < self.buffer.len() || self.cut() == ENTRY_MAX || self.fills_segment();
        whole || self.due_at().is_some_and(|due| due <= self.clock.monotonic())
    }

    /// When the oldest byte of the buffer is to be on its way.
    fn due_at(&self) -> Option<Duration> {
        let oldest = self.oldest?;
        let hurried = *self.orders.borrow() != Order::Run || self.log.end().lsn < self.hurry_until;
        Some(match self.options.rpo {
            _ if hurried => oldest,
            // Alone, a commit goes at once; in company it waits a little for more, and saves requests.
            Duration::ZERO if self.log.in_flight() == 0 => oldest,
            Duration::ZERO => oldest + self.options.linger,
            _ => oldest + self.pace.hold(),
        })
    }

    /// Bytes of the buffer that go into the next entry: not too many, and of one segment only.
    fn cut(&self) -> usize {
        let left = self.segment_size - self.log.end().lsn.0 % self.segment_size;
        self.buffer.len().min(ENTRY_MAX).min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    fn fills_segment(&self) -> bool {
        (self.log.end().lsn.0 + self.cut() as u64).is_multiple_of(self.segment_size)
    }

    async fn append_some(&mut self) -> Result<()> {
        let plain = self.buffer.split_to(self.cut()).freeze();
        let now = self.clock.monotonic();
        let since = self.oldest.unwrap_or(now);
        self.oldest = (!self.buffer.is_empty()).then_some(now);
        let stored = compress(self.codec, plain.clone()).await?;
        let number = self.log.next_number();
        self.log.append_wal(&plain, stored.clone())?;
        let end = self.log.end();
        self.waiting.push_back(OnItsWay { end: end.lsn, since, sent: now });
        self.compactor.add(Frame { stored, plain: plain.len() as u64 }, crc32c::crc32c(&plain), end, number);
        self.last_append = self.clock.monotonic();
        self.note(|progress| progress.entries += 1);
        Ok(())
    }

    /// Whether the durable prefix has grown.
    fn landed(&mut self, durable: Durable) -> bool {
        let before = self.progress.borrow().durable;
        let now = self.clock.monotonic();
        let landed = self.waiting.iter().take_while(|entry| entry.end <= durable.position.lsn).count();
        for entry in self.waiting.drain(..landed) {
            let took = now.saturating_sub(entry.sent);
            if took > SLOW {
                let text = format!("WAL up to {} took {} ms to become durable", entry.end, took.as_millis());
                self.events.emit(Event::Note { level: Level::Detail, text });
            }
            self.pace.landed(took);
        }
        let since = self.waiting_since();
        self.note(|progress| {
            progress.opened = durable.number > 0;
            progress.durable = durable.position.lsn;
            progress.waiting_since = since;
        });
        durable.position.lsn > before
    }

    fn waiting_since(&self) -> Option<Duration> {
        self.waiting.front().map(|entry| entry.since).or(self.oldest)
    }

    fn note(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(change);
    }

    /// When something is to be done although nothing happens.
    fn next_alarm(&mut self, now: Duration) -> Duration {
        let never = now + Duration::from_secs(3600);
        let mut alarm = self.compactor.due().unwrap_or(never);
        if self.log.in_flight() < self.options.in_flight {
            alarm = alarm.min(self.due_at().filter(|_| !self.buffer.is_empty()).unwrap_or(never));
        }
        if !self.options.heartbeat.is_zero() && self.buffer.is_empty() && self.log.in_flight() == 0 {
            let beat = self.last_append + self.options.heartbeat;
            if beat <= now {
                self.last_append = now;
                // Only a log that was taken refuses; the next entry to land tells.
                let _ = self.log.append_heartbeat();
            }
            alarm = alarm.min(beat.max(now));
        }
        alarm
    }

    fn has_room(&self) -> bool {
        self.buffer.len() < ENTRY_MAX
    }

    /// Waits while there is no connection, and while there is no use for one; what is on its way goes on.
    async fn pass(&mut self, wait: Duration) -> Result<()> {
        let until = self.clock.monotonic() + wait;
        loop {
            let mut left = until.saturating_sub(self.clock.monotonic());
            if left.is_zero() && self.has_room() {
                return Ok(());
            }
            if !self.has_room() {
                left = REPORT;
            }
            while self.is_due() {
                self.append_some().await?;
            }
            tokio::select! {
                biased;
                landed = self.log.landed(), if self.log.in_flight() > 0 => drop(self.landed(landed?)),
                ordered = self.orders.changed() => {
                    if ordered.is_err() || self.is_over() {
                        return Ok(());
                    }
                }
                () = self.clock.sleep(left) => (),
            }
        }
    }

    /// Brings in what was received.
    async fn finish(&mut self) -> Result<()> {
        while !self.buffer.is_empty() || self.log.in_flight() > 0 {
            while !self.buffer.is_empty() && self.log.in_flight() < self.options.in_flight {
                self.append_some().await?;
            }
            let landed = self.log.landed().await?;
            self.landed(landed);
        }
        Ok(())
    }
}

/// Whether the server recovers: as it said when it let us in, or asked (before PostgreSQL 14).
pub async fn is_standby(said: Option<bool>, connect: &ConnectOptions, data_dir: &std::path::Path) -> Result<bool> {
    match said {
        Some(standby) => Ok(standby),
        None => Ok(Client::connect(connect, data_dir).await?.text("pg_is_in_recovery()").await? == "true"),
    }
}

async fn compress(codec: Codec, plain: Bytes) -> Result<Bytes> {
    if plain.len() <= SMALL {
        return codec.compress(&plain).map(Bytes::from);
    }
    let work = tokio::task::spawn_blocking(move || codec.compress(&plain)).await;
    work.map_err(|e| Error::new(Kind::Internal, "a compressing thread ended").source(e))?.map(Bytes::from)
}

/// Tells when WAL waits too long to become durable, once at the beginning and then now and again, and when it is over.
pub async fn watch_lag(mut progress: watch::Receiver<Progress>, limit: Duration, clock: Clock, events: Events) {
    const AGAIN: Duration = Duration::from_secs(60);
    let mut told: Option<Duration> = None;
    loop {
        clock.sleep(Duration::from_secs(1)).await;
        let now = clock.monotonic();
        let Progress { waiting_since, durable, .. } = *progress.borrow_and_update();
        let behind = waiting_since.map(|since| now.saturating_sub(since)).unwrap_or_default();
        if behind > limit && told.is_none_or(|told| now - told > AGAIN) {
            told = Some(now);
            events.emit(Event::LogLags { behind, durable });
        } else if behind <= limit && told.take().is_some() {
            events.info(format!("WAL reaches the repository again: durable up to {durable}"));
        }
    }
}

/// Brings in what a stopped server has on disk beyond what it streamed: its stream broke just before its end. `end` is
/// where its WAL ends.
pub async fn catch_up(log: &mut Appender, pusher: &Pusher, end: Lsn) -> Result<()> {
    let size = pusher.writer.claim.segment_size;
    while log.end().lsn < end {
        let (at, timeline) = (log.end().lsn, log.end().timeline);
        let number = size.number_at(at);
        let name = crate::wal::SegmentName::new(timeline, number, size);
        let path = pusher.data_dir.join("pg_wal").join(name.to_string());
        let content =
            std::fs::read(&path).map_err(|e| Error::local(format!("could not read {}", path.display()), e))?;
        let offset = at.bytes_since(size.start_of(number)) as usize;
        let until = (end.bytes_since(size.start_of(number)) as usize).min(content.len()).min(offset + ENTRY_MAX);
        let plain = Bytes::copy_from_slice(content.get(offset..until).unwrap_or_default());
        if plain.is_empty() {
            return Err(Error::damaged(format!("{} ends before {end}", path.display())));
        }
        let frame = compress(pusher.repository.descriptor().codec, plain.clone()).await?;
        log.append_wal(&plain, frame)?;
        while log.in_flight() > 0 {
            log.landed().await?;
        }
    }
    Ok(())
}
