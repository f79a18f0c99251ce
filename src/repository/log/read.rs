//! The reading end of a log: how far it goes, and its WAL.

use futures::{StreamExt, TryStreamExt};

use super::entry::{self, Entry};
use super::{Bound, Content, EntryHead, IN_FLIGHT_MAX, Position};
use crate::error::{Error, Kind, Result};
use crate::model::{Generation, Lsn, Timeline, Timestamp};
use crate::repository::{Repository, layout};
use crate::storage::HEAD;

/// The entries at the end among which the first seal must be: behind it lies at most what its writer had on its way, and
/// seals that others put there.
const WINDOW: u64 = 3 * IN_FLIGHT_MAX as u64;

/// Entries behind a hole that are looked at.
const BEYOND: usize = 3 * IN_FLIGHT_MAX;

/// Looks at a log that changes while it is looked at.
const LOOKS: u32 = 8;

/// Heads of entries read at once.
const PARALLEL: usize = 16;

/// Entries read at once, as their size allows: those of single commits are small and many.
const PARALLEL_ENTRIES: std::ops::RangeInclusive<u64> = 8..=64;
const PARALLEL_BYTES: u64 = 32 << 20;

/// An entry's object is never larger: WAL that does not compress, and the head.
const OBJECT_MAX: u64 = (super::ENTRY_MAX + super::ENTRY_MAX / 128 + (64 << 10) + 1024) as u64;

/// A log as it was found. Once sealed it stays like this, but for what is collected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogView {
    pub generation: Generation,
    pub bound: Bound,
    /// The first number after the entries that count: the seal's, or the first free one.
    pub next: u64,
    /// The entry before it, if it was not collected.
    pub last: Option<EntryHead>,
    pub seal: Option<EntryHead>,
}

impl LogView {
    /// Where its WAL ends; `None` for a log that was never opened.
    pub fn end(&self) -> Option<Position> {
        self.last.as_ref().and_then(|head| head.content.end()).or(self.bound.position)
    }

    pub fn is_released(&self) -> bool {
        self.seal.as_ref().is_some_and(|seal| matches!(seal.content, Content::Seal { released: true, .. }))
    }
}

/// The WAL of one log that can be read from its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRun {
    pub generation: Generation,
    pub timeline: Timeline,
    pub start: Lsn,
    pub end: Lsn,
    /// The first entry and the one after the last.
    pub first: u64,
    pub next: u64,
    /// When its last entry was written, by the writer's clock.
    pub at: Timestamp,
}

/// How many of `entries` that hold `bytes` are read at once.
fn parallel(bytes: u64, entries: u64) -> usize {
    let average = (bytes / entries.max(1)).max(1);
    (PARALLEL_BYTES / average).clamp(*PARALLEL_ENTRIES.start(), *PARALLEL_ENTRIES.end()) as usize
}

impl Repository {
    /// Looks how far a log goes.
    pub async fn log(&self, generation: Generation) -> Result<LogView> {
        while_it_changes(|| self.look(generation)).await
    }

    /// The same, and the WAL that can be read from its entries now; `None` when it has none.
    pub async fn log_and_run(&self, generation: Generation) -> Result<(LogView, Option<LogRun>)> {
        while_it_changes(|| async {
            let view = self.look(generation).await?;
            let run = self.log_run(&view).await?;
            Ok((view, run))
        })
        .await
    }

