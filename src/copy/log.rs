//! The WAL of one generation: segments, then the log. What is collected from the log while it is copied is in whole segments
//! by then, so both are listed again until the bound stands still.

use futures::{StreamExt, TryStreamExt};

use super::{Copy, PARALLEL, Report, SMALL};
use crate::error::{Error, Kind, Result};
use crate::model::Generation;
use crate::repository::layout;
use crate::storage::{Entry, Store};

/// Listings of a log that is collected while it is copied.
const LOOKS: u32 = 8;

impl Copy {
    pub(super) async fn wal(&self, generation: Generation, report: &mut Report) -> Result<()> {
        for _ in 0..LOOKS {
            // Segments are stored before the bound passes their entries, so those below it are listed after it.
            let bound = self.bound(generation).await?;
            self.missing_below(&layout::wal_dir(generation), report).await?;
            if bound > 1 {
                let key = layout::collected(generation, bound);
                // Only a higher one makes it go.
                let Some(body) = self.read(&key, SMALL).await? else { continue };
                report.add(self.put_same(&key, &body).await?);
            }
            if self.entries(generation, bound, report).await? {
                return Ok(());
            }
        }
        Err(Error::new(
            Kind::Unreachable,
            format!("the log of generation {generation} is collected faster than it can be copied"),
        )
        .hint("try again, or copy from nearer to the source"))
    }

    /// Copies the entries from the bound on, in order but for a few on their way at once, as their writer does; `false` when
    /// one was collected meanwhile.
    async fn entries(&self, generation: Generation, bound: u64, report: &mut Report) -> Result<bool> {
        let before = layout::log_entry(generation, bound - 1);
        let there = self.listed(&*self.to, generation, &before).await?;
        let (last, there) = (there.last().map(|entry| entry.key.clone()), there);
        let has = |key: &String| there.binary_search_by(|entry| entry.key.cmp(key)).is_ok();
        // The last one there may be a seal of whoever booted the copy: it is compared.
        let mut wanted = self.listed(&*self.from, generation, &before).await?;
        wanted.retain(|entry| !has(&entry.key) || Some(&entry.key) == last.as_ref());
        let copies = wanted.into_iter().map(|entry| async move {
            match self.read(&entry.key, entry.size).await? {
                Some(body) => self.put_same(&entry.key, &body).await.map(Some),
                None => Ok::<_, Error>(None),
            }
        });
        let copies: Vec<_> = copies.collect();
        let mut copies = futures::stream::iter(copies).buffered(PARALLEL);
        while let Some(copied) = copies.try_next().await? {
            match copied {
                Some(bytes) => report.add(bytes),
                None => return Ok(false),
            }
        }
        Ok(self.bound(generation).await? == bound)
    }

    async fn listed(&self, store: &dyn Store, generation: Generation, after: &str) -> Result<Vec<Entry>> {
        let listing = store.list(&layout::log_dir(generation), Some(after));
        let ours = listing.try_filter(|entry| std::future::ready(layout::parse_log_entry(&entry.key).is_some()));
        ours.try_collect().await
    }

    async fn bound(&self, generation: Generation) -> Result<u64> {
        let level = self.from.list_level(&layout::collected_dir(generation)).await?;
        let numbers = level.entries.iter().filter_map(|entry| layout::parse_collected(&entry.key));
        Ok(numbers.map(|(_, number)| number).max().unwrap_or(1))
    }
}
