//! Which WAL the repository holds for a lineage: a listing turned into sets, nothing read but names.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use super::{Lineage, Repository, layout};
use crate::error::Result;
use crate::model::{Generation, Timeline};
use crate::storage::Entry;
use crate::wal::{History, SegmentName, SegmentSize, WalFileName};

/// Generations listed at once.
const PARALLEL: usize = 8;

/// Where an archived file is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPlace {
    pub generation: Generation,
    /// Size of the object.
    pub stored: u64,
}

/// The WAL of a lineage. A file that several generations hold is taken from the newest of them.
#[derive(Debug, Clone, Default)]
pub struct WalIndex {
    segments: BTreeMap<Timeline, BTreeMap<u64, WalPlace>>,
    histories: BTreeMap<Timeline, History>,
}

impl WalIndex {
    pub fn segment(&self, timeline: Timeline, number: u64) -> Option<WalPlace> {
        self.segments.get(&timeline)?.get(&number).copied()
    }

    /// The segments of a timeline, in order.
    pub fn segments(&self, timeline: Timeline) -> impl DoubleEndedIterator<Item = (u64, WalPlace)> + '_ {
        self.segments.get(&timeline).into_iter().flatten().map(|(number, place)| (*number, *place))
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

    /// Timelines only grow along a lineage, so the highest one is where its newest writer was.
    pub fn newest_timeline(&self) -> Option<Timeline> {
        self.timelines().max()
    }

    /// Notes a segment unless a newer generation already has it.
    pub fn add_segment(&mut self, name: SegmentName, size: SegmentSize, place: WalPlace) {
        if let Some(number) = name.number(size) {
            let held = self.segments.entry(name.timeline).or_default().entry(number).or_insert(place);
            if held.generation < place.generation {
                *held = place;
            }
        }
    }

    pub fn add_history(&mut self, history: History) {
        self.histories.entry(history.timeline).or_insert(history);
    }
}

impl Repository {
    /// Lists the WAL of every generation of the lineage. Histories are read, segments only listed.
    pub async fn wal_index(&self, lineage: &Lineage) -> Result<WalIndex> {
        let mut index = WalIndex::default();
        let mut histories: Vec<(Generation, Timeline)> = Vec::new();
        let listings: Vec<_> = lineage.claims().iter().map(|claim| self.wal_entries(claim.generation)).collect();
        let listings: Vec<_> = futures::stream::iter(listings).buffered(PARALLEL).try_collect().await?;
        for (claim, entries) in lineage.claims().iter().zip(listings) {
            for entry in entries {
                let Some((generation, name)) = layout::parse_wal_file(&entry.key) else { continue };
                match name {
                    WalFileName::Segment(name) => {
                        index.add_segment(name, claim.segment_size, WalPlace { generation, stored: entry.size });
                    }
                    WalFileName::History(timeline) => histories.push((generation, timeline)),
                    WalFileName::Partial(_) | WalFileName::Backup(..) => (),
                }
            }
        }
        // Newest generation first, so that its history of a timeline is the one that counts.
        histories.sort_by(|a, b| b.cmp(a));
        for (generation, timeline) in histories {
            index.add_history(self.timeline_history(generation, timeline).await?);
        }
        Ok(index)
    }

    async fn wal_entries(&self, generation: Generation) -> Result<Vec<Entry>> {
        self.store.list(&layout::wal_dir(generation), None).try_collect().await
    }

    /// A history file that is known to be there.
    pub async fn timeline_history(&self, generation: Generation, timeline: Timeline) -> Result<History> {
        let name = WalFileName::History(timeline);
        let key = layout::wal_file(generation, name);
        let content = self.read_small_wal(generation, name).await?.ok_or_else(|| self.missing(&key))?;
        History::parse(timeline, &String::from_utf8_lossy(&content)).map_err(|e| self.corrupt(&key, e))
    }
}
