//! The writing end of a log: entries frozen in order, several on their way at once, acknowledged in order.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};

use super::entry::{self, FORMAT};
use super::{Checks, Content, EntryHead, IN_FLIGHT_MAX, Position};
use crate::error::{Error, Kind, Result};
use crate::model::{Generation, WriteId};
use crate::repository::codec::Sha256;
use crate::repository::{Repository, layout};
use crate::storage::{Body, Created, HEAD};

/// Between two tries of one entry. It is tried for as long as the writer lives: nothing can go past it.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How far everything is safe: the last entry of the contiguous prefix, and where WAL ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    pub number: u64,
    pub position: Position,
}

/// How the try to put an entry ended.
enum Landing {
    Ours,
    /// Another's object is there: most likely a seal.
    Taken(EntryHead),
}

/// The one writer of one log.
pub struct Appender {
    repository: Repository,
    generation: Generation,
    checks: Checks,
    previous: Option<Sha256>,
    /// The end of everything that was appended.
    end: Position,
    durable: Durable,
    /// Entries after `durable`, in order: where WAL ends with each, and whether it has landed.
    waiting: VecDeque<(Position, bool)>,
    in_flight: FuturesUnordered<BoxFuture<'static, Result<(u64, Landing)>>>,
    fenced: Option<EntryHead>,
}

impl std::fmt::Debug for Appender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Appender({}, durable {:?}, {} waiting)", self.generation, self.durable, self.waiting.len())
    }
}

impl Appender {
    /// Opens the log of a generation that this process has claimed. The first entry is on its way when this returns; no
    /// client may be served before it has landed.
    pub fn open(
        repository: Repository,
        generation: Generation,
        start: Position,
        heartbeat: Duration,
        checks: Checks,
    ) -> Result<Appender> {
        let mut appender = Appender {
            repository,
            generation,
            checks,
            previous: None,
            end: start,
            durable: Durable { number: 0, position: start },
            waiting: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            fenced: None,
        };
        let Position { timeline, lsn } = start;
        appender.append(Content::Open { timeline, lsn, heartbeat_seconds: heartbeat.as_secs() }, None)?;
        Ok(appender)
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub fn durable(&self) -> Durable {
        self.durable
    }

    /// The end of everything that was appended, durable or not.
    pub fn end(&self) -> Position {
        self.end
    }

    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// The number the next entry will have.
    pub fn next_number(&self) -> u64 {
        self.durable.number + self.waiting.len() as u64 + 1
    }

    /// Appends WAL that continues what was appended before; `frame` is its compressed form.
    pub fn append_wal(&mut self, plain: &[u8], frame: Bytes) -> Result<()> {
        let Position { timeline, lsn: start } = self.end;
        let end = crate::model::Lsn(start.0 + plain.len() as u64);
        self.append(Content::Wal { timeline, start, end, crc32c: crc32c::crc32c(plain) }, Some(frame))
    }

    pub fn append_heartbeat(&mut self) -> Result<()> {
        let Position { timeline, lsn } = self.end;
        self.append(Content::Heartbeat { timeline, lsn }, None)
    }

    /// Ends the log at a clean stop, so that the next writer need not wait. Everything before must be durable.
    pub async fn release(mut self) -> Result<Durable> {
        self.append(Content::Seal { by: self.generation, released: true }, None)?;
        while self.in_flight() > 0 {
            self.landed().await?;
        }
        Ok(self.durable)
    }

    fn append(&mut self, content: Content, frame: Option<Bytes>) -> Result<()> {
        if self.waiting.len() >= IN_FLIGHT_MAX {
            return Err(Error::internal("more entries on their way than the format allows"));
        }
        if let Some(taken) = &self.fenced {
            return Err(fenced(self.generation, taken));
        }
        let clock = self.repository.clock();
        let head = EntryHead {
            format: FORMAT.to_owned(),
            write_id: WriteId(clock.random()),
            generation: self.generation,
            number: self.next_number(),
            at: clock.now(),
            previous: self.previous,
            content,
        };
        let (body, hash) = entry::encode(&head, frame)?;
        self.previous = Some(hash);
        self.end = content.end().unwrap_or(self.end);
        self.waiting.push_back((self.end, false));
        self.in_flight.push(put(self.repository.clone(), head, body, self.checks).boxed());
        Ok(())
    }

    /// Waits until another entry has landed; then how far everything is durable. Must not be called with nothing on its
    /// way. Dropping the future loses nothing.
    pub async fn landed(&mut self) -> Result<Durable> {
        if let Some(taken) = &self.fenced {
            return Err(fenced(self.generation, taken));
        }
        let landing = self.in_flight.next().await;
        match landing.ok_or_else(|| Error::internal("nothing was on its way"))?? {
            (number, Landing::Ours) => self.note(number),
            (_, Landing::Taken(head)) => {
                let error = fenced(self.generation, &head);
                self.fenced = Some(head);
                return Err(error);
            }
        }
        Ok(self.durable)
    }

    fn note(&mut self, number: u64) {
        let index = (number - self.durable.number - 1) as usize;
        if let Some((_, landed)) = self.waiting.get_mut(index) {
            *landed = true;
        }
        while let Some((position, _)) = self.waiting.front().filter(|(_, landed)| *landed) {
            self.durable = Durable { number: self.durable.number + 1, position: *position };
            self.waiting.pop_front();
        }
    }
}

/// Puts one entry until it is known whose object has its place.
async fn put(repository: Repository, head: EntryHead, body: Body, checks: Checks) -> Result<(u64, Landing)> {
    let mut wait = FIRST_WAIT;
    loop {
        match try_to_put(&repository, &head, &body, checks).await {
            Ok(landing) => return Ok((head.number, landing)),
            // Whatever it is, it may pass: an outage, credentials that are renewed. The lag is told by others.
            Err(error) if error.kind() != Kind::Damaged => {
                repository.clock().sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
            Err(error) => return Err(error),
        }
    }
}

async fn try_to_put(repository: &Repository, head: &EntryHead, body: &Body, checks: Checks) -> Result<Landing> {
    let key = layout::log_entry(head.generation, head.number);
    if repository.store.create(&key, body).await? == Created::Now || !checks.write_id {
        return Ok(Landing::Ours);
    }
    let there = repository.must_read(&key, 0..HEAD).await?;
    let (there, _) = entry::decode_head(repository, head.generation, head.number, &there.bytes)?;
    Ok(if there.write_id == head.write_id { Landing::Ours } else { Landing::Taken(there) })
}

/// Another has taken the log from us.
fn fenced(generation: Generation, taken: &EntryHead) -> Error {
    let by = match taken.content {
        Content::Seal { by, .. } => format!("generation {by} has taken over"),
        _ => "another process writes under the same generation".to_owned(),
    };
    Error::new(Kind::Fenced, format!("generation {generation} was ended at entry {} of its log: {by}", taken.number))
        .hint("another machine is the database now; see `perennial list`. This one's directory is kept as it is")
}
