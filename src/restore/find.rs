//! Finding a target's place in WAL before anything is written, from the heads of the segments on the way.

use futures::{StreamExt, TryStreamExt};

use super::plan::{Located, Reachable, unreachable};
use super::target::Target;
use crate::error::{Error, Result};
use crate::events::Level;
use crate::model::{Lsn, Timestamp};
use crate::repository::{Known, Repository, WalPlace};
use crate::wal::SegmentName;

/// Heads read at once, and in steps of how many, newest first.
const PARALLEL: usize = 16;
const STEP: usize = 64;

/// Checks the target against what is reachable. The answer's bounds choose the backup.
pub async fn locate(
    repository: &Repository,
    reachable: &Reachable,
    target: &Target,
    inclusive: bool,
) -> Result<Located> {
    let anywhere = Located::anywhere(target.clone(), inclusive);
    let finder = Finder::new(repository, reachable)?;
    match target {
        Target::Newest | Target::BeforeGap | Target::Immediate => Ok(anywhere),
        Target::Lsn(lsn) => Ok(finder.lsn(*lsn, anywhere)),
        Target::Time(time) => finder.time(*time, anywhere).await,
        Target::Name(name) => finder.name(name, anywhere).await,
        Target::Xid(xid) => finder.xid(*xid, anywhere).await,
    }
}

struct Finder<'a> {
    repository: &'a Repository,
    reachable: &'a Reachable,
    /// The segments on the way, newest first.
    segments: Vec<(SegmentName, WalPlace)>,
}

