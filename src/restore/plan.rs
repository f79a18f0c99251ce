//! Which backup, and whether the target can be reached from it. Pure once the facts are read.

use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, Generation, Lsn, Timeline, Timestamp};
use crate::repository::manifest::{BackupHead, Backups};
use crate::repository::reach::{Coverage, View, Window};
use crate::repository::{Lineage, Repository, WalIndex, layout};
use crate::wal::WalFileName;

use super::target::Target;

/// What the repository holds of one history.
#[derive(Debug)]
pub struct Reachable {
    pub lineage: Lineage,
    pub index: WalIndex,
    pub backups: Vec<BackupHead>,
    /// What is wrong with backups that cannot be read.
    pub damaged: Vec<Error>,
    pub timeline: Timeline,
}

impl Reachable {
    /// Looks what there is of a history; `None` when nothing was ever archived.
    pub async fn find(
        repository: &Repository,
        generation: Option<Generation>,
        timeline: Option<Timeline>,
    ) -> Result<Option<Reachable>> {
        let generations = repository.generations().await?;
        let tip = match generation {
            Some(tip) if !generations.contains(&tip) => {
                return Err(Error::not_found(format!("{} has no generation {tip}", repository.address()))
                    .hint("`perennial list` shows the generations"));
            }
            Some(tip) => Some(tip),
            None => generations.iter().copied().max(),
        };
        let Some(tip) = tip else { return Ok(None) };
        let lineage = repository.lineage(tip, None).await?;
        let index = repository.wal_index(&lineage).await?;
        let timeline = match timeline {
            Some(timeline) if !index.knows(timeline) => {
                return Err(Error::not_found(format!(
                    "generation {tip} and its ancestors have no timeline {timeline}"
                ))
                .hint("`perennial list` shows the generations and their timelines"));
            }
            timeline => timeline.or(index.newest_timeline()),
        };
        let Some(timeline) = timeline else { return Ok(None) };
        if index.history(timeline).is_none() {
            let name = WalFileName::History(timeline);
            let missing = repository.missing(&layout::wal_file(tip, name));
            return Err(missing.context(format!("WAL of timeline {timeline} cannot be followed")));
        }
        let Backups { sound, damaged } = repository.backups().await?;
        Ok(Some(Reachable { lineage, index, backups: sound, damaged, timeline }))
    }

    /// The same where there must be something.
    pub async fn read(
        repository: &Repository,
        generation: Option<Generation>,
        timeline: Option<Timeline>,
    ) -> Result<Reachable> {
        Reachable::find(repository, generation, timeline).await?.ok_or_else(|| nothing(repository))
    }

    pub fn view(&self) -> Result<View<'_>> {
        View::new(&self.lineage, &self.index, self.timeline)
            .ok_or_else(|| Error::internal(format!("timeline {} has no history", self.timeline)))
    }

    /// `points_from`: where the last prune has left all WAL from (`Repository::points_from`), for whoever tells gaps.
    pub fn windows(&self, points_from: Lsn) -> Result<Vec<Window>> {
        Ok(self.view()?.windows(&self.backups, points_from))
    }
}

fn nothing(repository: &Repository) -> Error {
    Error::not_found(format!(
        "{} holds no backup that could be restored: nothing was ever archived",
        repository.address()
    ))
    .hint("start a new cluster with `perennial run URL -D DIR --init`")
}

/// A target whose place in WAL is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    pub target: Target,
    pub inclusive: bool,
    /// The backup must be complete at or before this position.
    pub not_after: Option<Lsn>,
    /// The backup must be complete before this moment.
    pub not_after_time: Option<Timestamp>,
    /// WAL must go at least this far.
    pub through: Option<Lsn>,
}

impl Located {
    pub fn anywhere(target: Target, inclusive: bool) -> Located {
        Located { target, inclusive, not_after: None, not_after_time: None, through: None }
    }
}

/// What will be restored, decided.
#[derive(Debug, Clone)]
pub struct Choice {
    pub backup: BackupHead,
    pub located: Located,
    /// The generation whose history is followed, and the oldest one that has WAL it needs.
    pub generation: Generation,
    pub oldest: Generation,
    pub timeline: Timeline,
    /// All WAL before this is there, and whether there is more behind a hole.
    pub through: Lsn,
    pub gap: bool,
    /// What is wrong with other backups.
    pub damaged: Vec<String>,
}

