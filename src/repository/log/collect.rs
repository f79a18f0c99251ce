//! The collection bound: entries below it may be gone, because their WAL is in whole segments.

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::Position;
use crate::error::Result;
use crate::model::{Generation, Timestamp};
use crate::repository::{DOCUMENT_MAX, Repository, document, layout};
use crate::storage::{Body, read_small};

/// Entries deleted at once.
const PARALLEL: usize = 16;

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

    /// Lets all entries of a replaced writer's log go but its seal. Only for a log whose WAL nobody needs; one that was
    /// not sealed, or never opened, is left alone.
    pub async fn collect_whole_log(&self, generation: Generation) -> Result<()> {
        let view = self.log(generation).await?;
        let (Some(seal), Some(end)) = (&view.seal, view.end()) else { return Ok(()) };
        if seal.number == view.bound.number {
            return Ok(());
        }
        self.collect_log(generation, view.bound.number, &Bound::at(seal.number, Some(end))).await
    }

    /// Lets the entries from `from` to below the bound go. Only their writer may call it, once their WAL is in whole
    /// segments, or whoever prunes, once the log is sealed. Whatever is interrupted is done by the next call or left behind; nothing needed is missing.
    pub async fn collect_log(&self, generation: Generation, from: u64, bound: &Bound) -> Result<()> {
        self.store.create(&layout::collected(generation, bound.number), &Body::from(document::write(bound)?)).await?;
        let delete = |number| {
            let (store, key) = (std::sync::Arc::clone(&self.store), layout::log_entry(generation, number));
            async move { store.delete(&key).await }
        };
        futures::stream::iter((from..bound.number).map(delete))
            .buffer_unordered(PARALLEL)
            .try_for_each(|()| std::future::ready(Ok(())))
            .await?;
        let level = self.store.list_level(&layout::collected_dir(generation)).await?;
        let numbers = level.entries.iter().filter_map(|entry| layout::parse_collected(&entry.key));
        let mut older: Vec<u64> = numbers.map(|(_, number)| number).filter(|number| *number < bound.number).collect();
        older.sort_unstable();
        // The last one stays: a listing of a directory on a disk may miss both a file that comes and one that goes.
        older.pop();
        for number in older {
            self.store.delete(&layout::collected(generation, number)).await?;
        }
        Ok(())
    }
}