    async fn look(&self, generation: Generation) -> Result<LogView> {
        let bound = self.log_bound(generation).await?;
        let (free, beyond) = self.first_free(generation, bound.number).await?;
        // The hole may be what was collected while we listed. If the bound has not passed it now, it was one.
        if self.log_bound_number(generation).await? > free {
            return Err(self.missing(&layout::log_entry(generation, free)).retryable());
        }
        if let Err(error) = self.check_hole(generation, free, &beyond).await {
            // A listing of several pages is not of one moment: the hole may have been filled since.
            let filled = self.store.read(&layout::log_entry(generation, free), 0..1).await?.is_some();
            return Err(if filled { error.retryable() } else { error });
        }
        let from = free.saturating_sub(WINDOW).max(bound.number);
        let heads: Vec<EntryHead> = futures::stream::iter(from..free)
            .map(|number| self.entry_head(generation, number))
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        let seal = heads.iter().find(|head| head.is_seal()).cloned();
        // A late seal can have been put where an entry was collected while we listed: it ends nothing. One that the bound
        // has not passed by now, after it was seen, was the first at its number.
        if let Some(seal) = &seal
            && self.log_bound_number(generation).await? > seal.number
        {
            return Err(self.missing(&layout::log_entry(generation, seal.number)).retryable());
        }
        let next = seal.as_ref().map_or(free, |seal| seal.number);
        let last = heads.into_iter().rev().find(|head| head.number < next);
        Ok(LogView { generation, bound, next, last, seal })
    }

    /// The first number from `from` on that no object has, and the first numbers behind it that have one.
    async fn first_free(&self, generation: Generation, from: u64) -> Result<(u64, Vec<u64>)> {
        let before = layout::log_entry(generation, from - 1);
        let mut listing = self.store.list(&layout::log_dir(generation), Some(&before));
        let (mut free, mut beyond) = (from, Vec::new());
        while let Some(entry) = listing.try_next().await? {
            match layout::parse_log_entry(&entry.key) {
                Some((_, number)) if number == free && beyond.is_empty() => free += 1,
                Some((_, number)) if number > free && beyond.len() < BEYOND => beyond.push(number),
                Some((_, number)) if number > free => break,
                _ => (),
            }
        }
        Ok((free, beyond))
    }

    /// Behind a hole may lie what its writer had on its way, and seals of others. Anything else says that the hole is an
    /// entry that was there and is not any more.
    async fn check_hole(&self, generation: Generation, free: u64, beyond: &[u64]) -> Result<()> {
        for number in beyond {
            let on_its_way = *number < free + IN_FLIGHT_MAX as u64;
            let explained = match self.entry_head(generation, *number).await?.content {
                // A writer releases its log only when everything before is there.
                Content::Seal { released, .. } => !released,
                _ => on_its_way,
            };
            if !explained {
                let missing = self.missing(&layout::log_entry(generation, free));
                return Err(missing.context(format!("the log goes on at entry {number}")));
            }
        }
        Ok(())
    }

    async fn entry_head(&self, generation: Generation, number: u64) -> Result<EntryHead> {
        let key = layout::log_entry(generation, number);
        let chunk = self.store.read(&key, 0..HEAD).await?.ok_or_else(|| self.missing(&key).retryable())?;
        Ok(entry::decode_head(self, generation, number, &chunk.bytes)?.0)
    }

    /// The same of an entry below the end of a log. A seal there says that it was collected since: look again.
    async fn wal_head_of(&self, generation: Generation, number: u64) -> Result<EntryHead> {
        let head = self.entry_head(generation, number).await?;
        if head.is_seal() { Err(self.replaced(generation, number)) } else { Ok(head) }
    }

    /// A late seal of a claimant who was too slow.
    fn replaced(&self, generation: Generation, number: u64) -> Error {
        self.missing(&layout::log_entry(generation, number)).context("a seal has its place").retryable()
    }

    async fn entry(&self, generation: Generation, number: u64) -> Result<Entry> {
        let there = self.entry_if_there(generation, number).await?;
        there.ok_or_else(|| self.missing(&layout::log_entry(generation, number)).retryable())
    }

    pub(super) async fn entry_if_there(&self, generation: Generation, number: u64) -> Result<Option<Entry>> {
        let key = layout::log_entry(generation, number);
        let Some(chunk) = self.store.read(&key, 0..OBJECT_MAX).await? else { return Ok(None) };
        entry::decode(self, generation, number, &chunk.bytes).map(Some)
    }

    /// The WAL that can be read from the entries of a log that was looked at just now. An error that may be retried says
    /// that entries were collected since: look again.
    pub async fn log_run(&self, view: &LogView) -> Result<Option<LogRun>> {
        Ok(self.extent(view).await?.filter(|run| run.start < run.end))
    }

