//! Complete segments of the stream become one object each, made of the frames their log entries already have; after a
//! grace period the entries go.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};

use super::push::{Pusher, StreamedFrames};
use crate::disk;
use crate::error::{Error, Kind, Result};
use crate::events::Level;
use crate::model::Lsn;
use crate::repository::Frame;
use crate::repository::log::{Bound, Durable, LogRun, Position};
use crate::storage::Refused;
use crate::wal::{SegmentName, SegmentSize};

/// How long entries stay after their segment is stored: whoever reads the log's end right now must find them.
const GRACE: Duration = Duration::from_secs(600);

/// Complete segments whose frames are kept in memory until they are stored; of more, the file is compressed anew.
const KEPT: usize = 2;

const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A segment that the stream has brought whole.
#[derive(Debug)]
struct Complete {
    name: SegmentName,
    end: Lsn,
    /// The last log entry that holds a part of it.
    last_entry: u64,
    frames: Option<StreamedFrames>,
}

/// A segment that is stored, and since when.
#[derive(Debug, Clone, Copy)]
struct Stored {
    end: Position,
    last_entry: u64,
    at: Duration,
}

enum Done {
    Stored(Stored),
    Collected(Refused),
}

/// Works beside the stream, in the stream's own task.
pub(super) struct Compactor {
    pusher: Pusher,
    start: Lsn,
    size: SegmentSize,
    current: StreamedFrames,
    complete: VecDeque<Complete>,
    stored: VecDeque<Stored>,
    /// The first entry that was not collected.
    first_entry: u64,
    first_position: Option<Position>,
    storing: bool,
    collecting: bool,
    told_refusal: bool,
    work: FuturesUnordered<BoxFuture<'static, Result<Done>>>,
}

impl Compactor {
    /// For a log whose WAL begins at `start`.
    pub fn new(pusher: Pusher, start: Lsn) -> Compactor {
        Compactor {
            size: pusher.writer.claim.segment_size,
            pusher,
            start,
            current: StreamedFrames::default(),
            complete: VecDeque::new(),
            stored: VecDeque::new(),
            first_entry: 1,
            first_position: None,
            storing: false,
            collecting: false,
            told_refusal: false,
            work: FuturesUnordered::new(),
        }
    }

    /// Notes what an entry holds: WAL that ends at `end`.
    pub fn add(&mut self, frame: Frame, crc32c: u32, end: Position, entry: u64) {
        self.current.add(frame, crc32c);
        if end.lsn.0.is_multiple_of(self.size.bytes()) {
            let name = SegmentName::new(end.timeline, self.size.number_before(end.lsn), self.size);
            let frames = Some(std::mem::take(&mut self.current));
            self.complete.push_back(Complete { name, end: end.lsn, last_entry: entry, frames });
            let many = self.complete.len().saturating_sub(KEPT);
            self.complete.iter_mut().take(many).for_each(|segment| segment.frames = None);
        }
    }

    pub fn is_busy(&self) -> bool {
        !self.work.is_empty()
    }

    /// When there will be entries to collect.
    pub fn due(&self) -> Option<Duration> {
        self.stored.front().filter(|_| !self.collecting).map(|stored| stored.at + GRACE)
    }

    /// Starts what can be done now: a segment is stored once all its entries are durable.
    pub fn start(&mut self, durable: Durable) {
        if !self.storing && self.complete.front().is_some_and(|segment| segment.end <= durable.position.lsn) {
            let Some(segment) = self.complete.pop_front() else { return };
            let run = LogRun {
                generation: self.pusher.writer.claim.generation,
                timeline: durable.position.timeline,
                start: self.first_position.map_or(self.start, |position| position.lsn),
                end: durable.position.lsn,
                first: self.first_entry,
                next: durable.number + 1,
                at: self.pusher.repository.clock().now(),
            };
            self.storing = true;
            self.work.push(store(self.pusher.clone(), segment, run).boxed());
        }
        let now = self.pusher.repository.clock().monotonic();
        if self.due().is_some_and(|due| due <= now) {
            self.collect(now);
        }
    }

