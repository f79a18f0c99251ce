//! The collection bound: entries below it may be gone, because their WAL is in whole segments.

use futures::TryStreamExt;
use serde::{Deserialize, Serialize};

use super::Position;
use crate::error::Result;
use crate::model::{Generation, Timestamp};
use crate::repository::{DOCUMENT_MAX, Repository, document, layout};
use crate::storage::{Body, Deleted, Entry, Refused, delete_if_allowed, read_small};

/// `collected/<n>`: entries below `number` may be gone. The highest one counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Always `perennial/collected`.
    pub kind: String,
    pub format: u32,
    /// The first entry that must still be there.
    pub number: u64,
    /// Where WAL begins with it; `None` while nothing was collected.
    pub position: Option<Position>,
}

impl Bound {
    pub fn at(number: u64, position: Option<Position>) -> Bound {
        Bound { kind: "perennial/collected".to_owned(), format: 1, number, position }
    }
}

impl Repository {
    /// The number of a log's bound alone.
    pub async fn log_bound_number(&self, generation: Generation) -> Result<u64> {
        let level = self.store.list_level(&layout::collected_dir(generation)).await?;
        let numbers = level.entries.iter().filter_map(|entry| layout::parse_collected(&entry.key));
        Ok(numbers.map(|(_, number)| number).max().unwrap_or(1))
    }

    /// The bound of a log: 1 while nothing was collected.
    pub async fn log_bound(&self, generation: Generation) -> Result<Bound> {
        let number = self.log_bound_number(generation).await?;
        if number == 1 {
            return Ok(Bound::at(1, None));
        }
        let key = layout::collected(generation, number);
        let Some(bytes) = read_small(self.store(), &key, DOCUMENT_MAX).await? else {
            // Only a higher one makes it go.
            return Err(self.missing(&key).retryable());
        };
        let bound: Bound = document::read(&bytes).map_err(|why| self.corrupt(&key, why))?;
        if bound.number != number || bound.kind != "perennial/collected" {
            return Err(self.corrupt(&key, "it is not the bound its name says"));
        }
        Ok(bound)
    }

    /// When the newest entry of a log was written, by the store's clock; `None` for a log without entries.
    pub async fn log_written_at(&self, generation: Generation) -> Result<Option<Timestamp>> {
        let entries: Vec<_> = self.store.list(&layout::log_dir(generation), None).try_collect().await?;
        Ok(entries.iter().map(|entry| entry.modified).max())
    }

    /// Passes all entries of a replaced writer's log but its seal, so that they can go. Only for a log whose WAL nobody needs;
    /// one that was not sealed, or never opened, is left alone.
    pub async fn pass_whole_log(&self, generation: Generation) -> Result<()> {
        let view = self.log(generation).await?;
        let (Some(seal), Some(end)) = (&view.seal, view.end()) else { return Ok(()) };
        if seal.number == view.bound.number {
            return Ok(());
        }
        self.put_bound(generation, &Bound::at(seal.number, Some(end))).await
    }

    /// Entries that a log's bound has passed and that are there still: deleting them was never begun, interrupted or refused.
    pub async fn passed_entries(&self, generation: Generation) -> Result<Vec<Entry>> {
        let bound = self.log_bound_number(generation).await?;
        if bound == 1 {
            return Ok(Vec::new());
        }
        let entries: Vec<Entry> = self.store.list(&layout::log_dir(generation), None).try_collect().await?;
        let is_passed = |entry: &Entry| layout::parse_log_entry(&entry.key).is_some_and(|(_, number)| number < bound);
        Ok(entries.into_iter().filter(is_passed).collect())
    }

    /// Lets the entries from `from` to below the bound go. Only their writer may call it, once their WAL is in whole
    /// segments. Whatever is interrupted or refused is left behind; nothing needed is missing.
    pub async fn collect_log(&self, generation: Generation, from: u64, bound: &Bound) -> Result<Refused> {
        self.put_bound(generation, bound).await?;
        let mut deleted = Deleted::default();
        deleted
            .all(self.store(), (from..bound.number).map(|number| (layout::log_entry(generation, number), 0)))
            .await?;
        self.forget_bounds(generation, bound.number).await?;
        Ok(deleted.refused)
    }

    async fn put_bound(&self, generation: Generation, bound: &Bound) -> Result<()> {
        let key = layout::collected(generation, bound.number);
        self.store.create(&key, &Body::from(document::write(bound)?)).await.map(drop)
    }

    /// Lets all bounds below this one go but the last: a listing of a directory on a disk may miss both a file that comes and
    /// one that goes.
    pub async fn forget_bounds(&self, generation: Generation, bound: u64) -> Result<()> {
        let level = self.store.list_level(&layout::collected_dir(generation)).await?;
        let numbers = level.entries.iter().filter_map(|entry| layout::parse_collected(&entry.key));
        let mut older: Vec<u64> = numbers.map(|(_, number)| number).filter(|number| *number < bound).collect();
        older.sort_unstable();
        older.pop();
        for number in older {
            delete_if_allowed(self.store(), &layout::collected(generation, number)).await?;
        }
        Ok(())
    }
}
