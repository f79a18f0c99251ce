//! Which WAL must stay for the backups that stay. Pure.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::model::{Generation, Lsn, Timeline};
use crate::repository::manifest::BackupHead;
use crate::repository::reach::View;

/// A stretch of one timeline that must stay, in the generations of one history.
#[derive(Debug, Clone)]
struct Span {
    generations: Arc<BTreeSet<Generation>>,
    timeline: Timeline,
    numbers: RangeInclusive<u64>,
}

/// Segments that must stay.
#[derive(Debug, Clone, Default)]
pub struct Needs(Vec<Span>);

impl Needs {
    /// All WAL of a history from `from` on.
    pub fn add_all_since(&mut self, view: &View<'_>, from: Lsn) {
        self.add(view, from, None);
    }

    /// What a backup's own consistency needs, and a segment more: `recovery_target = 'immediate'` stops before the record
    /// after the backup's end (`recoveryStopsBefore`, xlogrecovery.c), so that must be there to be read.
    pub fn add_backup(&mut self, view: &View<'_>, backup: &BackupHead) {
        self.add(view, backup.start_lsn, Some(Lsn(backup.stop_lsn.0 + view.segment_size().bytes())));
    }

    fn add(&mut self, view: &View<'_>, from: Lsn, to: Option<Lsn>) {
        let size = view.segment_size();
        let claims = view.lineage.claims().iter();
        let generations: Arc<BTreeSet<Generation>> = Arc::new(claims.map(|claim| claim.generation).collect());
        for (timeline, begin, end) in view.history.spans() {
            let first = size.number_at(begin.max(from));
            let last = [end, to].into_iter().flatten().min().map_or(u64::MAX, |end| size.number_before(end));
            if first <= last {
                self.0.push(Span { generations: Arc::clone(&generations), timeline, numbers: first..=last });
            }
        }
    }

    /// Whether a segment that this generation stored must stay.
    pub fn has(&self, generation: Generation, timeline: Timeline, number: u64) -> bool {
        self.0.iter().any(|span| {
            span.timeline == timeline && span.numbers.contains(&number) && span.generations.contains(&generation)
        })
    }
}
