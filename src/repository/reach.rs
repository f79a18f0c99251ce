//! What can be reached: which WAL follows which backup, through where, and what is in the way.
//!
//! Pure. Restore plans by it, `wal fetch` answers by it, `list` shows it; retention and verify will walk it too, so that
//! they can never disagree about what a restore needs.

use super::manifest::BackupHead;
use super::{Lineage, WalIndex, WalPlace};
use crate::model::{BackupId, Generation, Lsn, Timeline, Timestamp};
use crate::wal::{History, SegmentName, SegmentSize};

/// The WAL of a lineage as seen on the way to one timeline: what lies on no ancestor, or past the point where an
/// ancestor was left, is not on the way, even if it is in the repository.
#[derive(Debug, Clone)]
pub struct View<'a> {
    pub lineage: &'a Lineage,
    pub index: &'a WalIndex,
    pub history: History,
}

/// How far WAL goes without a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// All WAL before this position is there.
    pub through: Lsn,
    /// The last segment, and the one that would come next.
    pub last: Option<SegmentName>,
    pub next: SegmentName,
    /// There is WAL after `next`, so `next` is missing, not yet to come.
    pub gap: bool,
}

/// A stretch of the past that can be restored to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Window {
    /// The newest generation of the lineage the window belongs to.
    pub generation: Generation,
    pub timeline: Timeline,
    pub oldest_backup: BackupId,
    pub newest_backup: BackupId,
    pub from: Lsn,
    pub from_time: Timestamp,
    pub through: Lsn,
    /// The segment that ends the window, and the missing one behind it if WAL goes on after a gap.
    #[serde(skip)]
    pub last: Option<SegmentName>,
    #[serde(serialize_with = "as_text")]
    pub missing: Option<SegmentName>,
    /// The WAL behind it was pruned: nothing is missing.
    pub pruned: bool,
}

fn as_text<S: serde::Serializer>(name: &Option<SegmentName>, s: S) -> Result<S::Ok, S::Error> {
    match name {
        Some(name) => s.collect_str(name),
        None => s.serialize_none(),
    }
}

