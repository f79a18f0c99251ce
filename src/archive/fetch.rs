//! `restore_command`: one WAL file out of the repository, or the proof that there is none.
//!
//! PostgreSQL takes exit code 1 for the end of WAL and promotes. So "not there" is said only of a file that a listing
//! made after the question does not have, in a lineage in which nothing comes after it; anything else is an error.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Kind, Result};
use crate::model::{Generation, Lsn, Timeline};
use crate::repository::log::{LogRun, LogView};
use crate::repository::reach::View;
use crate::repository::{Lineage, Repository, WalIndex, WalPlace, WalSource, layout};
use crate::wal::{SegmentName, SegmentSize, WalFileName, scan_part};

/// Looks at a history that changes while it is read.
pub(super) const LOOKS: u32 = 5;

/// Which history recovery follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchOptions {
    /// The newest generation whose WAL counts; the repository's newest when `None`.
    pub generation: Option<Generation>,
    /// The oldest generation that can have anything recovery needs.
    pub oldest: Option<Generation>,
    /// The timeline recovery goes to; the lineage's newest when `None`.
    pub timeline: Option<Timeline>,
    /// The history ends here, whatever comes after.
    pub through: Option<Lsn>,
    /// For a standby: the history goes on, and is followed.
    pub follow: bool,
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
    At(Wanted),
    EndOfWal(String),
}

/// A file that is there, and how to get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The segment that starts at `start` counts up to `cut` only: there the timeline was left, and what lies behind is
    /// another future.
    Object { generation: Generation, cut: Option<u64> },
    /// The segment that starts at `start`, from the entries of a log, as far as they go. `switched`: the next writer went
    /// on with the segment after it, so it must end with a switch there.
    Log { run: LogRun, start: Lsn, through: Lsn, size: u64, switched: bool },
}

impl Wanted {
    /// The generation that has it.
    pub fn generation(&self) -> Generation {
        match self {
            Wanted::Object { generation, .. } => *generation,
            Wanted::Log { run, .. } => run.generation,
        }
    }

    /// How far it goes, of a segment that starts at `start`.
    pub fn through(&self, start: Lsn, size: SegmentSize) -> Lsn {
        match self {
            Wanted::Object { cut, .. } => Lsn(start.0 + cut.unwrap_or(size.bytes())),
            Wanted::Log { through, .. } => *through,
        }
    }
}

/// The WAL of one history, ready to be asked.
#[derive(Debug)]
pub struct Source {
    pub(super) repository: Repository,
    options: FetchOptions,
    pub(super) lineage: Lineage,
    pub(super) index: WalIndex,
    /// The logs of the lineage as they were listed, newest first.
    pub(super) logs: Vec<LogView>,
}

impl Source {
    pub async fn open(repository: Repository, options: FetchOptions) -> Result<Source> {
        let lineage = newest_lineage(&repository, options).await?;
        let (index, logs) = list(&repository, &lineage).await?;
        Ok(Source { repository, options, lineage, index, logs })
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.lineage.tip().segment_size
    }

    /// Looks again what is there. Without a generation of its own the history may go on in a newer one.
    pub async fn refresh(&mut self) -> Result<()> {
        let lineage = match self.options.generation {
            Some(_) => self.lineage.clone(),
            None => newest_lineage(&self.repository, self.options).await?,
        };
        (self.index, self.logs) = list(&self.repository, &lineage).await?;
        self.lineage = lineage;
        Ok(())
    }

