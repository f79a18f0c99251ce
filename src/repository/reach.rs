//! What can be reached: which WAL follows which backup, through where, and what is in the way.
//!
//! Pure. Restore plans by it, `wal fetch` answers by it, `list` shows it; retention and verify will walk it too, so that
//! they can never disagree about what a restore needs.

use std::collections::BTreeSet;
use std::sync::OnceLock;

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
    /// Oldest first; where they begin, where they end and their numbers only grow.
    spans: Vec<Span>,
    /// Found when they are first asked for: a repository of years is walked once, not for each backup.
    runs: OnceLock<Vec<Run>>,
}

/// A timeline on the way, and its segments on it.
#[derive(Debug, Clone, Copy)]
struct Span {
    timeline: Timeline,
    begin: Lsn,
    first: u64,
    last: u64,
}

/// Segments one behind the other without a hole, and what ends them.
#[derive(Debug, Clone)]
struct Run {
    first: u64,
    /// The first that cannot be gone past.
    stop: u64,
    coverage: Coverage,
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
        let (history, size) = (index.history(timeline)?, lineage.tip().segment_size);
        let span = |(timeline, begin, end): (Timeline, Lsn, Option<Lsn>)| {
            let last = end.map_or(u64::MAX, |end| size.number_before(end));
            Span { timeline, begin, first: size.number_at(begin), last }
        };
        let spans = history.spans().map(span).collect();
        Some(View { lineage, index, history, spans, runs: OnceLock::new() })
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.lineage.tip().segment_size
    }

    /// Whether segment `number` of `timeline` lies on the way.
    pub fn is_on_the_way(&self, timeline: Timeline, number: u64) -> bool {
        self.span(timeline).is_some_and(|span| span.first <= number && number <= span.last)
    }

    fn span(&self, timeline: Timeline) -> Option<&Span> {
        let place = self.spans.binary_search_by_key(&timeline, |span| span.timeline).ok()?;
        self.spans.get(place)
    }

    /// The timelines to which a segment on the way may belong, newest first.
    fn candidates(&self, number: u64) -> impl Iterator<Item = Timeline> {
        let begun = self.spans.partition_point(|span| span.first <= number);
        self.spans[..begun].iter().rev().take_while(move |span| number <= span.last).map(|span| span.timeline)
    }

    /// Where a segment on the way is kept. Of a timeline's first segment, which repeats the ancestor's up to the point
    /// where that was left, a part that ends before that point is of no use: the ancestor has more.
    pub fn locate(&self, timeline: Timeline, number: u64) -> Option<WalPlace> {
        let begin = self.span(timeline)?.begin;
        let usable = |place: &WalPlace| place.through(self.end_of_segment(number)) > begin;
        self.index.segment(timeline, number).filter(usable).filter(|_| self.is_on_the_way(timeline, number))
    }

    fn end_of_segment(&self, number: u64) -> Lsn {
        self.segment_size().start_of(number + 1)
    }

    /// The first segment on the way from `number` on of which there is anything.
    fn next_from(&self, number: u64) -> Option<u64> {
        let first = |span: &Span| self.index.first_within(span.timeline, number.max(span.first), span.last);
        self.spans.iter().filter_map(first).min()
    }

    /// Whether anything on the way lies after segment `number`.
    pub fn has_wal_after(&self, number: u64) -> bool {
        self.next_from(number + 1).is_some()
    }

    /// Follows the WAL from `from` as recovery would: of the timelines a segment may belong to, the newest that has it.
    pub fn coverage(&self, from: Lsn) -> Coverage {
        let number = self.segment_size().number_at(from);
        let runs = self.runs.get_or_init(|| self.find_runs());
        let run = runs.get(runs.partition_point(|run| run.stop <= number)).filter(|run| run.first <= number);
        run.map_or_else(|| self.stop_at(number, None), |run| run.coverage.clone())
    }

    fn find_runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut next = self.next_from(0);
        while let Some(first) = next {
            let (mut stop, mut last) = (first, None);
            while let Some(name) = self.whole(stop) {
                (stop, last) = (stop + 1, Some(name));
            }
            if first < stop {
                runs.push(Run { first, stop, coverage: self.stop_at(stop, last) });
            }
            // The one that cannot be gone past may be there in part.
            next = self.next_from(stop + 1);
        }
        runs
    }

    /// The timeline that recovery would read a segment of.
    fn wanted(&self, number: u64) -> Timeline {
        self.candidates(number).next().unwrap_or(self.history.timeline)
    }

    /// The segment that recovery would read, if it can go on behind it.
    fn whole(&self, number: u64) -> Option<SegmentName> {
        let wanted = self.wanted(number);
        let end = self.end_of_segment(number);
        let through = self.locate(wanted, number)?.through(end);
        // Whoever left the timeline exactly at the segment's end has read its switch record (pg_switch_wal, or a
        // backup): what comes behind that is zeros, and may have died with the machine.
        let is_whole = through == end || self.history.end_of(wanted) == Some(Some(end));
        is_whole.then(|| SegmentName::new(wanted, number, self.segment_size()))
    }

    /// What is covered when recovery has come as far as segment `number`, which is not whole, from the one before it.
    fn stop_at(&self, number: u64, before: Option<SegmentName>) -> Coverage {
        let size = self.segment_size();
        let (wanted, end) = (self.wanted(number), self.end_of_segment(number));
        let next = SegmentName::new(wanted, number, size);
        let of = |timeline: Timeline| Some((timeline, self.locate(timeline, number)?.through(end)));
        // The ancestor's own segment goes as far as the ancestor does.
        let (last, through) = match self.candidates(number).find_map(of) {
            Some((timeline, through)) => {
                let left = self.history.end_of(timeline).flatten();
                let through = left.filter(|_| timeline != wanted).map_or(through, |left| through.min(left));
                (Some(SegmentName::new(timeline, number, size)), through)
            }
            None => (before, size.start_of(number)),
        };
        Coverage { through, last, next, gap: self.has_wal_after(number) }
    }

    /// Why a copy that still follows the repository does not lie on the way: it was given WAL of a generation, or has
    /// replayed WAL, that this history does not have. `None` when it does.
    pub fn left_behind(&self, origin: Option<Generation>, reached: Option<(Timeline, Lsn)>) -> Option<String> {
        let tip = self.lineage.tip().generation;
        if let Some(origin) = origin.filter(|origin| !self.lineage.contains(*origin)) {
            return Some(format!("it has WAL of generation {origin}, from which generation {tip} does not descend"));
        }
        let (timeline, lsn) = reached.filter(|(timeline, lsn)| !self.history.has(*timeline, *lsn))?;
        Some(match self.history.end_of(timeline).flatten() {
            Some(left) => {
                format!("it has replayed timeline {timeline} up to {lsn}, generation {tip} left that at {left}")
            }
            None => format!("it is on timeline {timeline}, generation {tip} is on timeline {}", self.history.timeline),
        })
    }

    /// Why WAL from a position on does not lead a copy to the end of this history, or not as far as it has come.
    pub fn falls_short(&self, from: Lsn, reached: Option<(Timeline, Lsn)>) -> Option<String> {
        let coverage = self.coverage(from);
        let least = reached.map_or(from, |(_, lsn)| lsn.max(from));
        match (coverage.gap, coverage.through < least) {
            (true, _) => Some(format!("it needs WAL from {from} on, and {} is not there any more", coverage.next)),
            (_, true) => Some(format!("it has come to {least}, WAL in the repository ends at {}", coverage.through)),
            _ => None,
        }
    }

    /// The oldest generation that keeps any of the WAL from a position on.
    pub fn oldest_from(&self, from: Lsn) -> Option<Generation> {
        let first = self.segment_size().number_at(from);
        let timelines = self.history.spans().map(|(timeline, ..)| timeline);
        let places = timelines.flat_map(|timeline| {
            let on_the_way = move |number: &u64| *number >= first && self.is_on_the_way(timeline, *number);
            self.index
                .segments(timeline)
                .filter(move |(number, _)| on_the_way(number))
                .map(|(_, place)| place.generation)
        });
        places.min()
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

    /// The segments that a backup's own consistency needs, and one behind them if there is one: recovery to the end of a
    /// backup may read a record more.
    pub fn segments_of(&self, backup: &BackupHead) -> Vec<(SegmentName, WalPlace)> {
        let size = self.segment_size();
        let spans: Vec<_> = self.history.spans().collect();
        let of = |number: u64| {
            let mut places = spans.iter().rev().map(|(timeline, ..)| (*timeline, self.locate(*timeline, number)));
            places.find_map(|(timeline, place)| Some((SegmentName::new(timeline, number, size), place?)))
        };
        (size.number_at(backup.start_lsn)..=size.number_before(backup.stop_lsn) + 1).filter_map(of).collect()
    }

    /// The backups that a restore towards this timeline can start from, oldest position first, with how far each gets.
    pub fn usable<'b>(&self, backups: &'b [BackupHead]) -> Vec<(&'b BackupHead, Coverage)> {
        let mut usable: Vec<_> =
            backups.iter().filter_map(|backup| Some((backup, self.coverage_of(backup)?))).collect();
        usable.sort_by_key(|(backup, _)| (backup.stop_lsn, backup.backup_id));
        usable
    }

    /// Numbers of the missing segments that end the stretches of backups while WAL goes on behind them.
    pub fn holes(&self, backups: &[BackupHead]) -> BTreeSet<u64> {
        let usable = self.usable(backups).into_iter().filter(|(_, coverage)| coverage.gap);
        usable.filter_map(|(_, coverage)| coverage.next.number(self.segment_size())).collect()
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
    use crate::chance::Chance;
    use crate::model::{SystemId, WriteId};
    use crate::repository::log::LogRun;
    use crate::repository::manifest::backup_head as backup;
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
    fn a_copy_goes_on_only_along_its_own_history() {
        let lineage = lineage(&[1, 3]);
        let fork = 5 * SEGMENT + 100;
        let index = index(&[(1, 1, 2..6), (3, 2, 5..9)], &[(2, &[(1, fork)])]);
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let on = |timeline: u32, lsn: u64| Some((Timeline(timeline), Lsn(lsn)));
        for (origin, reached, why) in [
            (Some(1), on(1, fork), None),
            (Some(3), on(2, fork + 8), None),
            (None, None, None),
            (Some(2), on(1, 3 * SEGMENT), Some("generation 2")),
            (Some(1), on(1, fork + 8), Some("left that at")),
            (Some(1), on(4, fork), Some("on timeline 4")),
        ] {
            let said = view.left_behind(origin.map(Generation), reached);
            let as_expected = match (&said, why) {
                (Some(said), Some(why)) => said.contains(why),
                (said, why) => said.is_none() && why.is_none(),
            };
            assert!(as_expected, "{origin:?} {reached:?}: {said:?}");
        }
    }

    #[test]
    fn a_copy_needs_all_wal_from_where_it_reads_on() {
        let lineage = lineage(&[1, 2]);
        let index = index(&[(1, 1, 2..4), (1, 1, 5..6), (2, 1, 6..9)], &[]);
        let view = View::new(&lineage, &index, Timeline(1)).expect("known");
        let at = |segment: u64| Lsn(segment * SEGMENT + 40);
        assert_eq!(view.falls_short(at(5), Some((Timeline(1), at(8)))), None);
        assert!(view.falls_short(at(3), None).is_some_and(|why| why.contains("000000010000000000000004")));
        assert!(view.falls_short(at(1), None).is_some(), "pruned before it was read");
        assert!(view.falls_short(at(5), Some((Timeline(1), at(9)))).is_some(), "it is ahead of the repository");
        assert!(view.falls_short(at(9), None).is_some(), "it reads on where nothing is");
        assert_eq!(view.oldest_from(at(5)), Some(Generation(1)));
        assert_eq!(view.oldest_from(at(6)), Some(Generation(2)));
        assert_eq!(view.oldest_from(at(9)), None);
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
    fn a_backup_needs_its_own_segments_and_one_more_if_there_is_one() {
        let lineage = lineage(&[1, 2]);
        let index = index(&[(1, 1, 2..6), (2, 2, 5..7)], &[(2, &[(1, 5 * SEGMENT + 100)])]);
        let view = View::new(&lineage, &index, Timeline(2)).expect("known");
        let names = |start, stop| -> Vec<(u32, u64)> {
            let segments = view.segments_of(&backup(1, 1, start, stop));
            segments.iter().map(|(name, _)| (name.timeline.0, name.number(size()).expect("a number"))).collect()
        };
        assert_eq!(names(2 * SEGMENT + 40, 3 * SEGMENT), [(1, 2), (1, 3)]);
        assert_eq!(names(4 * SEGMENT + 40, 4 * SEGMENT + 80), [(1, 4), (2, 5)], "which repeats the ancestor's");
        assert_eq!(names(6 * SEGMENT + 40, 6 * SEGMENT + 80), [(2, 6)], "nothing follows yet");
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

    /// Segment by segment, as recovery goes.
    fn walked(view: &View<'_>, from: Lsn) -> Coverage {
        let size = view.segment_size();
        let (mut number, mut last) = (size.number_at(from), None);
        loop {
            let spans: Vec<_> = view.history.spans().collect();
            let belongs = |begin: Lsn, end: Option<Lsn>| {
                number >= size.number_at(begin) && end.is_none_or(|end| number <= size.number_before(end))
            };
            let candidates: Vec<_> = spans.iter().rev().filter(|(_, begin, end)| belongs(*begin, *end)).collect();
            let end = size.start_of(number + 1);
            let of = |timeline: Timeline, begin: Lsn| {
                view.index.segment(timeline, number).map(|place| place.through(end)).filter(|through| *through > begin)
            };
            let wanted = candidates.first().map_or(view.history.timeline, |(timeline, ..)| *timeline);
            let next = SegmentName::new(wanted, number, size);
            let later = |timeline: Timeline| view.index.segments(timeline).map(move |(number, _)| (timeline, number));
            let on_the_way = |(timeline, number): (Timeline, u64)| view.is_on_the_way(timeline, number);
            let mut all = spans.iter().flat_map(|(timeline, ..)| later(*timeline));
            let gap = all.any(|(timeline, later)| later > number && on_the_way((timeline, later)));
            let found = candidates.first().and_then(|(timeline, begin, _)| of(*timeline, *begin));
            match found {
                Some(through) if through == end || view.history.end_of(wanted) == Some(Some(end)) => {
                    (number, last) = (number + 1, Some(next));
                }
                Some(through) => return Coverage { through, last: Some(next), next, gap },
                None => {
                    let older = candidates.iter().skip(1).find_map(|(timeline, begin, end)| {
                        let through = of(*timeline, *begin)?;
                        Some((SegmentName::new(*timeline, number, size), end.map_or(through, |end| through.min(end))))
                    });
                    let nothing = (last, size.start_of(number));
                    let (last, through) = older.map_or(nothing, |(name, through)| (Some(name), through));
                    return Coverage { through, last, next, gap };
                }
            }
        }
    }

    #[test]
    fn what_is_covered_is_what_recovery_would_find_on_its_way() {
        for seed in 0..400 {
            let mut chance = Chance(seed);
            let (mut index, mut switches, mut at) = (WalIndex::default(), Vec::new(), 2 * SEGMENT);
            let timelines = 1 + chance.below(5) as u32;
            for number in 1..=timelines {
                let end = at + chance.below(4) * SEGMENT + [0, 100, SEGMENT / 2][chance.below(3) as usize];
                for segment in at / SEGMENT..end / SEGMENT + chance.below(3) {
                    if chance.below(6) > 0 {
                        let source = WalSource::Object { stored: 1 };
                        let name = SegmentName::new(Timeline(number), segment, size());
                        index.add_segment(name, size(), WalPlace { generation: Generation(number), source });
                    }
                }
                let part = end / SEGMENT * SEGMENT;
                if chance.below(2) == 0 {
                    index.add_run(run(number, number, part, part + chance.below(SEGMENT)), size());
                }
                if number < timelines {
                    switches.push(Switch { timeline: Timeline(number), at: Lsn(end) });
                    index.add_history(History { timeline: Timeline(number + 1), switches: switches.clone() });
                }
                at = end;
            }
            let lineage = lineage(&(1..=timelines).collect::<Vec<_>>());
            let view = View::new(&lineage, &index, Timeline(timelines)).expect("known");
            for segment in 1..30 {
                let from = Lsn(segment * SEGMENT + 40);
                assert_eq!(view.coverage(from), walked(&view, from), "seed {seed}, from {from}");
            }
        }
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
