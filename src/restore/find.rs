//! Finding a target's place in WAL before anything is written, from the heads of the segments on the way.

use futures::{StreamExt, TryStreamExt};

use super::plan::{Located, Reachable, unreachable};
use super::target::Target;
use crate::error::{Error, Result};
use crate::events::Level;
use crate::model::{Generation, Lsn, Timestamp};
use crate::repository::{Repository, WalHead};
use crate::wal::{SegmentName, WalFileName};

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
        Target::Newest | Target::Immediate => Ok(anywhere),
        Target::Lsn(lsn) => Ok(Located { not_after: Some(*lsn), through: Some(*lsn), ..anywhere }),
        Target::Time(time) => finder.time(*time, anywhere).await,
        Target::Name(name) => finder.name(name, anywhere).await,
        Target::Xid(xid) => finder.xid(*xid, anywhere).await,
    }
}

struct Finder<'a> {
    repository: &'a Repository,
    reachable: &'a Reachable,
    /// The segments on the way, newest first.
    segments: Vec<(SegmentName, Generation)>,
}

impl<'a> Finder<'a> {
    fn new(repository: &'a Repository, reachable: &'a Reachable) -> Result<Finder<'a>> {
        let view = reachable.view()?;
        let size = view.segment_size();
        let mut segments: Vec<(SegmentName, Generation)> = view
            .history
            .spans()
            .flat_map(|(timeline, ..)| {
                view.index.segments(timeline).map(move |(number, place)| (timeline, number, place))
            })
            .filter(|(timeline, number, _)| view.is_on_the_way(*timeline, *number))
            .map(|(timeline, number, place)| (SegmentName::new(timeline, number, size), place.generation))
            .collect();
        segments.sort_by_key(|(name, _)| std::cmp::Reverse((name.log, name.part, name.timeline)));
        Ok(Finder { repository, reachable, segments })
    }

    /// Reads heads, newest first, until `found` has an answer.
    async fn search<T>(&self, mut found: impl FnMut(SegmentName, &WalHead) -> Option<T>) -> Result<Option<T>> {
        for step in self.segments.chunks(STEP) {
            let reads: Vec<_> = step.iter().map(|(name, generation)| self.head(*name, *generation)).collect();
            let heads: Vec<WalHead> = futures::stream::iter(reads).buffered(PARALLEL).try_collect().await?;
            for ((name, _), head) in step.iter().zip(&heads) {
                if let Some(answer) = found(*name, head) {
                    return Ok(Some(answer));
                }
            }
        }
        Ok(None)
    }

    async fn head(&self, name: SegmentName, generation: Generation) -> Result<WalHead> {
        let head = self.repository.wal_head(generation, WalFileName::Segment(name)).await?;
        head.ok_or_else(|| Error::damaged(format!("{name} of generation {generation} was listed and is gone")))
    }

    fn unreachable(&self, target: &Target) -> Result<Error> {
        Ok(unreachable(&self.reachable.windows()?, target))
    }

    /// Recovery to a time needs a commit after it; without one the server would end with an error. If WAL is known to
    /// reach past the moment all the same, nothing happened since, and the newest state is what is asked for.
    async fn time(&self, time: Timestamp, anywhere: Located) -> Result<Located> {
        let mut newest_push: Option<Timestamp> = None;
        let last_commit = self
            .search(|_, head| {
                newest_push = newest_push.max(Some(head.pushed_at));
                head.last_commit
            })
            .await?;
        let before = Located { not_after_time: Some(time), ..anywhere.clone() };
        if last_commit.is_some_and(|last| last > time) {
            // WAL must reach the segment of the first commit after it.
            let mut through = None;
            self.search(|name, head| {
                if head.last_commit.is_some_and(|last| last > time) {
                    through = name.start(self.reachable.lineage.tip().segment_size).map(|start| Lsn(start.0 + 1));
                }
                head.last_commit.filter(|last| *last <= time).map(|_| ())
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

    async fn name(&self, name: &str, anywhere: Located) -> Result<Located> {
        let found = self
            .search(|_, head| head.restore_points.iter().rev().find(|point| point.name == name).map(|point| point.lsn))
            .await?;
        match found {
            Some(lsn) => Ok(Located { not_after: Some(lsn), through: Some(lsn), ..anywhere }),
            None => Err(self.unreachable(&Target::Name(name.to_owned()))?),
        }
    }

    /// The segments whose range of transactions includes it are read, so that the answer is certain.
    async fn xid(&self, xid: u32, anywhere: Located) -> Result<Located> {
        let mut candidates = Vec::new();
        self.search(|name, head| {
            if let (Some(low), Some(high)) = (head.lowest_xid, head.highest_xid)
                && (low..=high).contains(&xid)
            {
                candidates.push(name);
            }
            None::<()>
        })
        .await?;
        for name in candidates {
            let generation = self.segments.iter().find(|(of, _)| *of == name).map(|(_, generation)| *generation);
            let Some(generation) = generation else { continue };
            if let Some(end) = self.end_of_transaction(name, generation, xid).await? {
                let through = Some(Lsn(end.0));
                return Ok(Located { not_after: through, through, ..anywhere });
            }
        }
        Err(self.unreachable(&Target::Xid(xid))?)
    }

    async fn end_of_transaction(&self, name: SegmentName, generation: Generation, xid: u32) -> Result<Option<Lsn>> {
        let mut content = Vec::new();
        let collect = |_, piece: Vec<u8>| {
            content.extend_from_slice(&piece);
            Ok(())
        };
        self.repository.read_wal(generation, WalFileName::Segment(name), collect).await?;
        crate::wal::find_transaction_end(name, &content, xid)
    }
}

/// A note about a target that was taken for another.
pub fn note(asked: &Target, located: &Located) -> Option<(Level, String)> {
    (*asked != located.target)
        .then(|| (Level::Info, format!("nothing was committed after {asked}: restoring {}", located.target)))
}
