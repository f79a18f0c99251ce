//! A repository in a second place: another region, another cloud, a disk. Objects are copied as they are stored, encrypted or
//! not, without reading what is in them; what is there already is not copied again, so that a copy that was cut off goes on
//! and one that is made again costs what is new.
//!
//! At every moment the copy is a sound repository of an earlier state: nothing is named there before it is there, and WAL
//! never has a hole. Packs first, then claims, WAL and logs in order, and the manifests that name it all last. It may be
//! restored from and booted; once it has been booted it has a life of its own, and nothing is copied into it any more.

mod log;
mod objects;
mod one;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::TryStreamExt;

use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events, Level};
use crate::model::{BackupId, Generation, human_bytes};
use crate::repository::layout::OfBackup;
use crate::repository::{Found, Repository, layout};
use crate::storage::{Body, Entry, Store, probe, read_small};

pub use one::CopyOne;

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
        self.has_no_life_of_its_own(&generations).await?;
        self.missing_below(layout::PACKS, &mut report).await?;
        // What was pruned before what it leaves: a gap that a prune has made is none.
        self.missing_below(layout::PRUNES, &mut report).await?;
        let mut claimed = Vec::new();
        for generation in &generations {
            if self.claim(*generation, &mut report).await? {
                claimed.push(*generation);
            }
        }
        for generation in &claimed {
            self.has_no_life_of_its_own(&generations).await?;
            self.wal(*generation, &mut report).await?;
        }
        // It may have been ended only now, by a generation that was beginning.
        if let [.., before, _] = claimed[..] {
            self.wal(before, &mut report).await?;
        }
        let text = format!("{} objects, {} copied; the backups come last", report.objects, human_bytes(report.bytes));
        events.emit(Event::Note { level: Level::Detail, text });
        self.has_no_life_of_its_own(&generations).await?;
        self.manifests(backups, &mut report).await?;
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
        let is_another = || {
            Err(Error::refused(format!("{} is another repository", self.to.url("")))
                .hint("choose a prefix of its own for the copy"))
        };
        match read_small(&*self.to, layout::DESCRIPTOR, LIMIT).await? {
            Some(there) if there == source => (),
            Some(_) => return is_another(),
            // Refuses a place that has something else in it.
            None => match Repository::find(Arc::clone(&self.to), clock).await? {
                Found::Empty => probe(&*self.to, layout::PROBES, clock).await?,
                Found::Repository(_) => return is_another(),
            },
        }
        self.keys().await?;
        match self.put_same(layout::DESCRIPTOR, &Body::from(source.to_vec())).await {
            Err(error) if error.kind() == Kind::Conflict => is_another(),
            done => done.map(drop),
        }
    }

    /// Wrapped keys; whoever cannot open the source any more cannot open the copy.
    async fn keys(&self) -> Result<()> {
        self.missing_below(layout::KEYS, &mut Report::default()).await?;
        let keys = async |store: &dyn Store| -> Result<BTreeSet<String>> {
            store.list(layout::KEYS, None).map_ok(|entry| entry.key).try_collect().await
        };
        let source = keys(&*self.from).await?;
        let gone = keys(&*self.to).await?.into_iter().filter(|key| !source.contains(key) && !source.is_empty());
        for key in gone.filter(|key| layout::parse_wrapped_key(key).is_some()) {
            self.to.delete(&key).await?;
        }
        Ok(())
    }

    /// Whoever has booted the copy has claimed a generation in it.
    async fn has_no_life_of_its_own(&self, generations: &[Generation]) -> Result<()> {
        match generations_of(&*self.to).await?.iter().find(|own| !generations.contains(own)) {
            Some(own) => Err(self.own_life(&layout::claim(*own))),
            None => Ok(()),
        }
    }

    /// Claims must be the same: where they differ, the copy was booted and is a database of its own. `false`: it is only
    /// being made.
    async fn claim(&self, generation: Generation, report: &mut Report) -> Result<bool> {
        let key = layout::claim(generation);
        let Some(body) = self.read(&key, objects::SMALL).await? else { return Ok(false) };
        report.add(self.put_same(&key, &body).await?);
        Ok(true)
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
            // One that was deleted from the copy stays deleted while its tombstone is there.
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
