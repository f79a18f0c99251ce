//! What a standby is given: the newest history as it grows, across takeovers, and a wait where there is nothing new.
//!
//! PostgreSQL reads a restored segment until its records end, and asks for it again. It is answered once there is more of
//! it, or after [`WAIT`]: so an idle standby costs one small request a second and hardly a line in its log. Exit code 1
//! means "not yet" to a standby; what is not known for certain is waited for, however long.
//!
//! Only what is final is given: whole segments, and of the living log the entries without a hole from where it was looked
//! at (`repository::log::Tail`). A claimant's seal comes behind them, so no takeover can undo them.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fetch::{Fetched, Resolved, Source, Wanted, create, download, temporary_beside};
use crate::clock::Clock;
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::model::{Generation, Lsn, Timeline};
use crate::postgres::data_dir::OWN_DIR;
use crate::postgres::{ControlFile, version_of};
use crate::repository::log::{LogRun, LogView, Tail};
use crate::repository::{layout, origin};
use crate::wal::{SegmentName, SegmentSize, WalFileName};

/// A question is answered after this long at the latest: until then the server does not see that it is to be promoted.
const WAIT: Duration = Duration::from_secs(5);

/// Between two looks for more, right after there was some, and when nothing comes.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// After this long without a word from any writer the repository is looked at anew: what was to come next may have been
/// collected (ten minutes after it was stored as a whole), or another machine may have taken over without a log.
const SILENT: Duration = Duration::from_secs(60);

/// The same however much is heard: what is remembered of the log must not grow for ever.
const OLD: Duration = Duration::from_secs(3600);

/// A segment that is missing while WAL goes on behind it may still be on its way for this long, and is looked for this often.
const HOLE: Duration = Duration::from_secs(60);
const HOLE_LOOK: Duration = Duration::from_secs(5);

/// At a writer that never pauses, no more is waited for than this, once there is something.
const FULL: Duration = Duration::from_millis(500);

/// Segments of the living log that are kept on disk as far as they go.
const PIECES: usize = 3;

const ANEW: &str = "restore it anew, which fetches what differs only: perennial restore --standby --delta -D DIR";

/// What comes of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Give(Wanted),
    /// The server has all there is.
    NotYet,
}

/// Where a segment that is asked for stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// There is more of it than the server has.
    More(Wanted),
    /// More is to come here.
    Growing,
    /// No more will come here: the server has it, or has to go another way.
    Elsewhere,
    /// It is not there, and WAL goes on after it.
    Hole,
}

/// What tells first that there is more.
#[derive(Debug)]
enum Watch {
    /// The log that is being written.
    Log(Tail),
    /// The first entry of a generation that has not opened its log.
    Entry(Generation, u64),
    /// The claim of the next generation.
    Claim(Generation),
}

/// Of logs, newest generation first: the living one, or else what comes after them. Pure.
fn next_news(logs: &[LogView]) -> Option<NextNews<'_>> {
    let newest = logs.first()?;
    Some(match logs.iter().find(|log| log.end().is_some()) {
        Some(opened) if opened.seal.is_none() => NextNews::Log(opened),
        _ if newest.seal.is_none() => NextNews::Entry(newest.generation, newest.next),
        _ => NextNews::Claim(newest.generation.next()),
    })
}

#[derive(Debug, PartialEq, Eq)]
enum NextNews<'a> {
    Log(&'a LogView),
    Entry(Generation, u64),
    Claim(Generation),
}

/// A segment of the living log, put together on disk entry by entry.
#[derive(Debug)]
struct Piece {
    name: SegmentName,
    generation: Generation,
    end: Lsn,
}

impl Piece {
    fn is(&self, name: SegmentName, generation: Generation) -> bool {
        self.name == name && self.generation == generation
    }
}

/// Answers one standby. Dropping a future of it loses nothing.
#[derive(Debug)]
pub struct Follower {
    source: Source,
    clock: Clock,
    data_dir: PathBuf,
    /// Where pieces are kept; emptied by whoever owns it.
    cache: PathBuf,
    origin: Option<Generation>,
    watch: Watch,
    pieces: Vec<Piece>,
    /// What the server was given last, and how far it goes.
    given: Option<(SegmentName, Lsn)>,
    /// The segment that was said not to be there, for the first time at once: the server may ask ahead of what it replays.
    absent: Option<SegmentName>,
    hole: Option<(SegmentName, Duration)>,
    /// When a writer was last heard of or the repository looked at, and when it was looked at (monotonic).
    heard: Duration,
    looked: Duration,
    /// When it was last asked whether there is more, and how long until that may be asked again.
    probed: Duration,
    pause: Duration,
}

