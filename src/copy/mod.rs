//! A repository in a second place: another region, another cloud, a disk. Objects are copied as they are stored, encrypted or
//! not, without reading what is in them; what is there already is not copied again, so that a copy that was cut off goes on
//! and one that is made again costs what is new.
//!
//! At every moment the copy is a sound repository of an earlier state: nothing is named there before it is there. Claims
//! first, then WAL and logs, packs, and the manifests that name them last. It may be restored from and booted; once it has
//! been booted it has a life of its own, and nothing is copied into it any more.

mod log;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::Events;
use crate::model::{BackupId, Generation, human_bytes};
use crate::repository::layout::OfBackup;
use crate::repository::{Repository, layout};
use crate::storage::{Body, Created, Entry, Store, read_small};

/// Objects on their way at once. Each is held whole: a pack has 16 MB, a segment seldom more.
const PARALLEL: usize = 4;

/// Objects that are compared, not only counted: claims, and the entries of logs.
const SMALL: u64 = 8 << 20;

/// What a copy came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Objects that were not there, and their bytes.
    pub objects: u64,
    pub bytes: u64,
    /// Backups that can be restored from the copy, and had not been there before.
    pub backups: u64,
}

impl Report {
    fn add(&mut self, bytes: Option<u64>) {
        self.objects += u64::from(bytes.is_some());
        self.bytes += bytes.unwrap_or(0);
    }
}

/// The two places. Both stores are the bare ones, below any encryption.
#[derive(Debug, Clone)]
pub struct Copy {
    pub from: Arc<dyn Store>,
    pub to: Arc<dyn Store>,
}

impl Copy {
    /// Brings the second place up to what the first has now.
    pub async fn run(&self, clock: &Clock, events: &Events) -> Result<Report> {
        let mut report = Report::default();
        self.begin(clock).await?;
        // Before anything they need is listed: whatever is named by these is there, or goes while we copy.
        let backups = self.backups().await?;
        let generations = generations_of(&*self.from).await?;
        if let Some(own) = generations_of(&*self.to).await?.iter().find(|own| !generations.contains(own)) {
            return Err(self.has_a_life_of_its_own(&layout::claim(*own)));
        }
        for generation in &generations {
            self.claim(*generation, &mut report).await?;
        }
        for generation in &generations {
            self.wal(*generation, &mut report).await?;
        }
        self.missing_below(layout::PACKS, &mut report).await?;
        events.info(format!("{} objects, {} copied; the backups come last", report.objects, human_bytes(report.bytes)));
        self.manifests(backups, &mut report).await?;
        self.missing_below(layout::PRUNES, &mut report).await?;
        Ok(report)
    }

    /// The descriptor, and the wrapped key if there is one. Only a place that is empty or has this repository is written to.
    async fn begin(&self, clock: &Clock) -> Result<()> {
        const LIMIT: u64 = 1 << 20;
        let source = read_small(&*self.from, layout::DESCRIPTOR, LIMIT).await?;
        let source = source.ok_or_else(|| {
            Error::not_found(format!("{}: there is no repository", self.from.url("")))
                .hint("check the address: perennial copy --repo SOURCE --to DESTINATION")
        })?;
        match read_small(&*self.to, layout::DESCRIPTOR, LIMIT).await? {
            Some(there) if there == source => (),
            Some(_) => {
                return Err(Error::refused(format!("{} is another repository", self.to.url("")))
                    .hint("choose a prefix of its own for the copy"));
            }
            // Refuses a place that has something else in it.
            None => drop(Repository::find(Arc::clone(&self.to), clock).await?),
        }
        self.missing_below(layout::KEYS, &mut Report::default()).await?;
        self.to.create(layout::DESCRIPTOR, &Body::from(source.to_vec())).await.map(drop)
    }

    /// Claims must be the same: where they differ, the copy was booted and is a database of its own.
    async fn claim(&self, generation: Generation, report: &mut Report) -> Result<()> {
        let key = layout::claim(generation);
        // One that is being made.
        let Some(body) = self.read(&key, SMALL).await? else { return Ok(()) };
        report.add(self.put_same(&key, &body).await?);
        Ok(())
    }

