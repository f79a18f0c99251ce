//! Which WAL the repository holds for a lineage: a listing turned into sets, nothing read but names.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use super::log::{LogRun, LogView};
use super::{Lineage, Repository, layout};
use crate::error::Result;
use crate::model::{Generation, Lsn, Timeline};
use crate::storage::Entry;
use crate::wal::{History, SegmentName, SegmentSize, WalFileName};

/// Generations listed at once.
const PARALLEL: usize = 8;

/// Where the WAL of a segment is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPlace {
    pub generation: Generation,
    pub source: WalSource,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalSource {
    /// An object of its own, of this size.
    Object { stored: u64 },
    /// Entries of the generation's log, which go so far: the last segment of a life, or one that was not stored yet.
    Log { through: Lsn },
}

impl WalPlace {
    /// How far the WAL of a segment that ends at `segment_end` is there.
    pub fn through(&self, segment_end: Lsn) -> Lsn {
        match self.source {
            WalSource::Object { .. } => segment_end,
            WalSource::Log { through } => through.min(segment_end),
        }
    }
}

/// The WAL of a lineage. A file that several generations hold is taken from the newest of them.
#[derive(Debug, Clone, Default)]
pub struct WalIndex {
    segments: BTreeMap<Timeline, BTreeMap<u64, WalPlace>>,
    histories: BTreeMap<Timeline, History>,
    runs: Vec<LogRun>,
}

impl WalIndex {
    pub fn segment(&self, timeline: Timeline, number: u64) -> Option<WalPlace> {
        self.segments.get(&timeline)?.get(&number).copied()
    }

    /// The segments of a timeline, in order.
    pub fn segments(&self, timeline: Timeline) -> impl DoubleEndedIterator<Item = (u64, WalPlace)> + '_ {
        self.segments.get(&timeline).into_iter().flatten().map(|(number, place)| (*number, *place))
    }

    /// The first segment of a timeline between two numbers, both included.
    pub fn first_within(&self, timeline: Timeline, first: u64, last: u64) -> Option<u64> {
        let segments = self.segments.get(&timeline).filter(|_| first <= last)?;
        segments.range(first..=last).next().map(|(number, _)| *number)
    }

    /// The history of a timeline. Timeline 1 has no file; any other without one cannot be followed.
    pub fn history(&self, timeline: Timeline) -> Option<History> {
        let root = || (timeline == Timeline(1)).then(|| History::root(timeline));
        self.histories.get(&timeline).cloned().or_else(root)
    }

    /// Whether there is WAL or a history file of the timeline.
    pub fn knows(&self, timeline: Timeline) -> bool {
        self.segments.contains_key(&timeline) || self.histories.contains_key(&timeline)
    }

    /// The timelines that have WAL or a history file.
    pub fn timelines(&self) -> impl Iterator<Item = Timeline> {
        let mut all: Vec<Timeline> = self.segments.keys().chain(self.histories.keys()).copied().collect();
        all.sort();
        all.dedup();
        all.into_iter()
    }

    /// Whether there is a history file of the timeline.
    pub fn has_history(&self, timeline: Timeline) -> bool {
        self.histories.contains_key(&timeline)
    }

    /// Timelines only grow along a lineage, so the highest one is where its newest writer was.
    pub fn newest_timeline(&self) -> Option<Timeline> {
        self.timelines().max()
    }

    /// Notes a segment unless a newer generation already has it.
    pub fn add_segment(&mut self, name: SegmentName, size: SegmentSize, place: WalPlace) {
        if let Some(number) = name.number(size) {
            let held = self.segments.entry(name.timeline).or_default().entry(number).or_insert(place);
            if Self::is_better(place, *held) {
                *held = place;
            }
        }
    }

    /// Notes the segments that a log has, the last one in part; of one that was noted before, how far it goes by now.
    pub fn add_run(&mut self, run: LogRun, size: SegmentSize) {
        for number in size.number_at(run.start)..=size.number_before(run.end) {
            // A log starts at the start of a segment, and is collected by whole ones.
            if run.start <= size.start_of(number) {
                let source = WalSource::Log { through: run.end.min(size.start_of(number + 1)) };
                let place = WalPlace { generation: run.generation, source };
                self.add_segment(SegmentName::new(run.timeline, number, size), size, place);
            }
        }
        self.runs.retain(|known| known.generation != run.generation);
        self.runs.push(run);
    }

    /// The log of a generation, as far as it has WAL.
    pub fn run(&self, generation: Generation) -> Option<LogRun> {
        self.runs.iter().find(|run| run.generation == generation).copied()
    }

    /// An object before a log, of two objects the newer, of two logs the one that goes further: a life that went on with
    /// the same disk writes the same bytes again, and may have died before it got as far.
    fn is_better(place: WalPlace, held: WalPlace) -> bool {
        let rank = |place: WalPlace| match place.source {
            WalSource::Object { .. } => (1, Lsn(0), place.generation),
            WalSource::Log { through } => (0, through, place.generation),
        };
        rank(place) > rank(held)
    }

    pub fn add_history(&mut self, history: History) {
        self.histories.entry(history.timeline).or_insert(history);
    }
}

