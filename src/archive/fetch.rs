//! `restore_command`: one WAL file out of the repository, or the proof that there is none.
//!
//! PostgreSQL takes exit code 1 for the end of WAL and promotes. So "not there" is said only of a file that a listing
//! made after the question does not have, in a lineage in which nothing comes after it; anything else is an error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};
use crate::model::{Generation, Timeline};
use crate::repository::reach::View;
use crate::repository::{Lineage, Repository, WalIndex, layout};
use crate::wal::{SegmentName, WalFileName};

/// Which history recovery follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchOptions {
    /// The newest generation whose WAL counts; the repository's newest when `None`.
    pub generation: Option<Generation>,
    /// The oldest generation that can have anything recovery needs.
    pub oldest: Option<Generation>,
    /// The timeline recovery goes to; the lineage's newest when `None`.
    pub timeline: Option<Timeline>,
}

/// How a fetch ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    Done,
    /// Proven: the history ends before this file. Says why.
    EndOfWal(String),
}

/// Where a wanted file is, or the proof that it is nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    At(Generation),
    EndOfWal(String),
}

/// The WAL of one history, ready to be asked.
#[derive(Debug)]
pub struct Source {
    repository: Repository,
    options: FetchOptions,
    lineage: Lineage,
    index: WalIndex,
}

impl Source {
    pub async fn open(repository: Repository, options: FetchOptions) -> Result<Source> {
        let tip = match options.generation {
            Some(generation) => generation,
            None => repository.newest_generation().await?.ok_or_else(|| {
                Error::not_found(format!("{} has no generation: nothing was ever archived", repository.address()))
            })?,
        };
        let lineage = repository.lineage(tip, options.oldest).await?;
        let index = repository.wal_index(&lineage).await?;
        Ok(Source { repository, options, lineage, index })
    }

    pub fn segment_size(&self) -> crate::wal::SegmentSize {
        self.lineage.tip().segment_size
    }

    /// Looks again what is there.
    pub async fn refresh(&mut self) -> Result<()> {
        self.index = self.repository.wal_index(&self.lineage).await?;
        Ok(())
    }

    fn view(&self) -> Option<View<'_>> {
        let timeline = self.options.timeline.or(self.index.newest_timeline())?;
        View::new(&self.lineage, &self.index, timeline)
    }

    /// Where the file is, by the last listing.
    pub fn locate(&self, name: WalFileName) -> Option<Generation> {
        match name {
            WalFileName::Segment(name) => {
                let number = name.number(self.segment_size())?;
                Some(self.view()?.locate(name.timeline, number)?.generation)
            }
            _ => None,
        }
    }

    /// The segments recovery will ask for after `name`, at most `count`, as far as the last listing goes.
    pub fn following(&self, name: SegmentName, count: usize) -> Vec<(SegmentName, Generation)> {
        let (size, Some(view)) = (self.segment_size(), self.view()) else { return Vec::new() };
        let Some(number) = name.number(size) else { return Vec::new() };
        let timelines: Vec<Timeline> = view.history.spans().rev().map(|(timeline, ..)| timeline).collect();
        let best = |number: u64| {
            timelines.iter().find_map(|timeline| {
                let place = view.locate(*timeline, number)?;
                Some((SegmentName::new(*timeline, number, size), place.generation))
            })
        };
        (number + 1..).map_while(best).take(count).collect()
    }

    /// Where the file is; when the last listing does not have it, by a new one.
    pub async fn resolve(&mut self, name: WalFileName) -> Result<Resolved> {
        if let Some(generation) = self.locate(name) {
            return Ok(Resolved::At(generation));
        }
        match name {
            WalFileName::Segment(segment) => self.resolve_segment(segment).await,
            _ => self.resolve_other(name).await,
        }
    }

    async fn resolve_segment(&mut self, name: SegmentName) -> Result<Resolved> {
        let Some(number) = name.number(self.segment_size()) else {
            return Err(Error::usage(format!("{name} is no segment of {} bytes", self.segment_size().bytes())));
        };
        self.refresh().await?;
        if let Some(generation) = self.locate(WalFileName::Segment(name)) {
            return Ok(Resolved::At(generation));
        }
        let tip = self.lineage.tip().generation;
        let Some(view) = self.view() else {
            return Ok(Resolved::EndOfWal(format!("generation {tip} and its ancestors have no WAL")));
        };
        if !view.is_on_the_way(name.timeline, number) {
            return Ok(Resolved::EndOfWal(format!("{name} is not on the way to timeline {}", view.history.timeline)));
        }
        if view.has_wal_after(number) {
            let key = layout::wal_file(tip, WalFileName::Segment(name));
            return Err(Error::damaged(format!("{name} is missing and WAL goes on after it: it should be at {}, or under an older generation", self.repository.url(&key)))
                .hint("bring the object back from a copy or an older version of the bucket, or restore to a point before the gap (`perennial list` shows the windows)"));
        }
        Ok(Resolved::EndOfWal(format!("{name} is the first segment after the end of generation {tip}")))
    }

    /// Histories, backup labels and partial segments are asked for rarely: each generation is asked, newest first.
    async fn resolve_other(&mut self, name: WalFileName) -> Result<Resolved> {
        for claim in self.lineage.claims() {
            if self.repository.wal_head(claim.generation, name).await?.is_some() {
                return Ok(Resolved::At(claim.generation));
            }
        }
        Ok(Resolved::EndOfWal(format!("{name} is in no generation of the history")))
    }

    /// Brings one file to `destination`, which shows it whole or not at all.
    pub async fn fetch(&mut self, name: WalFileName, destination: &Path) -> Result<Fetched> {
        match self.resolve(name).await? {
            Resolved::EndOfWal(why) => Ok(Fetched::EndOfWal(why)),
            Resolved::At(generation) => {
                download(&self.repository, generation, name, destination).await?;
                Ok(Fetched::Done)
            }
        }
    }
}

/// Writes an archived file beside `destination` and renames it there.
#[allow(clippy::disallowed_methods, reason = "a fetched file need not survive a crash: recovery asks again")]
pub async fn download(
    repository: &Repository,
    generation: Generation,
    name: WalFileName,
    destination: &Path,
) -> Result<()> {
    let temporary = temporary_beside(destination);
    let outcome = write_to(repository, generation, name, &temporary).await;
    let renamed = outcome.and_then(|()| std::fs::rename(&temporary, destination).on("rename to", destination));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    renamed
}

async fn write_to(repository: &Repository, generation: Generation, name: WalFileName, path: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path).on("create", path)?;
    let write = |offset, piece: Vec<u8>| file.write_all_at(&piece, offset).on("write", path);
    let key = layout::wal_file(generation, name);
    repository.read_wal(generation, name, write).await?.map(drop).ok_or_else(|| repository.missing(&key))
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