    /// Puts what must be the same in both places; its bytes, if it was not there.
    async fn put_same(&self, key: &str, body: &Body) -> Result<Option<u64>> {
        if self.to.create(key, body).await? == Created::Now {
            return Ok(Some(body.len()));
        }
        let there = read_small(&*self.to, key, SMALL).await?;
        match there.is_some_and(|there| there == body.head(usize::MAX)) {
            true => Ok(None),
            false => Err(self.has_a_life_of_its_own(key)),
        }
    }

    fn has_a_life_of_its_own(&self, key: &str) -> Error {
        let what = format!("{} is not the source's: the copy was booted, and has a life of its own", self.to.url(key));
        Error::new(Kind::Conflict, what).hint("copy to a new place, or go on with the copy as the database")
    }

    /// An object of at most `size` bytes.
    async fn read(&self, key: &str, size: u64) -> Result<Option<Body>> {
        let Some(chunk) = self.from.read(key, 0..size).await? else { return Ok(None) };
        if chunk.bytes.len() as u64 != chunk.object_size {
            return Err(Error::damaged(format!("{} is cut short", self.from.url(key))));
        }
        Ok(Some(Body::from(chunk.bytes.to_vec())))
    }

    /// Copies what the second place lacks below a directory.
    async fn missing_below(&self, directory: &str, report: &mut Report) -> Result<()> {
        let there: BTreeMap<String, u64> =
            self.to.list(directory, None).map_ok(|entry| (entry.key, entry.size)).try_collect().await?;
        let listed: Vec<Entry> = self.from.list(directory, None).try_collect().await?;
        if let Some(other) = listed.iter().find(|entry| there.get(&entry.key).is_some_and(|size| *size != entry.size)) {
            return Err(Error::damaged(format!("{} has another size than in {}", self.to.url(&other.key), self.from.url(&other.key)))
                .hint("one of the two is damaged: `perennial verify` says which; delete that object of the copy, and copy again"));
        }
        self.all(listed.into_iter().filter(|entry| !there.contains_key(&entry.key)).collect(), report).await
    }

    /// Copies objects, some at a time; those that have gone since they were listed are let go.
    async fn all(&self, objects: Vec<Entry>, report: &mut Report) -> Result<()> {
        let copies = objects.into_iter().map(|object| async move {
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

    /// The objects of each backup that exists.
    async fn backups(&self) -> Result<BTreeMap<BackupId, Vec<(OfBackup, Entry)>>> {
        let mut all: BTreeMap<BackupId, Vec<(OfBackup, Entry)>> = BTreeMap::new();
        let mut listing = self.from.list(layout::BACKUPS, None);
        while let Some(entry) = listing.try_next().await? {
            if let Some((id, what)) = layout::parse_backup(&entry.key) {
                all.entry(id).or_default().push((what, entry));
            }
        }
        let has = |of: &[(OfBackup, Entry)], wanted| of.iter().any(|(what, _)| *what == wanted);
        all.retain(|_, of| has(of, OfBackup::Manifest) && !has(of, OfBackup::Tombstone));
        Ok(all)
    }

    /// Makes the backups visible that still exist: of those all packs were there when we copied them.
    async fn manifests(&self, backups: BTreeMap<BackupId, Vec<(OfBackup, Entry)>>, report: &mut Report) -> Result<()> {
        let still: BTreeSet<BackupId> = self.backups().await?.into_keys().collect();
        let there: BTreeSet<String> =
            self.to.list(layout::BACKUPS, None).map_ok(|entry| entry.key).try_collect().await?;
        for (id, mut of) in backups.into_iter().filter(|(id, _)| still.contains(id)) {
            // One that was deleted from the copy stays deleted.
            if there.contains(&layout::tombstone(id)) {
                continue;
            }
            report.backups += u64::from(!there.contains(&layout::manifest(id)));
            of.retain(|(what, entry)| *what != OfBackup::Begun && !there.contains(&entry.key));
            let (manifest, others): (Vec<_>, Vec<_>) =
                of.into_iter().partition(|(what, _)| *what == OfBackup::Manifest);
            for objects in [others, manifest] {
                self.all(objects.into_iter().map(|(_, entry)| entry).collect(), report).await?;
            }
        }
        Ok(())
    }
}

async fn generations_of(store: &dyn Store) -> Result<Vec<Generation>> {
    let level = store.list_level(layout::GENERATIONS).await?;
    Ok(level.directories.iter().filter_map(|directory| layout::parse_generation_dir(directory)).collect())
}