impl<'a> View<'a> {
    /// The view towards `timeline`; `None` when the lineage knows no such timeline.
    pub fn new(lineage: &'a Lineage, index: &'a WalIndex, timeline: Timeline) -> Option<View<'a>> {
        Some(View { lineage, index, history: index.history(timeline)? })
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.lineage.tip().segment_size
    }

    /// Whether segment `number` of `timeline` lies on the way.
    pub fn is_on_the_way(&self, timeline: Timeline, number: u64) -> bool {
        let size = self.segment_size();
        self.history.spans().any(|(of, begin, end)| {
            of == timeline && number >= size.number_at(begin) && end.is_none_or(|end| number <= size.number_before(end))
        })
    }

    /// Where a segment on the way is kept. Of a timeline's first segment, which repeats the ancestor's up to the point
    /// where that was left, a part that ends before that point is of no use: the ancestor has more.
    pub fn locate(&self, timeline: Timeline, number: u64) -> Option<WalPlace> {
        let begin = self.history.spans().find(|(of, ..)| *of == timeline).map(|(_, begin, _)| begin)?;
        let usable = |place: &WalPlace| place.through(self.end_of_segment(number)) > begin;
        self.index.segment(timeline, number).filter(usable).filter(|_| self.is_on_the_way(timeline, number))
    }

    fn end_of_segment(&self, number: u64) -> Lsn {
        self.segment_size().start_of(number + 1)
    }

    /// Whether anything on the way lies after segment `number`.
    pub fn has_wal_after(&self, number: u64) -> bool {
        self.history.spans().any(|(timeline, ..)| {
            let later = self.index.segments(timeline).rev().take_while(|(later, _)| *later > number);
            later.into_iter().any(|(later, _)| self.is_on_the_way(timeline, later))
        })
    }

    /// Follows the WAL from `from` as recovery would: of the timelines a segment may belong to, the newest that has it.
    pub fn coverage(&self, from: Lsn) -> Coverage {
        let size = self.segment_size();
        let spans: Vec<_> = self.history.spans().collect();
        let mut number = size.number_at(from);
        let mut last = None;
        loop {
            let mut candidates = spans.iter().rev().filter(|(timeline, ..)| self.is_on_the_way(*timeline, number));
            let wanted = candidates.next().map_or(self.history.timeline, |(timeline, ..)| *timeline);
            let next = SegmentName::new(wanted, number, size);
            let Some(place) = self.locate(wanted, number) else {
                // The ancestor's own segment goes as far as the ancestor does.
                let older = candidates.find_map(|(timeline, _, end)| {
                    let through = self.locate(*timeline, number)?.through(self.end_of_segment(number));
                    Some((SegmentName::new(*timeline, number, size), end.map_or(through, |end| through.min(end))))
                });
                let (last, through) = match older {
                    Some((name, through)) => (Some(name), through),
                    None => (last, size.start_of(number)),
                };
                return Coverage { through, last, next, gap: self.has_wal_after(number) };
            };
            last = Some(next);
            let (through, end) = (place.through(self.end_of_segment(number)), self.end_of_segment(number));
            // Whoever left the timeline exactly at the segment's end has read its switch record (pg_switch_wal, or a
            // backup): what comes behind that is zeros, and may have died with the machine.
            let is_whole = through == end || self.history.end_of(wanted) == Some(Some(end));
            if !is_whole {
                return Coverage { through, last, next, gap: self.has_wal_after(number) };
            }
            number += 1;
        }
    }

    /// Whether what a generation had on a timeline up to a position is on the way.
    pub fn passes(&self, generation: Generation, timeline: Timeline, lsn: Lsn) -> bool {
        self.lineage.contains(generation) && self.history.has(timeline, lsn)
    }

    /// How far a restore from this backup gets; `None` when the backup does not lie on the way, or WAL that its own
    /// consistency needs is missing.
    pub fn coverage_of(&self, backup: &BackupHead) -> Option<Coverage> {
        let on_the_way = self.passes(backup.generation, backup.timeline, backup.stop_lsn);
        let coverage = on_the_way.then(|| self.coverage(backup.start_lsn))?;
        (coverage.through >= backup.stop_lsn).then_some(coverage)
    }

    /// The backups that a restore towards this timeline can start from, oldest position first, with how far each gets.
    pub fn usable<'b>(&self, backups: &'b [BackupHead]) -> Vec<(&'b BackupHead, Coverage)> {
        let mut usable: Vec<_> =
            backups.iter().filter_map(|backup| Some((backup, self.coverage_of(backup)?))).collect();
        usable.sort_by_key(|(backup, _)| (backup.stop_lsn, backup.backup_id));
        usable
    }

    /// The stretches that can be restored to on the way to this timeline, oldest first. WAL before `points_from` is kept
    /// as far as backups need it only.
    pub fn windows(&self, backups: &[BackupHead], points_from: Lsn) -> Vec<Window> {
        let mut windows: Vec<Window> = Vec::new();
        let size = self.segment_size();
        let is_pruned =
            |name: &SegmentName| name.number(size).is_some_and(|number| number < size.number_at(points_from));
        for (backup, coverage) in self.usable(backups) {
            match windows.last_mut().filter(|window| window.through == coverage.through) {
                Some(window) => window.newest_backup = backup.backup_id,
                None => windows.push(Window {
                    generation: self.lineage.tip().generation,
                    timeline: self.history.timeline,
                    oldest_backup: backup.backup_id,
                    newest_backup: backup.backup_id,
                    from: backup.stop_lsn,
                    from_time: backup.stopped_at,
                    through: coverage.through,
                    last: coverage.last,
                    missing: coverage.gap.then_some(coverage.next).filter(|name| !is_pruned(name)),
                    pruned: coverage.gap && is_pruned(&coverage.next),
                }),
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{RepositoryId, SystemId, WriteId};
    use crate::repository::log::LogRun;
    use crate::repository::{Claim, WalPlace, WalSource};
    use crate::wal::Switch;

    const SEGMENT: u64 = 16 << 20;

    fn size() -> SegmentSize {
        SegmentSize::try_from(SEGMENT).expect("16 MB")
    }

    fn lineage(generations: &[u32]) -> Lineage {
        let claims: Vec<Claim> = generations
            .iter()
            .enumerate()
            .map(|(place, number)| Claim {
                kind: String::new(),
                format: 1,
                writer_id: WriteId([0; 16]),
                generation: Generation(*number),
                parent: (place > 0).then(|| Generation(generations[place - 1])),
                system_id: SystemId(1),
                pg_major: 15,
                segment_size: size(),
                claimed_at: Timestamp::from_unix_micros(0),
                host: String::new(),
            })
            .collect();
        Lineage::of(&claims, Generation(*generations.last().expect("one"))).expect("a chain")
    }

    fn index(segments: &[(u32, u32, std::ops::Range<u64>)], histories: &[(u32, &[(u32, u64)])]) -> WalIndex {
        let mut index = WalIndex::default();
        for (generation, timeline, numbers) in segments {
            for number in numbers.clone() {
                let source = WalSource::Object { stored: 1 };
                let place = WalPlace { generation: Generation(*generation), source };
                index.add_segment(SegmentName::new(Timeline(*timeline), number, size()), size(), place);
            }
        }
        for (timeline, switches) in histories {
            let switches = switches.iter().map(|(of, at)| Switch { timeline: Timeline(*of), at: Lsn(*at) }).collect();
            index.add_history(History { timeline: Timeline(*timeline), switches });
        }
        index
    }

    fn backup(generation: u32, timeline: u32, start: u64, stop: u64) -> BackupHead {
        BackupHead {
            format: String::new(),
            write_id: WriteId([0; 16]),
            backup_id: BackupId { generation: Generation(generation), start: Lsn(start), nonce: 0 },
            repository_id: RepositoryId([0; 16]),
            system_id: SystemId(1),
            generation: Generation(generation),
            timeline: Timeline(timeline),
            pg_major: 15,
            pg_version: String::new(),
            segment_size: size(),
            region_size: 1 << 20,
            start_lsn: Lsn(start),
            stop_lsn: Lsn(stop),
            started_at: Timestamp::from_unix_micros(start as i64),
            stopped_at: Timestamp::from_unix_micros(stop as i64),
            next_xid: 0,
            data_checksums: true,
            backup_label: String::new(),
            tablespace_map: None,
            tablespaces: Vec::new(),
            files: 0,
            bytes: 0,
            stored: 0,
            packs: 0,
            parent: None,
            full_at: None,
            damaged: Vec::new(),
            damaged_pages: 0,
            lines: crate::repository::manifest::Lines::none(),
        }
    }

    #[test]
    fn wal_is_followed_across_a_promotion_and_no_further_than_it_goes() {
        let lineage = lineage(&[1, 2]);
        let fork = 5 * SEGMENT + 100;
        let index = index(&[(1, 1, 2..6), (2, 2, 5..9)], &[(2, &[(1, fork)])]);
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let coverage = view.coverage(Lsn(2 * SEGMENT + 40));
        assert_eq!(coverage.through, Lsn(9 * SEGMENT));
        assert!(!coverage.gap);
        assert_eq!(coverage.next, SegmentName::new(Timeline(2), 9, size()));
    }

    #[test]
    fn what_an_old_writer_pushes_after_it_was_left_is_not_on_the_way() {
        let lineage = lineage(&[1, 2]);
        // The fork is inside segment 5, of which only the ancestor's copy is there; 6 and 7 came from a zombie.
        let fork = 5 * SEGMENT + 100;
        let index = index(&[(1, 1, 2..8)], &[(2, &[(1, fork)])]);
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let coverage = view.coverage(Lsn(2 * SEGMENT));
        assert_eq!(coverage.through, Lsn(fork));
        assert!(!coverage.gap, "the zombie's segments are not WAL that goes on");
        assert_eq!(view.locate(Timeline(1), 6), None);
        assert!(view.locate(Timeline(1), 5).is_some());
    }

    fn run(generation: u32, timeline: u32, start: u64, end: u64) -> LogRun {
        LogRun {
            generation: Generation(generation),
            timeline: Timeline(timeline),
            start: Lsn(start),
            end: Lsn(end),
            first: 1,
            next: 2,
            at: Timestamp::from_unix_micros(0),
        }
    }

    #[test]
    fn the_tail_of_a_log_counts_to_the_byte() {
        let lineage = lineage(&[1, 2]);
        let mut index = index(&[(1, 1, 2..4)], &[]);
        index.add_run(run(1, 1, 2 * SEGMENT, 5 * SEGMENT + 77), size());
        // The next life went on with the same disk, began at the start of the segment again, and got less far.
        index.add_run(run(2, 1, 5 * SEGMENT, 5 * SEGMENT + 50), size());
        let view = View::new(&lineage, &index, Timeline(1)).expect("known");
        let coverage = view.coverage(Lsn(2 * SEGMENT + 40));
        assert_eq!((coverage.through, coverage.gap), (Lsn(5 * SEGMENT + 77), false));
        assert_eq!(view.locate(Timeline(1), 5).map(|place| place.generation), Some(Generation(1)));
        assert!(matches!(view.locate(Timeline(1), 3).expect("whole").source, WalSource::Object { .. }));
    }

    #[test]
    fn a_new_timeline_that_has_not_passed_its_beginning_hides_nothing_of_its_ancestor() {
        let lineage = lineage(&[1, 2]);
        let fork = 5 * SEGMENT + 100;
        let mut index = index(&[(1, 1, 2..5)], &[(2, &[(1, fork)])]);
        index.add_run(run(1, 1, 5 * SEGMENT, fork + 8), size());
        index.add_run(run(2, 2, 5 * SEGMENT, 5 * SEGMENT + 64), size());
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        assert_eq!(view.coverage(Lsn(2 * SEGMENT)).through, Lsn(fork), "the ancestor's, up to where it was left");
        assert_eq!(view.locate(Timeline(2), 5), None);
        index.add_run(run(2, 2, 5 * SEGMENT, fork + 500), size());
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        assert_eq!(view.coverage(Lsn(2 * SEGMENT)).through, Lsn(fork + 500));
    }

    #[test]
    fn a_switched_segment_whose_zeros_never_arrived_is_whole_for_who_read_the_switch() {
        let lineage = lineage(&[1, 2]);
        let mut index = index(&[(1, 1, 2..5), (2, 2, 6..7)], &[(2, &[(1, 6 * SEGMENT)])]);
        index.add_run(run(1, 1, 5 * SEGMENT, 5 * SEGMENT + 300), size());
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let coverage = view.coverage(Lsn(2 * SEGMENT));
        assert_eq!((coverage.through, coverage.gap), (Lsn(7 * SEGMENT), false));
        // Left anywhere else, the part that is missing held records.
        index.add_history(History {
            timeline: Timeline(3),
            switches: vec![Switch { timeline: Timeline(1), at: Lsn(6 * SEGMENT + 8) }],
        });
        let view = View::new(&lineage, &index, Timeline(3)).expect("known");
        assert_eq!(view.coverage(Lsn(2 * SEGMENT)).through, Lsn(5 * SEGMENT + 300));
    }

    #[test]
    fn a_missing_segment_in_the_middle_is_a_gap_not_an_end() {
        let lineage = lineage(&[1]);
        let index = index(&[(1, 1, 2..4), (1, 1, 5..7)], &[]);
        let view = View::new(&lineage, &index, Timeline(1)).expect("known");
        let coverage = view.coverage(Lsn(2 * SEGMENT));
        assert_eq!((coverage.through, coverage.gap), (Lsn(4 * SEGMENT), true));
        assert_eq!(coverage.next, SegmentName::new(Timeline(1), 4, size()));
        let windows = view.windows(
            &[backup(1, 1, 2 * SEGMENT + 40, 2 * SEGMENT + 80), backup(1, 1, 5 * SEGMENT + 40, 6 * SEGMENT)],
            Lsn(0),
        );
        assert_eq!(windows.len(), 2, "one on either side of the gap");
        assert_eq!(windows[0].missing, Some(coverage.next));
        assert_eq!(windows[1].missing, None);
    }

    #[test]
    fn a_backup_past_the_fork_or_without_its_wal_cannot_be_started_from() {
        let lineage = lineage(&[1, 2]);
        let fork = 5 * SEGMENT;
        let index = index(&[(1, 1, 2..8), (2, 2, 5..6)], &[(2, &[(1, fork)])]);
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let good = backup(1, 1, 2 * SEGMENT + 40, 3 * SEGMENT);
        let past_the_fork = backup(1, 1, 6 * SEGMENT + 40, 7 * SEGMENT);
        let without_wal = backup(2, 2, 5 * SEGMENT + 40, 7 * SEGMENT);
        let foreign = backup(3, 2, 5 * SEGMENT + 40, 6 * SEGMENT);
        let all = [past_the_fork, without_wal, foreign, good.clone()];
        let usable = view.usable(&all);
        assert_eq!(usable.iter().map(|(b, _)| b.backup_id).collect::<Vec<_>>(), [good.backup_id]);
    }
}