    /// The same; of a log that was opened and has no WAL yet, too.
    pub(super) async fn extent(&self, view: &LogView) -> Result<Option<LogRun>> {
        let Some(end) = view.end() else { return Ok(None) };
        let first = view.bound.number;
        let start = match view.bound.position {
            Some(position) => position.lsn,
            None => match self.wal_head_of(view.generation, first).await?.content {
                Content::Open { lsn, .. } => lsn,
                _ => return Err(self.corrupt(&layout::log_entry(view.generation, first), "a log starts with 'open'")),
            },
        };
        let run = LogRun {
            generation: view.generation,
            timeline: end.timeline,
            start,
            end: end.lsn,
            first,
            next: view.next,
            at: view.last.as_ref().map_or(Timestamp::from_unix_micros(0), |head| head.at),
        };
        Ok(Some(run))
    }

    /// Reads the WAL from `from` to `to` out of a log's entries, in order: each piece with its position. Entries are
    /// checked one by one, and each against the one before it. An error that may be retried says that entries were
    /// collected meanwhile: their WAL is in whole segments, look again.
    pub async fn read_log(
        &self,
        run: &LogRun,
        from: Lsn,
        to: Lsn,
        mut write: impl FnMut(Lsn, &[u8]) -> Result<()>,
    ) -> Result<()> {
        if from < run.start || to > run.end || from > to {
            return Err(Error::internal(format!("{from} to {to} is not in the log's {} to {}", run.start, run.end)));
        }
        let first = self.entry_that_passes(run, from).await?;
        // Nothing behind `to` is read: what is held at once is never more than what was asked for, and an entry.
        let behind = if to == run.end { run.next } else { (self.entry_that_passes(run, to).await? + 1).min(run.next) };
        let mut entries = futures::stream::iter(first..behind)
            .map(|number| self.entry(run.generation, number))
            .buffered(parallel(to.bytes_since(from), behind - first));
        let (mut at, mut before) = (from, None);
        while at < to {
            let Some(entry) = entries.try_next().await? else { break };
            let key = || layout::log_entry(run.generation, entry.head.number);
            if entry.head.is_seal() {
                return Err(self.replaced(run.generation, entry.head.number));
            }
            if before.is_some_and(|before| entry.head.previous != Some(before)) {
                return Err(self.corrupt(&key(), "it does not continue the entry before it"));
            }
            before = Some(entry.sha256);
            let Content::Wal { timeline, start, end, .. } = entry.head.content else { continue };
            if timeline != run.timeline || start > at || end < at {
                return Err(self.corrupt(&key(), format!("it holds {start} to {end}, {at} was to come")));
            }
            let piece = &entry.plain[at.bytes_since(start) as usize..end.0.min(to.0).saturating_sub(start.0) as usize];
            write(at, piece)?;
            at = Lsn(at.0 + piece.len() as u64);
        }
        if at < to {
            return Err(self
                .corrupt(&layout::log_entry(run.generation, run.next), format!("the log ends at {at}, not at {to}")));
        }
        Ok(())
    }

    /// The first entry whose WAL goes past `lsn`, by halving: positions grow with numbers.
    async fn entry_that_passes(&self, run: &LogRun, lsn: Lsn) -> Result<u64> {
        let (mut low, mut high) = (run.first, run.next);
        while low < high {
            let middle = low + (high - low) / 2;
            let end = self.wal_head_of(run.generation, middle).await?.content.end();
            if end.is_some_and(|end| end.lsn > lsn) { high = middle } else { low = middle + 1 }
        }
        Ok(low)
    }
}

/// Looks again when an entry went while we looked.
pub(crate) async fn while_it_changes<T, F: Future<Output = Result<T>>>(mut look: impl FnMut() -> F) -> Result<T> {
    let mut looks = 0;
    loop {
        match look().await {
            Err(error) if error.kind() == Kind::Damaged && error.is_retryable() && looks < LOOKS => looks += 1,
            answer => return answer,
        }
    }
}