    /// The way to the wanted timeline; `None` when there is no WAL at all.
    pub(super) fn view(&self) -> Result<Option<View<'_>>> {
        let Some(timeline) = self.options.timeline.or(self.index.newest_timeline()) else { return Ok(None) };
        if let Some(view) = View::new(&self.lineage, &self.index, timeline) {
            return Ok(Some(view));
        }
        let key = layout::wal_file(self.lineage.tip().generation, WalFileName::History(timeline));
        Err(self.repository.missing(&key).context(format!("timeline {timeline} cannot be followed")))
    }

    /// Where the file is, by the last listing.
    pub fn locate(&self, name: WalFileName) -> Result<Option<Wanted>> {
        let WalFileName::Segment(name) = name else { return Ok(None) };
        let (Some(number), Some(view)) = (name.number(self.segment_size()), self.view()?) else { return Ok(None) };
        Ok(view.locate(name.timeline, number).and_then(|place| self.wanted(&view, place, name.timeline, number)))
    }

    fn wanted(&self, view: &View<'_>, place: WalPlace, timeline: Timeline, number: u64) -> Option<Wanted> {
        let size = self.segment_size();
        let (start, end) = (size.start_of(number), size.start_of(number + 1));
        let left_at = view.history.end_of(timeline).flatten();
        let counts_to = [Some(end), left_at, self.options.through].into_iter().flatten().min()?;
        if counts_to <= start {
            return None;
        }
        match place.source {
            WalSource::Object { .. } => {
                let cut = (counts_to < end).then(|| counts_to.bytes_since(start));
                Some(Wanted::Object { generation: place.generation, cut })
            }
            WalSource::Log { through } => {
                let run = self.index.run(place.generation)?;
                let switched = through < end && left_at == Some(end);
                Some(Wanted::Log { run, start, through: through.min(counts_to), size: size.bytes(), switched })
            }
        }
    }

    /// The segments recovery will ask for after `name`, at most `count`, as far as the last listing goes.
    pub fn following(&self, name: SegmentName, count: usize) -> Vec<(SegmentName, Wanted)> {
        let (size, Ok(Some(view))) = (self.segment_size(), self.view()) else { return Vec::new() };
        let Some(number) = name.number(size) else { return Vec::new() };
        let timelines: Vec<Timeline> = view.history.spans().rev().map(|(timeline, ..)| timeline).collect();
        let best = |number: u64| {
            timelines.iter().find_map(|timeline| {
                let place = view.locate(*timeline, number)?;
                let wanted = self.wanted(&view, place, *timeline, number)?;
                Some((SegmentName::new(*timeline, number, size), wanted))
            })
        };
        (number + 1..).map_while(best).take(count).collect()
    }

    /// Says that the history ends, after one more look whether the repository is there at all: a directory that is not
    /// mounted any more lists nothing either.
    async fn end_of_wal(&self, why: String) -> Result<Resolved> {
        self.repository.claim(self.lineage.tip().generation).await?;
        Ok(Resolved::EndOfWal(why))
    }

    /// Where the file is; when the last listing does not have it, by a new one.
    pub async fn resolve(&mut self, name: WalFileName) -> Result<Resolved> {
        if let Some(wanted) = self.locate(name)? {
            return Ok(Resolved::At(wanted));
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
        if let Some(wanted) = self.locate(WalFileName::Segment(name))? {
            return Ok(Resolved::At(wanted));
        }
        let tip = self.lineage.tip().generation;
        let Some(view) = self.view()? else {
            return self.end_of_wal(format!("generation {tip} and its ancestors have no WAL")).await;
        };
        if self.options.through.is_some_and(|through| self.segment_size().start_of(number) >= through) {
            return self.end_of_wal(format!("{name} lies behind the end that was asked for")).await;
        }
        if !view.is_on_the_way(name.timeline, number) {
            return self.end_of_wal(format!("{name} is not on the way to timeline {}", view.history.timeline)).await;
        }
        if view.has_wal_after(number) {
            let key = layout::wal_file(tip, WalFileName::Segment(name));
            return Err(Error::damaged(format!("{name} is missing and WAL goes on after it: it should be at {}, or under an older generation", self.repository.url(&key)))
                .hint("bring the object back from a copy or an older version of the bucket, or restore what comes before the gap: perennial restore -D DIR --before-gap"));
        }
        self.end_of_wal(format!("{name} is the first segment after the end of generation {tip}")).await
    }

    /// Histories, backup labels and partial segments are asked for rarely: each generation is asked, newest first.
    async fn resolve_other(&mut self, name: WalFileName) -> Result<Resolved> {
        for claim in self.lineage.claims() {
            if self.repository.wal_head(claim.generation, name).await?.is_some() {
                return Ok(Resolved::At(Wanted::Object { generation: claim.generation, cut: None }));
            }
        }
        self.end_of_wal(format!("{name} is in no generation of the history")).await
    }

    /// Brings one file to `destination`, which shows it whole or not at all.
    pub async fn fetch(&mut self, name: WalFileName, destination: &Path) -> Result<Fetched> {
        for _ in 0..LOOKS {
            let wanted = match self.resolve(name).await? {
                Resolved::EndOfWal(why) => return Ok(Fetched::EndOfWal(why)),
                Resolved::At(wanted) => wanted,
            };
            match download(&self.repository, wanted, name, destination).await {
                // Entries were collected since the listing: the segment is whole by now.
                Err(error) if error.kind() == Kind::Damaged && error.is_retryable() => self.refresh().await?,
                outcome => return outcome.map(|()| Fetched::Done),
            }
        }
        Err(Error::damaged(format!("{name}: entries of the log that hold it are missing, and no whole segment has it")))
    }
}

