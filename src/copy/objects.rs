//! Single objects and directories of them: read here, put there.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Copy, Report};
use crate::error::{Error, Kind, Result};
use crate::storage::{Body, Created, Entry, read_small};

/// Objects on their way at once.
pub const PARALLEL: usize = 4;

/// Each is held whole. All together have at most this many bytes, or are one that is larger (a segment of 64 MB and more).
const HELD: u64 = 32 << 20;

/// Objects that are compared, not only counted, are no larger: claims, bounds, entries of logs.
pub const SMALL: u64 = 8 << 20;

/// Whether the object of a key is to be copied.
pub type Wanted<'a> = dyn Fn(&str) -> bool + Sync + 'a;

/// Bytes that may be held, by the megabyte.
struct Budget(Semaphore);

impl Budget {
    fn new() -> Budget {
        Budget(Semaphore::new((HELD >> 20) as usize))
    }

    async fn take(&self, size: u64) -> Result<SemaphorePermit<'_>> {
        let megabytes = size.div_ceil(1 << 20).clamp(1, HELD >> 20) as u32;
        self.0.acquire_many(megabytes).await.map_err(|e| Error::internal("a budget was closed").source(e))
    }
}

impl Copy {
    /// An object of at most `size` bytes.
    pub(super) async fn read(&self, key: &str, size: u64) -> Result<Option<Body>> {
        let Some(chunk) = self.from.read(key, 0..size).await? else { return Ok(None) };
        if chunk.bytes.len() as u64 != chunk.object_size {
            return Err(Error::damaged(format!("{} is cut short", self.from.url(key))));
        }
        let mut body = Body::default();
        body.push(chunk.bytes);
        Ok(Some(body))
    }

    /// Puts what must be the same in both places; its bytes, if it was not there.
    pub(super) async fn put_same(&self, key: &str, body: &Body) -> Result<Option<u64>> {
        if self.to.create(key, body).await? == Created::Now {
            return Ok(Some(body.len()));
        }
        let there = read_small(&*self.to, key, SMALL).await?;
        match there.is_some_and(|there| there == body.head(usize::MAX)) {
            true => Ok(None),
            false => Err(self.own_life(key)),
        }
    }

    pub(super) fn own_life(&self, key: &str) -> Error {
        let what = format!("{} is not the source's: the copy was booted, and has a life of its own", self.to.url(key));
        Error::new(Kind::Conflict, what).hint("copy to a new place, or go on with the copy as the database")
    }

    /// What the second place lacks of the wanted objects below a directory, in the order of keys.
    async fn lacking(&self, directory: &str, wanted: &Wanted<'_>) -> Result<Vec<Entry>> {
        let there: BTreeMap<String, u64> =
            self.to.list(directory, None).map_ok(|entry| (entry.key, entry.size)).try_collect().await?;
        let mut listed: Vec<Entry> = self.from.list(directory, None).try_collect().await?;
        listed.retain(|entry| wanted(&entry.key));
        if let Some(other) = listed.iter().find(|entry| there.get(&entry.key).is_some_and(|size| *size != entry.size)) {
            let (ours, theirs) = (self.to.url(&other.key), self.from.url(&other.key));
            return Err(Error::damaged(format!("{ours} has another size than {theirs}"))
                .hint("one of the two is damaged: `perennial verify` says which; delete that object of the copy, and copy again"));
        }
        listed.retain(|entry| !there.contains_key(&entry.key));
        listed.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(listed)
    }

    /// Copies what the second place lacks below a directory, in any order.
    pub(super) async fn missing_below(&self, directory: &str, report: &mut Report) -> Result<()> {
        self.missing_of(directory, &|_| true, report).await
    }

    /// The same of the wanted ones alone.
    pub(super) async fn missing_of(&self, directory: &str, wanted: &Wanted<'_>, report: &mut Report) -> Result<()> {
        self.all(self.lacking(directory, wanted).await?, report).await
    }

    /// The same one after the other: whatever cuts it off, nothing is there without all that comes before it. Reading goes
    /// ahead.
    pub(super) async fn missing_in_order(
        &self,
        directory: &str,
        wanted: &Wanted<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let budget = &Budget::new();
        let reads = self.lacking(directory, wanted).await?.into_iter().map(|object| async move {
            let permit = budget.take(object.size).await?;
            Ok::<_, Error>((self.read(&object.key, object.size).await?, object, permit))
        });
        let reads: Vec<_> = reads.collect();
        let mut reads = futures::stream::iter(reads).buffered(PARALLEL);
        while let Some((body, object, _held)) = reads.try_next().await? {
            // One that has gone was pruned, with all before it.
            let Some(body) = body else { continue };
            self.to.create(&object.key, &body).await?;
            report.add(Some(body.len()));
        }
        Ok(())
    }

    /// Copies objects, some at a time; those that have gone since they were listed are let go.
    pub(super) async fn all(&self, objects: Vec<Entry>, report: &mut Report) -> Result<()> {
        let budget = &Budget::new();
        let copies = objects.into_iter().map(|object| async move {
            let _held = budget.take(object.size).await?;
            let Some(body) = self.read(&object.key, object.size).await? else { return Ok::<_, Error>(None) };
            self.to.create(&object.key, &body).await?;
            Ok(Some(body.len()))
        });
        let copies: Vec<_> = copies.collect();
        let mut copies = futures::stream::iter(copies).buffer_unordered(PARALLEL);
        while let Some(bytes) = copies.try_next().await? {
            report.add(bytes);
        }
        Ok(())
    }
}