/// What a generation has of WAL: objects, and the entries of its log.
#[derive(Debug, Clone)]
pub struct WalListing {
    pub generation: Generation,
    pub entries: Vec<Entry>,
    pub log: LogView,
    pub run: Option<LogRun>,
}

impl Repository {
    /// Lists the WAL of every generation of the lineage. Histories are read, segments only listed.
    pub async fn wal_index(&self, lineage: &Lineage) -> Result<WalIndex> {
        let listed = self.list_wal(lineage.claims().iter().map(|claim| claim.generation)).await?;
        self.index_of(lineage, &listed).await
    }

    /// Lists the WAL of generations.
    pub async fn list_wal(&self, generations: impl Iterator<Item = Generation>) -> Result<Vec<WalListing>> {
        let looks: Vec<_> = generations.map(|generation| self.wal_of(generation)).collect();
        futures::stream::iter(looks).buffered(PARALLEL).try_collect().await
    }

    /// The WAL of a lineage, of what was listed for it and others.
    pub async fn index_of(&self, lineage: &Lineage, listed: &[WalListing]) -> Result<WalIndex> {
        let mut index = WalIndex::default();
        let mut histories: Vec<(Generation, Timeline)> = Vec::new();
        for claim in lineage.claims() {
            let Some(listing) = listed.iter().find(|listing| listing.generation == claim.generation) else { continue };
            for entry in &listing.entries {
                let Some((generation, name)) = layout::parse_wal_file(&entry.key) else { continue };
                match name {
                    WalFileName::Segment(name) => {
                        let source = WalSource::Object { stored: entry.size };
                        index.add_segment(name, claim.segment_size, WalPlace { generation, source });
                    }
                    WalFileName::History(timeline) => histories.push((generation, timeline)),
                    WalFileName::Partial(_) | WalFileName::Backup(..) => (),
                }
            }
            if let Some(run) = listing.run {
                index.add_run(run, claim.segment_size);
            }
        }
        // Newest generation first, so that its history of a timeline is the one that counts.
        histories.sort_by(|a, b| b.cmp(a));
        for (generation, timeline) in histories {
            index.add_history(self.timeline_history(generation, timeline).await?);
        }
        Ok(index)
    }

    /// The log first: what is collected from it meanwhile is among the objects then.
    async fn wal_of(&self, generation: Generation) -> Result<WalListing> {
        let (log, run) = self.log_and_run(generation).await?;
        let entries = self.store.list(&layout::wal_dir(generation), None).try_collect().await?;
        Ok(WalListing { generation, entries, log, run })
    }

    /// A history file that is known to be there.
    pub async fn timeline_history(&self, generation: Generation, timeline: Timeline) -> Result<History> {
        let name = WalFileName::History(timeline);
        let key = layout::wal_file(generation, name);
        let content = self.read_small_wal(generation, name).await?.ok_or_else(|| self.missing(&key))?;
        History::parse(timeline, &String::from_utf8_lossy(&content)).map_err(|e| self.corrupt(&key, e))
    }
}