impl Choice {
    pub fn describe(&self) -> String {
        match &self.located.target {
            Target::Newest | Target::BeforeGap => {
                format!("{}, {} on timeline {}", self.located.target, self.through, self.timeline)
            }
            other => other.to_string(),
        }
    }
}

/// Chooses the newest backup from which the target can be reached, or checks the one that was named.
pub fn choose(reachable: &mut Reachable, backup: Option<BackupId>, located: &Located) -> Result<Choice> {
    let outcome = choose_from(reachable, backup, located);
    // Without a sound backup, the damage is what the operator must know.
    match outcome {
        Err(error) if error.kind() == Kind::NotFound && !reachable.damaged.is_empty() => {
            Err(reachable.damaged.swap_remove(0))
        }
        outcome => outcome,
    }
}

fn choose_from(reachable: &Reachable, backup: Option<BackupId>, located: &Located) -> Result<Choice> {
    let view = reachable.view()?;
    let usable = view.usable(&reachable.backups);
    let tip = reachable.lineage.tip().generation;
    let named = |(head, _): &&(&BackupHead, Coverage)| backup.is_none_or(|id| head.backup_id == id);
    let mut candidates = usable.iter().filter(named).peekable();
    if candidates.peek().is_none() {
        return Err(no_backup(reachable, backup));
    }
    let reaches = |(head, coverage): &&(&BackupHead, Coverage)| {
        located.not_after.is_none_or(|lsn| head.stop_lsn <= lsn)
            && located.not_after_time.is_none_or(|time| head.stopped_at <= time)
            && located.through.is_none_or(|lsn| coverage.through > lsn || (coverage.through == lsn && !coverage.gap))
    };
    let best = match located.target {
        // A gap may leave an older backup with less WAL behind it: the newest state is the one furthest on.
        Target::Newest | Target::BeforeGap => {
            candidates.filter(reaches).max_by_key(|(head, coverage)| (coverage.through, head.stop_lsn))
        }
        _ => candidates.rfind(reaches),
    };
    let (head, coverage) =
        best.ok_or_else(|| unreachable(&view.windows(&reachable.backups, Lsn(0)), &located.target))?;
    if located.target == Target::Newest && coverage.gap {
        return Err(Error::damaged(format!(
            "the newest state cannot be reached: {} is missing and WAL goes on after it",
            coverage.next
        ))
        .hint("bring the object back, or restore what comes before it into a new directory: perennial restore -D DIR --before-gap"));
    }
    Ok(Choice {
        backup: (*head).clone(),
        located: located.clone(),
        generation: tip,
        // A backup of a standby may start before its generation does.
        oldest: view.oldest_from(head.start_lsn).map_or(head.generation, |oldest| oldest.min(head.generation)),
        timeline: reachable.timeline,
        through: coverage.through,
        gap: coverage.gap,
        damaged: reachable.damaged.iter().map(Error::to_string).collect(),
    })
}

fn no_backup(reachable: &Reachable, backup: Option<BackupId>) -> Error {
    let tip = reachable.lineage.tip().generation;
    match backup {
        Some(id) if reachable.backups.iter().any(|head| head.backup_id == id) => Error::refused(format!(
            "backup {id} does not lead to timeline {} of generation {tip}, or WAL it needs is missing",
            reachable.timeline
        ))
        .hint("name the history it belongs to with --generation and --timeline (`perennial list`)"),
        Some(id) => Error::not_found(format!("there is no backup {id}")).hint("`perennial list` shows the backups"),
        None => Error::not_found(format!(
            "no backup leads to timeline {} of generation {tip}: its first one never became restorable",
            reachable.timeline
        ))
        .hint("`perennial list` shows other generations; choose one with --generation"),
    }
}

/// Says which stretches can be reached instead.
pub fn unreachable(windows: &[Window], target: &Target) -> Error {
    let stretches: Vec<String> = windows
        .iter()
        .map(|window| format!("{} ({}) to {}", window.from, window.from_time.short(), window.through))
        .collect();
    Error::not_found(format!(
        "{target} cannot be reached; reachable on timeline {}: {}",
        windows.first().map_or(0, |w| w.timeline.0),
        stretches.join("; ")
    ))
    .hint("`perennial list` shows every generation's reachable window; choose another with --generation and --timeline")
}
