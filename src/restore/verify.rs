//! What a restore would find, looked for ahead of time. Whatever no backup needs is of no interest here.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::delta::Have;
use super::fetch::{Contents, REQUESTS, check_range};
use super::plan::Reachable;
use super::ranges;
use super::sample::Sample;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events, Level};
use crate::model::{Lsn, PackId};
use crate::repository::manifest::{BackupHead, Backups};
use crate::repository::pack::FrameRef;
use crate::repository::{Region, Repository, WalPlace, WalSource, layout, tips};
use crate::wal::{SegmentName, WalFileName, scan_part, scan_segment};

/// Segments looked at once: heads, or whole ones of which each takes its size in memory (a sample is for beside a server).
const HEADS: usize = 16;
const SEGMENTS: usize = 3;
const SEGMENTS_OF_SAMPLE: usize = 1;

/// Looks that are made ready at once: each takes about a kilobyte.
const PREPARED: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Everything that a restore needs is there and has the right size; manifests are read.
    Quick,
    /// The same, and a part of it is read.
    Sample(Sample),
    /// All of it is read: every frame's hash, every record of WAL.
    Full,
}

impl Depth {
    /// Whether an object is read to the end.
    fn reads(self, key: &str) -> bool {
        match self {
            Depth::Quick => false,
            Depth::Sample(sample) => sample.takes(key),
            Depth::Full => true,
        }
    }
}

/// Something a restore would trip over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong, with what.
    pub problem: String,
    /// What cannot be restored because of it.
    pub consequence: String,
    /// What helps.
    pub cure: String,
    /// Something is not what was written, or has gone; otherwise WAL has a gap, as one that was given up leaves.
    pub damaged: bool,
}

/// What was looked at, and what was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub backups: usize,
    pub packs: usize,
    pub segments: usize,
    /// Bytes read to check their content.
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

/// Looks at everything any restore could need.
pub async fn verify(repository: &Repository, depth: Depth, events: &Events) -> Result<Report> {
    let mut report = Report::default();
    let Backups { sound, damaged } = repository.backups().await?;
    report.backups = sound.len() + damaged.len();
    for error in damaged {
        report.find(&error, "nothing can be restored from this backup".to_owned());
    }
    let mut packs = Packs { sizes: pack_sizes(repository).await?, ..Packs::default() };
    for backup in &sound {
        let before = report.findings.len();
        look_at_backup(repository, backup, &mut packs, depth, &mut report).await?;
        tell(events, format!("backup {}: {} findings", backup.backup_id, report.findings.len() - before));
    }
    look_at_besides(repository, &mut packs, depth, &mut report).await?;
    let mut without_wal: Vec<&BackupHead> = sound.iter().collect();
    let claims = repository.claims(repository.generations().await?).await?;
    let mut seen = BTreeSet::new();
    for tip in tips(&claims) {
        let reachable = match Reachable::find(repository, Some(tip), None).await {
            Ok(Some(reachable)) => reachable,
            Ok(None) => continue,
            Err(error) => {
                report.find_or(error, format!("nothing of generation {tip} and its history can be restored"))?;
                continue;
            }
        };
        look_at_wal(repository, &reachable, depth, &mut seen, &mut report).await?;
        let view = reachable.view()?;
        without_wal.retain(|backup| view.coverage_of(backup).is_none());
        tell(events, format!("history of generation {tip}: {} segments looked at", seen.len()));
    }
    look_at_consistency(repository, &without_wal, &mut report).await?;
    report.segments = seen.len();
    report.packs = packs.sizes.len();
    Ok(report)
}

fn tell(events: &Events, text: String) {
    events.emit(Event::Note { level: Level::Detail, text });
}