impl<'a> Finder<'a> {
    fn new(repository: &'a Repository, reachable: &'a Reachable) -> Result<Finder<'a>> {
        let view = reachable.view()?;
        let size = view.segment_size();
        let view = &view;
        let mut segments: Vec<(SegmentName, WalPlace)> = view
            .history
            .spans()
            .flat_map(|(timeline, ..)| view.index.segments(timeline).map(move |(number, _)| (timeline, number)))
            .filter_map(|(timeline, number)| {
                Some((SegmentName::new(timeline, number, size), view.locate(timeline, number)?))
            })
            .collect();
        segments.sort_by_key(|(name, _)| std::cmp::Reverse((name.log, name.part, name.timeline)));
        Ok(Finder { repository, reachable, segments })
    }

    /// Reads heads, newest first, until `found` has an answer.
    async fn search<T>(&self, mut found: impl FnMut(SegmentName, &Known) -> Option<T>) -> Result<Option<T>> {
        for step in self.segments.chunks(STEP) {
            let reads: Vec<_> = step.iter().map(|(name, place)| self.look(*name, *place)).collect();
            let looks: Vec<Known> = futures::stream::iter(reads).buffered(PARALLEL).try_collect().await?;
            for ((name, _), known) in step.iter().zip(&looks) {
                if let Some(answer) = found(*name, known) {
                    return Ok(Some(answer));
                }
            }
        }
        Ok(None)
    }

    async fn look(&self, name: SegmentName, place: WalPlace) -> Result<Known> {
        let size = self.reachable.lineage.tip().segment_size;
        self.repository.segment_facts(&self.reachable.index, place, name, size).await
    }

    fn unreachable(&self, target: &Target) -> Result<Error> {
        Ok(unreachable(&self.reachable.windows(Lsn(0))?, target))
    }

    /// Recovery to a position needs a record that starts there or later. Where WAL ends just there, nothing follows, and
    /// the newest state is what is asked for.
    fn lsn(&self, lsn: Lsn, anywhere: Located) -> Located {
        let located = Located { not_after: Some(lsn), through: Some(lsn), ..anywhere };
        let view = self.reachable.view();
        let ends_there = view.is_ok_and(|view| {
            let usable = view.usable(&self.reachable.backups);
            usable.iter().any(|(_, coverage)| coverage.through == lsn && !coverage.gap)
        });
        if ends_there { Located { target: Target::Newest, ..located } } else { located }
    }

    /// Recovery to a time needs a commit after it; without one the server would end with an error. If WAL is known to
    /// reach past the moment all the same, nothing happened since, and the newest state is what is asked for.
    async fn time(&self, time: Timestamp, anywhere: Located) -> Result<Located> {
        let mut newest_push: Option<Timestamp> = None;
        let last_commit = self
            .search(|_, known| {
                newest_push = newest_push.max(Some(known.at));
                known.facts.last_commit
            })
            .await?;
        let before = Located { not_after_time: Some(time), ..anywhere.clone() };
        if last_commit.is_some_and(|last| last > time) {
            // WAL must reach the segment of the first commit after it.
            let mut through = None;
            self.search(|name, known| {
                let last_commit = known.facts.last_commit;
                if last_commit.is_some_and(|last| last > time) {
                    through = name.start(self.reachable.lineage.tip().segment_size).map(|start| Lsn(start.0 + 1));
                }
                last_commit.filter(|last| *last <= time).map(|_| ())
            })
            .await?;
            return Ok(Located { through, ..before });
        }
        if newest_push.is_some_and(|pushed| pushed >= time) {
            return Ok(Located { target: Target::Newest, ..before });
        }
        let error = self.unreachable(&Target::Time(time))?;
        let reached = last_commit.map_or("no commit".to_owned(), |last| format!("the last commit at {last}"));
        Err(error.context(format!("WAL in the repository ends with {reached}")))
    }

    /// The newest point of that name. PostgreSQL stops at the first one after the backup it starts from: when a name was
    /// given twice, the position is asked for instead, which is the point's own end.
    async fn name(&self, name: &str, anywhere: Located) -> Result<Located> {
        let mut found: Vec<Lsn> = Vec::new();
        self.search(|_, known| {
            let points = known.facts.restore_points.iter().rev().filter(|point| point.name == name);
            found.extend(points.map(|point| point.lsn));
            None::<()>
        })
        .await?;
        let Some(lsn) = found.first().copied() else { return Err(self.unreachable(&Target::Name(name.to_owned()))?) };
        let located = Located { not_after: Some(lsn), through: Some(lsn), ..anywhere };
        match found.len() {
            1 => Ok(located),
            _ => Ok(Located { inclusive: false, ..self.lsn(lsn, Located { target: Target::Lsn(lsn), ..located }) }),
        }
    }

    /// The segments whose range of transactions includes it are read, so that the answer is certain.
    async fn xid(&self, xid: u32, anywhere: Located) -> Result<Located> {
        let mut candidates = Vec::new();
        self.search(|name, known| {
            if let (Some(low), Some(high)) = (known.facts.lowest_xid, known.facts.highest_xid)
                && (low..=high).contains(&xid)
            {
                candidates.push(name);
            }
            None::<()>
        })
        .await?;
        for name in candidates {
            let Some((_, place)) = self.segments.iter().find(|(of, _)| *of == name) else { continue };
            let size = self.reachable.lineage.tip().segment_size;
            let content = self.repository.segment_content(&self.reachable.index, *place, name, size).await?;
            if let Some(end) = crate::wal::find_transaction_end(name, &content, xid)? {
                let through = Some(Lsn(end.0));
                return Ok(Located { not_after: through, through, ..anywhere });
            }
        }
        Err(self.unreachable(&Target::Xid(xid))?)
    }
}

/// A note about a target that was taken for another.
pub fn note(asked: &Target, located: &Located) -> Option<(Level, String)> {
    match (asked, &located.target) {
        (asked, target) if asked == target => None,
        (Target::Name(_), Target::Lsn(lsn)) => {
            Some((Level::Info, format!("{asked} was made more than once: restoring to the newest, at {lsn}")))
        }
        (_, target) => Some((Level::Info, format!("nothing was committed after {asked}: restoring {target}"))),
    }
}