impl Follower {
    /// For the standby in `data_dir`.
    pub async fn open(source: Source, data_dir: &Path, cache: &Path) -> Result<Follower> {
        let clock = source.repository.clock().clone();
        let now = clock.monotonic();
        let origin = origin::read(&data_dir.join(OWN_DIR), source.repository.descriptor().repository_id)?;
        let follower = Follower {
            watch: watch(&source).await?,
            source,
            data_dir: data_dir.to_owned(),
            cache: cache.to_owned(),
            origin,
            pieces: Vec::new(),
            given: None,
            absent: None,
            hole: None,
            heard: now,
            looked: now,
            probed: Duration::ZERO,
            pause: FIRST_PAUSE,
            clock,
        };
        follower.must_fit()?;
        Ok(follower)
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    fn newest_timeline(&self) -> Option<Timeline> {
        self.source.index.newest_timeline()
    }

    /// Waits until there is more of the segment than the server has, for a while.
    pub async fn answer(&mut self, name: SegmentName) -> Result<Answer> {
        let deadline = self.clock.monotonic() + WAIT;
        let newest = self.newest_timeline();
        loop {
            self.look_if_due().await?;
            match self.standing(name)? {
                Standing::More(wanted) => {
                    (self.hole, self.absent) = (None, None);
                    return Ok(Answer::Give(wanted));
                }
                Standing::Elsewhere => {
                    self.must_fit()?;
                    return Ok(Answer::NotYet);
                }
                Standing::Growing if !self.may_wait_for(name) => return Ok(Answer::NotYet),
                Standing::Growing => self.until_news(name, deadline).await?,
                Standing::Hole => self.look_into_hole(name).await?,
            }
            // A new timeline is found by the server itself, and it has to ask for that.
            if self.clock.monotonic() >= deadline || self.newest_timeline() != newest {
                if let Standing::More(wanted) = self.standing(name)? {
                    return Ok(Answer::Give(wanted));
                }
                return Ok(Answer::NotYet);
            }
        }
    }

    fn standing(&self, name: SegmentName) -> Result<Standing> {
        let size = self.source.segment_size();
        let Some(number) = name.number(size) else {
            return Err(Error::usage(format!("{name} is no segment of {} bytes", size.bytes())));
        };
        let Some(view) = self.source.view()? else { return Ok(Standing::Growing) };
        let (start, end) = (size.start_of(number), size.start_of(number + 1));
        let is_newest = name.timeline == view.history.timeline;
        if let Some(wanted) = self.source.locate(WalFileName::Segment(name))? {
            let through = wanted.through(start, size);
            return Ok(match self.has(name, through) {
                false => Standing::More(wanted),
                true if is_newest && through < end => Standing::Growing,
                true => Standing::Elsewhere,
            });
        }
        Ok(match view.is_on_the_way(name.timeline, number) {
            false => Standing::Elsewhere,
            true if view.has_wal_after(number) => Standing::Hole,
            true if is_newest => Standing::Growing,
            true => Standing::Elsewhere,
        })
    }

    /// Whether the server was given the segment as far as this; then it is in its `pg_wal`.
    fn has(&self, name: SegmentName, through: Lsn) -> bool {
        let given = self.given.is_some_and(|(of, to)| of == name && to >= through);
        given && self.data_dir.join("pg_wal").join(name.to_string()).is_file()
    }

    /// A segment of which it has nothing is asked for before what comes before it is replayed (`recovery_prefetch`): only
    /// from the second time on nothing else is to be done.
    fn may_wait_for(&mut self, name: SegmentName) -> bool {
        let has_some = self.given.is_some_and(|(of, _)| of == name);
        let asked = self.absent == Some(name);
        self.absent = if has_some { None } else { Some(name) };
        has_some || asked
    }

    /// Looks at everything anew.
    pub async fn look(&mut self) -> Result<()> {
        let began = self.clock.monotonic();
        self.source.refresh().await?;
        self.must_fit()?;
        self.watch = watch(&self.source).await?;
        (self.heard, self.looked, self.pause) = (began, began, FIRST_PAUSE);
        Ok(())
    }

    async fn look_if_due(&mut self) -> Result<()> {
        let now = self.clock.monotonic();
        let due = now.saturating_sub(self.heard) > SILENT || now.saturating_sub(self.looked) > OLD;
        if due { self.look().await } else { Ok(()) }
    }

    async fn until_news(&mut self, name: SegmentName, deadline: Duration) -> Result<()> {
        loop {
            let now = self.clock.monotonic();
            let next = (self.probed + self.pause).min(deadline);
            if next > now {
                self.clock.sleep(next - now).await;
            }
            self.look_if_due().await?;
            if self.clock.monotonic() >= deadline {
                return Ok(());
            }
            self.probed = self.clock.monotonic();
            if self.is_news(name).await? {
                self.pause = FIRST_PAUSE;
                return Ok(());
            }
            self.pause = (self.pause * 3 / 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether anything has come since. One request when nothing has.
    async fn is_news(&mut self, name: SegmentName) -> Result<bool> {
        let repository = self.source.repository.clone();
        let is_there = match &self.watch {
            Watch::Log(_) => return self.read_on().await,
            Watch::Claim(next) => repository.store().read(&layout::claim(*next), 0..1).await?.is_some(),
            Watch::Entry(generation, number) => {
                let entry = layout::log_entry(*generation, *number);
                // It may have no log at all, and store segments.
                repository.store().read(&entry, 0..1).await?.is_some()
                    || repository.wal_head(*generation, WalFileName::Segment(name)).await?.is_some()
            }
        };
        if is_there {
            self.look().await?;
        }
        Ok(is_there)
    }

    /// Reads what has come of the living log.
    async fn read_on(&mut self) -> Result<bool> {
        let (began, mut news) = (self.clock.monotonic(), false);
        loop {
            let Watch::Log(tail) = &mut self.watch else { return Ok(news) };
            let asked = self.clock.monotonic();
            let grown = self.source.repository.grow(tail).await?;
            let run = tail.run;
            if grown.entries > 0 {
                self.heard = asked;
            }
            news |= !grown.wal.is_empty();
            for (start, bytes) in &grown.wal {
                self.keep(&run, *start, bytes)?;
            }
            if !grown.wal.is_empty() {
                self.source.index.add_run(run, self.source.segment_size());
            }
            if grown.sealed {
                self.look().await?;
                return Ok(true);
            }
            if grown.entries == 0 || (news && asked.saturating_sub(began) > FULL) {
                return Ok(news);
            }
        }
    }

    /// A segment is missing: for good if it was pruned, or if it does not come.
    async fn look_into_hole(&mut self, name: SegmentName) -> Result<()> {
        let (size, repository) = (self.source.segment_size(), self.source.repository.clone());
        let start = name.start(size).unwrap_or_default();
        if start < size.start_of(size.number_at(repository.points_from().await?)) {
            return Err(Error::refused(format!(
                "this standby has fallen behind what the repository keeps: {name} was pruned"
            ))
            .hint(ANEW));
        }
        let now = self.clock.monotonic();
        let since = self.hole.filter(|(of, _)| *of == name).map_or(now, |(_, since)| since);
        self.hole = Some((name, since));
        if now.saturating_sub(since) < HOLE {
            self.clock.sleep(HOLE_LOOK).await;
            return self.look().await;
        }
        let key = layout::wal_file(self.source.lineage.tip().generation, WalFileName::Segment(name));
        Err(Error::damaged(format!(
            "{name} is missing and WAL goes on after it: it should be at {}, or under an older generation",
            repository.url(&key)
        ))
        .hint("bring the object back from a copy or an older version of the bucket; if there is a newer backup, restore the standby anew: perennial restore --standby --delta -D DIR"))
    }

    /// A standby that has anything of another history must not be given more of this one. PostgreSQL looks at timelines
    /// and positions; of two timelines with one number only the generations tell.
    fn must_fit(&self) -> Result<()> {
        let Some(view) = self.source.view()? else { return Ok(()) };
        // The server writes it this moment, perhaps: then the next look tells.
        let control = version_of(&self.data_dir).and_then(|version| ControlFile::read(&self.data_dir, version)).ok();
        match view.left_behind(self.origin, control.and_then(|control| control.recovered())) {
            Some(why) => Err(Error::refused(format!("this standby cannot follow the repository: {why}")).hint(ANEW)),
            None => Ok(()),
        }
    }

    /// Brings a segment, whose generation is noted before; `ahead`: the file, if it was fetched already.
    pub async fn give(
        &mut self,
        name: SegmentName,
        wanted: Wanted,
        ahead: Option<PathBuf>,
        destination: &Path,
    ) -> Result<()> {
        if self.origin < Some(wanted.generation()) {
            let repository_id = self.source.repository.descriptor().repository_id;
            origin::note(&self.data_dir.join(OWN_DIR), repository_id, wanted.generation())?;
            self.origin = Some(wanted.generation());
        }
        let size = self.source.segment_size();
        let start = name.start(size).unwrap_or_default();
        let through = wanted.through(start, size);
        match (ahead, wanted) {
            (Some(path), _) => super::helper::place(&path, destination)?,
            (None, Wanted::Log { run, switched: false, .. }) => {
                self.complete(name, &run, start..through).await?;
                copy_part(&self.piece_path(name), through.bytes_since(start), size, destination)?;
            }
            (None, wanted) => {
                download(&self.source.repository, wanted, WalFileName::Segment(name), destination).await?;
            }
        }
        self.given = Some((name, through));
        Ok(())
    }

    /// A history, by the last look: a new one comes with another writer, whose seal or first entry is seen before.
    pub async fn give_other(&mut self, name: WalFileName, destination: &Path) -> Result<Fetched> {
        if let WalFileName::History(timeline) = name
            && !self.source.index.has_history(timeline)
        {
            return self.no_history(timeline);
        }
        match self.source.resolve(name).await? {
            Resolved::EndOfWal(why) => Ok(Fetched::EndOfWal(why)),
            Resolved::At(wanted) => {
                download(&self.source.repository, wanted, name, destination).await.map(|()| Fetched::Done)
            }
        }
    }

    /// A standby finds a new timeline by asking for one after the other, and would never get past one that is missing.
    fn no_history(&self, timeline: Timeline) -> Result<Fetched> {
        match self.newest_timeline().filter(|newest| *newest > timeline) {
            Some(newest) => Err(Error::refused(format!(
                "a standby cannot get to timeline {newest}: the repository has no history of timeline {timeline}"
            ))
            .hint("restore it anew from a backup of the newest timeline (`perennial list`): perennial restore --standby --delta -D DIR")),
            None => Ok(Fetched::EndOfWal(format!("there is no timeline {timeline} yet"))),
        }
    }

    fn piece_path(&self, name: SegmentName) -> PathBuf {
        self.cache.join(format!("tail-{name}"))
    }

    /// Keeps what was read of the living log, if it continues what is there or begins a segment.
    fn keep(&mut self, run: &LogRun, start: Lsn, bytes: &[u8]) -> Result<()> {
        let size = self.source.segment_size();
        let number = size.number_at(start);
        let (name, first) = (SegmentName::new(run.timeline, number, size), size.start_of(number));
        let path = self.piece_path(name);
        if start == first {
            self.begin_piece(name, run.generation, first)?;
        }
        let continued = self.pieces.iter_mut().find(|piece| piece.is(name, run.generation) && piece.end == start);
        if let Some(piece) = continued {
            write_at(&path, start.bytes_since(first), bytes)?;
            piece.end = Lsn(start.0 + bytes.len() as u64);
        }
        Ok(())
    }

    fn begin_piece(&mut self, name: SegmentName, generation: Generation, start: Lsn) -> Result<()> {
        self.pieces.retain(|piece| piece.name != name);
        while self.pieces.len() >= PIECES {
            let oldest = self.pieces.remove(0);
            disk::remove_if_there(&self.piece_path(oldest.name))?;
        }
        drop(create(&self.piece_path(name))?);
        self.pieces.push(Piece { name, generation, end: start });
        Ok(())
    }

    /// Reads from the log what a piece lacks: all of it, when the server was asked in the middle of a segment.
    async fn complete(&mut self, name: SegmentName, run: &LogRun, wanted: Range<Lsn>) -> Result<()> {
        if !self.pieces.iter().any(|piece| piece.is(name, run.generation)) {
            self.begin_piece(name, run.generation, wanted.start)?;
        }
        let path = self.piece_path(name);
        let begun = self.pieces.iter_mut().find(|piece| piece.is(name, run.generation));
        let piece = begun.ok_or_else(|| Error::internal("a piece that was begun is gone"))?;
        let from = piece.end;
        if from >= wanted.end {
            return Ok(());
        }
        let write = |at: Lsn, bytes: &[u8]| {
            write_at(&path, at.bytes_since(wanted.start), bytes)?;
            piece.end = Lsn(at.0 + bytes.len() as u64);
            Ok(())
        };
        self.source.repository.read_log(run, from, wanted.end, write).await
    }
}

async fn watch(source: &Source) -> Result<Watch> {
    Ok(match next_news(&source.logs) {
        Some(NextNews::Log(view)) => match source.repository.tail(view).await? {
            Some(tail) => Watch::Log(tail),
            None => Watch::Entry(view.generation, view.next),
        },
        Some(NextNews::Entry(generation, number)) => Watch::Entry(generation, number),
        Some(NextNews::Claim(generation)) => Watch::Claim(generation),
        None => return Err(Error::internal("a lineage without a generation")),
    })
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).open(path).on("open", path)?;
    file.write_all_at(bytes, offset).on("write", path)
}

/// A segment that goes as far as `length`, zeros behind, put in its place whole.
#[allow(clippy::disallowed_methods, reason = "a fetched file need not survive a crash: recovery asks again")]
fn copy_part(from: &Path, length: u64, size: SegmentSize, destination: &Path) -> Result<()> {
    let temporary = temporary_beside(destination);
    let copy = || {
        let mut part = File::open(from).on("open", from)?.take(length);
        let mut file = create(&temporary)?;
        std::io::copy(&mut part, &mut file).on("copy to", &temporary)?;
        file.set_len(size.bytes()).on("extend", &temporary)?;
        std::fs::rename(&temporary, destination).on("rename to", destination)
    };
    let copied = copy();
    if copied.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    copied
}

#[cfg(test)]
mod tests;