    fn collect(&mut self, now: Duration) {
        let old = self.stored.iter().take_while(|stored| stored.at + GRACE <= now).count();
        let Some(last) = self.stored.drain(..old).next_back() else { return };
        let (repository, generation) = (self.pusher.repository.clone(), self.pusher.writer.claim.generation);
        let (from, bound) = (self.first_entry, Bound::at(last.last_entry + 1, Some(last.end)));
        self.first_position = Some(last.end);
        self.first_entry = bound.number;
        self.collecting = true;
        let work = async move { Ok(Done::Collected(repository.collect_log(generation, from, &bound).await?)) };
        self.work.push(work.boxed());
    }

    /// Waits for some work to end. Dropping the future loses nothing.
    pub async fn progress(&mut self) -> Result<()> {
        match self.work.next().await {
            Some(Ok(Done::Stored(stored))) => {
                self.storing = false;
                self.stored.push_back(stored);
            }
            Some(Ok(Done::Collected(refused))) => {
                self.collecting = false;
                self.tell(&refused);
            }
            // What was not collected stays; the next bound is a higher one all the same.
            Some(Err(error)) if self.collecting && error.kind() != Kind::Conflict && error.kind() != Kind::Damaged => {
                self.collecting = false;
                self.pusher.events.emit(crate::events::Event::Note {
                    level: Level::Warning,
                    text: format!("entries of the log that are not needed any more could not be deleted: {error}"),
                });
            }
            Some(Err(error)) => return Err(error),
            None => (),
        }
        Ok(())
    }
}

impl Compactor {
    /// Once: a store that keeps everything says so with every segment.
    fn tell(&mut self, refused: &Refused) {
        if let (Some(why), false) = (&refused.why, self.told_refusal) {
            self.told_refusal = true;
            self.pusher.events.warning(format!(
                "the store does not let entries of the log go that whole segments have by now; once this generation was replaced a prune tries again: {why}"
            ));
        }
    }
}

/// Stores a segment; tried until it works, because nothing is lost by waiting: its log entries stay meanwhile.
async fn store(pusher: Pusher, mut segment: Complete, run: LogRun) -> Result<Done> {
    let mut wait = FIRST_WAIT;
    let clock = pusher.repository.clock().clone();
    loop {
        let outcome = try_to_store(&pusher, &mut segment, &run).await;
        match outcome {
            Ok(()) => {
                let end = Position { timeline: segment.name.timeline, lsn: segment.end };
                return Ok(Done::Stored(Stored { end, last_entry: segment.last_entry, at: clock.monotonic() }));
            }
            Err(error) if matches!(error.kind(), Kind::Conflict | Kind::Damaged | Kind::Refused) => return Err(error),
            Err(error) => {
                pusher.events.info(format!("{} is not stored as a whole yet: {error}", segment.name));
                clock.sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }
}

async fn try_to_store(pusher: &Pusher, segment: &mut Complete, run: &LogRun) -> Result<()> {
    let path = pusher.data_dir.join("pg_wal").join(segment.name.to_string());
    let content = match read_file(&path).await? {
        Some(content) => content,
        // The server may recycle what we have confirmed.
        None => read_log(pusher, segment, run).await?,
    };
    pusher.push_streamed(segment.name, content, segment.frames.clone()).await
}

async fn read_file(path: &Path) -> Result<Option<Bytes>> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || disk::read_if_there(&path)).await;
    Ok(read.map_err(|e| Error::internal("a reading thread ended").source(e))??.map(Bytes::from))
}

async fn read_log(pusher: &Pusher, segment: &Complete, run: &LogRun) -> Result<Bytes> {
    let size = pusher.writer.claim.segment_size.bytes();
    let mut content = Vec::with_capacity(size as usize);
    let write = |_, piece: &[u8]| {
        content.extend_from_slice(piece);
        Ok(())
    };
    pusher.repository.read_log(run, Lsn(segment.end.0 - size), segment.end, write).await?;
    Ok(Bytes::from(content))
}
