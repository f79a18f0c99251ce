//! The WAL of one generation: segments, then the log. What is collected from the log while it is copied is in whole segments
//! by then, so both are listed again until the bound stands still.

use futures::{StreamExt, TryStreamExt};

use super::objects::{PARALLEL, SMALL};
use super::{Copy, Report};
use crate::error::{Error, Kind, Result};
use crate::model::Generation;
use crate::repository::layout;
use crate::storage::{Deleted, Entry, Store, delete_if_allowed};

/// Listings of a log that is collected while it is copied.
const LOOKS: u32 = 8;

/// How a look at a log that may be collected meanwhile ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It is as it was.
    Done,
    /// Some of it was collected since, after we had it.
    Moved,
    /// Some of it was gone before we had it.
    Missed,
}

impl Copy {
    pub(super) async fn wal(&self, generation: Generation, report: &mut Report) -> Result<()> {
        let mut look = Look::Missed;
        for _ in 0..LOOKS {
            look = self.look(generation, report).await?;
            if look == Look::Done {
                return Ok(());
            }
        }
        if look == Look::Moved {
            // A busy one: what has moved since comes with the next copy.
            return Ok(());
        }
        Err(Error::new(
            Kind::Unreachable,
            format!("the log of generation {generation} is collected faster than it can be copied"),
        )
        .hint("try again, or copy from nearer to the source"))
    }

    async fn look(&self, generation: Generation, report: &mut Report) -> Result<Look> {
        // Segments are stored before the bound passes their entries, so those below it are listed after it.
        let bound = bound(&*self.from, generation).await?;
        self.missing_in_order(&layout::wal_dir(generation), &|_| true, report).await?;
        if bound > 1 {
            let key = layout::collected(generation, bound);
            // Only a higher one makes it go.
            let Some(body) = self.read(&key, SMALL).await? else { return Ok(Look::Missed) };
            report.add(self.put_same(&key, &body).await?);
            self.collect(generation, bound).await?;
        }
        let Some(behind) = self.entries(generation, bound, report).await? else { return Ok(Look::Missed) };
        let now = self::bound(&*self.from, generation).await?;
        Ok(match now {
            now if now == bound => Look::Done,
            now if now <= behind => Look::Moved,
            _ => Look::Missed,
        })
    }

    /// Copies the entries from the bound to the first hole, a few on their way at once as their writer does, the last one
    /// alone: a seal that says "released" is there only after all before it. The number behind them; `None` when some were
    /// collected meanwhile. What lies behind a hole never counted, or was not there yet.
    async fn entries(&self, generation: Generation, bound: u64, report: &mut Report) -> Result<Option<u64>> {
        let before = layout::log_entry(generation, bound - 1);
        let there = listed(&*self.to, generation, &before).await?;
        let mut wanted = listed(&*self.from, generation, &before).await?;
        let mut behind = bound;
        wanted.retain(|(number, _)| {
            let next = *number == behind;
            behind += u64::from(next);
            next
        });
        if wanted.is_empty() && !listed(&*self.from, generation, &before).await?.is_empty() {
            return Ok(None);
        }
        // The last of both are compared: there may be the seal of whoever booted the copy.
        let lasts = [there.last(), wanted.last()].map(|last| last.map(|(number, _)| *number));
        let has = |number: u64| there.binary_search_by_key(&number, |(number, _)| *number).is_ok();
        wanted.retain(|(number, _)| !has(*number) || lasts.contains(&Some(*number)));
        let last = wanted.pop();
        let copies: Vec<_> = wanted.into_iter().map(|(_, entry)| self.entry(entry)).collect();
        let mut copies = futures::stream::iter(copies).buffered(PARALLEL);
        while let Some(copied) = copies.try_next().await? {
            let Some(bytes) = copied else { return Ok(None) };
            report.add(bytes);
        }
        drop(copies);
        if let Some((_, entry)) = last {
            let Some(bytes) = self.entry(entry).await? else { return Ok(None) };
            report.add(bytes);
        }
        Ok(Some(behind))
    }

    async fn entry(&self, entry: Entry) -> Result<Option<Option<u64>>> {
        match self.read(&entry.key, entry.size).await? {
            Some(body) => self.put_same(&entry.key, &body).await.map(Some),
            None => Ok(None),
        }
    }

    /// Lets go in the copy what its bound has passed, as its writer does at the source.
    async fn collect(&self, generation: Generation, bound: u64) -> Result<()> {
        let mut passed = listed(&*self.to, generation, "").await?;
        passed.retain(|(number, _)| *number < bound);
        // A place that keeps everything keeps these too.
        Deleted::default().all(&*self.to, passed.into_iter().map(|(_, entry)| (entry.key, entry.size))).await?;
        let mut older = bounds(&*self.to, generation).await?;
        older.retain(|number| *number < bound);
        older.pop();
        for number in older {
            delete_if_allowed(&*self.to, &layout::collected(generation, number)).await?;
        }
        Ok(())
    }
}

/// The entries of a log behind a key, by number.
async fn listed(store: &dyn Store, generation: Generation, after: &str) -> Result<Vec<(u64, Entry)>> {
    let after = (!after.is_empty()).then_some(after);
    let entries: Vec<Entry> = store.list(&layout::log_dir(generation), after).try_collect().await?;
    let number = |entry: Entry| layout::parse_log_entry(&entry.key).map(|(_, number)| (number, entry));
    let mut entries: Vec<_> = entries.into_iter().filter_map(number).collect();
    entries.sort_by_key(|(number, _)| *number);
    Ok(entries)
}

async fn bound(store: &dyn Store, generation: Generation) -> Result<u64> {
    Ok(bounds(store, generation).await?.last().copied().unwrap_or(1))
}

async fn bounds(store: &dyn Store, generation: Generation) -> Result<Vec<u64>> {
    let level = store.list_level(&layout::collected_dir(generation)).await?;
    let numbers = level.entries.iter().filter_map(|entry| layout::parse_collected(&entry.key));
    let mut numbers: Vec<u64> = numbers.map(|(_, number)| number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