impl Report {
    fn find(&mut self, error: &Error, consequence: String) {
        let cure = error.hint_text().unwrap_or("a new base backup (perennial backup -D DIR) starts a sound history");
        let damaged = error.kind() == Kind::Damaged;
        let finding = Finding { problem: error.to_string(), consequence, cure: cure.to_owned(), damaged };
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// Damage is a finding; that something could not be looked at is an error.
    fn find_or(&mut self, error: Error, consequence: String) -> Result<()> {
        match error.kind() {
            Kind::Damaged | Kind::NotFound => {
                self.find(&error, consequence);
                Ok(())
            }
            _ => Err(error),
        }
    }
}

async fn pack_sizes(repository: &Repository) -> Result<BTreeMap<String, u64>> {
    let listing = repository.store().list(layout::PACKS, None);
    listing.map_ok(|entry| (entry.key, entry.size)).try_collect().await
}

async fn look_at_backup(
    repository: &Repository,
    backup: &BackupHead,
    packs: &mut Packs,
    depth: Depth,
    report: &mut Report,
) -> Result<()> {
    let consequence =
        || format!("backup {} (taken {}) cannot be restored", backup.backup_id, backup.stopped_at.short());
    match Contents::read(repository, backup.backup_id).await {
        Ok(contents) => look_at_contents(repository, &contents, packs, depth, &consequence, report).await,
        Err(error) => report.find_or(error, consequence()),
    }
}

/// Directories beside the database.
async fn look_at_besides(repository: &Repository, packs: &mut Packs, depth: Depth, report: &mut Report) -> Result<()> {
    let (sound, damaged) = repository.besides(None).await?;
    for error in damaged {
        report.find(&error, "a snapshot of a directory beside the database cannot be put back".to_owned());
    }
    for head in sound {
        let consequence =
            || format!("'{}' as of {} ({}) cannot be put back", head.name, head.lsn, head.taken_at.short());
        match Contents::read_beside(repository, &head).await {
            Ok(contents) => look_at_contents(repository, &contents, packs, depth, &consequence, report).await?,
            Err(error) => report.find_or(error, consequence())?,
        }
    }
    Ok(())
}

async fn look_at_contents(
    repository: &Repository,
    contents: &Contents,
    packs: &mut Packs,
    depth: Depth,
    consequence: &(dyn Fn() -> String + Sync),
    report: &mut Report,
) -> Result<()> {
    let broken = look_at_sizes(repository, contents, packs, consequence, report);
    let is_new = |frame: FrameRef| {
        let pack = contents.packs[frame.pack as usize];
        !broken.contains(&pack) && !packs.frames.contains(&(pack, frame.offset))
    };
    let wanted = match depth {
        Depth::Quick => return Ok(()),
        Depth::Full => {
            let is_broken =
                |region: &Region| region.frames().any(|frame| broken.contains(&contents.packs[frame.pack as usize]));
            let mut wanted = ranges::plan(contents, &packs.known(contents, is_broken));
            wanted.extend(ranges::plan_frames(contents, |region, frame| is_broken(region) && is_new(frame)));
            wanted
        }
        Depth::Sample(sample) => ranges::plan_frames(contents, |_, frame| {
            sample.takes(&layout::pack(contents.packs[frame.pack as usize])) && is_new(frame)
        }),
    };
    let checks = wanted.into_iter().map(|range| async move {
        let frames: Vec<FrameRef> = range.frames().collect();
        // A sample puts no region with patches together.
        let regions: Vec<Region> = range.regions().filter(|_| depth == Depth::Full).collect();
        ((frames, regions), check_range(repository, range).await)
    });
    let checks: Vec<_> = checks.collect();
    let mut checks = futures::stream::iter(checks).buffer_unordered(REQUESTS);
    let (mut all_sound, mut frames, mut regions) = (true, HashSet::new(), Vec::new());
    while let Some(((read, together), checked)) = checks.next().await {
        for frame in read {
            let place = (contents.packs[frame.pack as usize], frame.offset);
            report.bytes += if frames.insert(place) { u64::from(frame.stored) } else { 0 };
        }
        regions.extend(together.iter().map(|region| key_of(contents, region)));
        if let Err(error) = checked {
            all_sound = false;
            report.find_or(error, consequence())?;
        }
    }
    // Each backup that needs something damaged says so: it is read again for the next.
    if all_sound {
        packs.frames.extend(frames);
        packs.regions.extend(regions);
    }
    Ok(())
}

/// Whether the packs are there and go far enough; those that do not.
fn look_at_sizes(
    repository: &Repository,
    contents: &Contents,
    packs: &Packs,
    consequence: &(dyn Fn() -> String + Sync),
    report: &mut Report,
) -> BTreeSet<PackId> {
    let mut needed: BTreeMap<PackId, u64> = BTreeMap::new();
    for frame in contents.files.iter().flat_map(|file| &file.regions).flat_map(Region::frames) {
        let end = needed.entry(contents.packs[frame.pack as usize]).or_default();
        *end = frame.end().max(*end);
    }
    let mut broken = BTreeSet::new();
    for (pack, end) in needed {
        let key = layout::pack(pack);
        let error = match packs.sizes.get(&key) {
            Some(size) if *size >= end => continue,
            Some(size) => repository.corrupt(&key, format!("it is {size} bytes long, {end} are needed")),
            None => repository.missing(&key),
        };
        broken.insert(pack);
        report.find(&error, consequence());
    }
    broken
}

/// What is known of packs: their sizes, and the frames that were read and found right, of which many backups have the same.
#[derive(Default)]
struct Packs {
    sizes: BTreeMap<String, u64>,
    frames: HashSet<(PackId, u64)>,
    /// Regions that were put together.
    regions: HashSet<RegionKey>,
}

/// The pack and offset of a region's frame, those of its last patch and where in that frame it begins, and its CRC.
type RegionKey = (PackId, u64, Option<(PackId, u64, u32)>, u32);

fn key_of(contents: &Contents, region: &Region) -> RegionKey {
    let pack = |frame: FrameRef| contents.packs[frame.pack as usize];
    let last = region.patches.last().map(|patch| (pack(patch.frame), patch.frame.offset, patch.at));
    (pack(region.frame), region.frame.offset, last, region.crc)
}

impl Packs {
    /// The regions that need not be read, or cannot be.
    fn known(&self, contents: &Contents, is_broken: impl Fn(&Region) -> bool) -> Have {
        let is_known = |region: &Region| self.regions.contains(&key_of(contents, region)) || is_broken(region);
        Have::of(contents.files.iter().map(|file| file.regions.iter().map(is_known).collect()).collect())
    }
}

/// Whether backups that lie on no history that leads on have the WAL without which they are none. Each waited for that under
/// its own generation.
async fn look_at_consistency(repository: &Repository, backups: &[&BackupHead], report: &mut Report) -> Result<()> {
    let histories: BTreeSet<_> = backups.iter().map(|backup| (backup.generation, backup.timeline)).collect();
    for (generation, timeline) in histories {
        let consequence = |backup: &BackupHead| format!("backup {} cannot be restored", backup.backup_id);
        let all = backups.iter().copied();
        let of = all.filter(|backup| (backup.generation, backup.timeline) == (generation, timeline));
        match Reachable::find(repository, Some(generation), Some(timeline)).await {
            Ok(Some(reachable)) => {
                let view = reachable.view()?;
                for backup in of.filter(|backup| view.coverage_of(backup).is_none()) {
                    let there = view.coverage(backup.start_lsn);
                    let gone = format!(
                        "WAL from {} to {} is not all there: {} is missing",
                        backup.start_lsn, backup.stop_lsn, there.next
                    );
                    report.find(&Error::damaged(gone), consequence(backup));
                }
            }
            Ok(None) => {
                of.for_each(|backup| report.find(&Error::damaged("there is no WAL at all"), consequence(backup)))
            }
            Err(error) => {
                let ids: Vec<String> = of.map(|backup| backup.backup_id.to_string()).collect();
                report.find_or(error, format!("backups {} cannot be restored", ids.join(", ")))?;
            }
        }
    }
    Ok(())
}

async fn look_at_wal(
    repository: &Repository,
    reachable: &Reachable,
    depth: Depth,
    seen: &mut BTreeSet<(SegmentName, WalPlaceKey)>,
    report: &mut Report,
) -> Result<()> {
    let view = reachable.view()?;
    let size = view.segment_size();
    for window in reachable.windows(repository.points_from().await?)? {
        if let Some(missing) = window.missing {
            report.findings.push(Finding {
                problem: format!("{missing} is missing, and WAL goes on after it"),
                consequence: format!(
                    "no point behind {} can be reached from backup {} or an earlier one (generation {})",
                    window.through, window.newest_backup, window.generation
                ),
                cure: "bring the object back from a copy or an older version of the bucket; a base backup after the gap reaches what follows it".to_owned(),
                damaged: false,
            });
        }
    }
    // From where the oldest backup needs it, to the end.
    let usable = view.usable(&reachable.backups);
    let Some(from) = usable.iter().map(|(backup, _)| size.number_at(backup.start_lsn)).min() else { return Ok(()) };
    let mut wanted: Vec<(SegmentName, WalPlace)> = Vec::new();
    for (timeline, ..) in view.history.spans() {
        for (number, _) in reachable.index.segments(timeline) {
            let place = view.locate(timeline, number).filter(|_| number >= from);
            let Some(place) = place else { continue };
            let name = SegmentName::new(timeline, number, size);
            if seen.insert((name, WalPlaceKey::of(place))) {
                wanted.push((name, place));
            }
        }
    }
    // The end of a log counts as the segment that it will be.
    let reads = |(name, place): &(SegmentName, WalPlace)| {
        depth.reads(&layout::wal_file(place.generation, WalFileName::Segment(*name)))
    };
    let (whole, heads): (Vec<_>, Vec<_>) = wanted.into_iter().partition(reads);
    let whole_at_once = if depth == Depth::Full { SEGMENTS } else { SEGMENTS_OF_SAMPLE };
    for (segments, read, at_once) in [(heads, false, HEADS), (whole, true, whole_at_once)] {
        for some in segments.chunks(PREPARED) {
            let look =
                |(name, place): &(SegmentName, WalPlace)| look_at_segment(repository, reachable, *name, *place, read);
            let looks: Vec<_> = some.iter().map(look).collect();
            let mut looks = futures::stream::iter(looks).buffer_unordered(at_once);
            while let Some((name, looked)) = looks.next().await {
                match looked {
                    Ok(bytes) => report.bytes += bytes,
                    Err(error) => {
                        let start = name.start(size).unwrap_or(Lsn(0));
                        let consequence = format!("no point behind {start} can be reached from an earlier backup");
                        report.find_or(error, consequence)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Where a segment is, as far as it tells two copies apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct WalPlaceKey(u32, Option<u64>);

impl WalPlaceKey {
    fn of(place: WalPlace) -> WalPlaceKey {
        let through = match place.source {
            WalSource::Object { .. } => None,
            WalSource::Log { through } => Some(through.0),
        };
        WalPlaceKey(place.generation.0, through)
    }
}

/// One segment, all of it or its head; the bytes that were read to check them.
async fn look_at_segment(
    repository: &Repository,
    reachable: &Reachable,
    name: SegmentName,
    place: WalPlace,
    read: bool,
) -> (SegmentName, Result<u64>) {
    let looked = async {
        match (read, place.source) {
            (false, WalSource::Object { .. }) => {
                repository.wal_is_whole(place.generation, WalFileName::Segment(name)).await.map(|()| 0)
            }
            // The log was looked at when it was listed; its entries are small.
            (false, WalSource::Log { .. }) => Ok(0),
            (true, source) => {
                let size = reachable.lineage.tip().segment_size;
                let content = match repository.segment_content(&reachable.index, place, name, size).await {
                    // The entries were collected while we looked: the segment is whole by now.
                    Err(error) if error.kind() == Kind::Damaged && error.is_retryable() => {
                        let whole = repository.wal_is_whole(place.generation, WalFileName::Segment(name)).await;
                        return whole.map(|()| 0);
                    }
                    content => content?,
                };
                let bytes = content.len() as u64;
                let scanned = tokio::task::spawn_blocking(move || match source {
                    WalSource::Object { .. } => scan_segment(name, &content).map(drop),
                    WalSource::Log { .. } => scan_part(name, &content).map(drop),
                });
                scanned.await.map_err(|e| Error::internal("a checking thread ended").source(e))??;
                Ok(bytes)
            }
        }
    };
    (name, looked.await)
}