async fn list(repository: &Repository, lineage: &Lineage) -> Result<(WalIndex, Vec<LogView>)> {
    let listed = repository.list_wal(lineage.claims().iter().map(|claim| claim.generation)).await?;
    let index = repository.index_of(lineage, &listed).await?;
    Ok((index, listed.into_iter().map(|listing| listing.log).collect()))
}

async fn newest_lineage(repository: &Repository, options: FetchOptions) -> Result<Lineage> {
    let tip = match options.generation {
        Some(generation) => generation,
        None => repository.newest_generation().await?.ok_or_else(|| {
            Error::not_found(format!("{} has no generation: nothing was ever archived", repository.address()))
        })?,
    };
    repository.lineage(tip, options.oldest).await
}

/// Writes an archived file beside `destination` and renames it there.
#[allow(clippy::disallowed_methods, reason = "a fetched file need not survive a crash: recovery asks again")]
pub async fn download(repository: &Repository, wanted: Wanted, name: WalFileName, destination: &Path) -> Result<()> {
    let temporary = temporary_beside(destination);
    let outcome = match wanted {
        Wanted::Object { generation, cut } => write_object(repository, generation, name, cut, &temporary).await,
        Wanted::Log { run, start, through, size, switched } => {
            let written = write_log(repository, &run, start..through, size, &temporary).await;
            written.and_then(|()| if switched { must_be_switched(name, through, &temporary) } else { Ok(()) })
        }
    };
    let renamed = outcome.and_then(|()| std::fs::rename(&temporary, destination).on("rename to", destination));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    renamed
}

pub(super) fn create(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path).on("create", path)
}

async fn write_object(
    repository: &Repository,
    generation: Generation,
    name: WalFileName,
    cut: Option<u64>,
    path: &Path,
) -> Result<()> {
    let file = create(path)?;
    let write = |offset, piece: Vec<u8>| file.write_all_at(&piece, offset).on("write", path);
    let key = layout::wal_file(generation, name);
    let head = repository.read_wal(generation, name, write).await?.ok_or_else(|| repository.missing(&key))?;
    if let Some(cut) = cut {
        file.set_len(cut).and_then(|()| file.set_len(head.size)).on("cut", path)?;
    }
    Ok(())
}

/// A segment from the entries of a log, zeros behind their end: recovery takes them for the end of WAL, and a file of
/// another size for a broken one.
async fn write_log(repository: &Repository, run: &LogRun, range: Range<Lsn>, size: u64, path: &Path) -> Result<()> {
    let file = create(path)?;
    file.set_len(size).on("extend", path)?;
    let write = |at: Lsn, piece: &[u8]| file.write_all_at(piece, at.bytes_since(range.start)).on("write", path);
    repository.read_log(run, range.start, range.end, write).await
}

/// A part that counts as a whole segment because the next writer began behind it: what is missing must be the padding of a
/// switch. That writer may have had more WAL than ever reached the log (a standby that was promoted).
fn must_be_switched(name: WalFileName, through: Lsn, path: &Path) -> Result<()> {
    let WalFileName::Segment(segment) = name else { return Ok(()) };
    let content = std::fs::read(path).on("read", path)?;
    match scan_part(segment, &content)?.switched {
        true => Ok(()),
        false => Err(Error::damaged(format!(
            "{name} is missing from {through} on, and WAL goes on after it: the log ends there without a switch to the next segment"
        ))
        .hint("restore what comes before into a new directory: perennial restore -D DIR --to-lsn")),
    }
}

pub(super) fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
