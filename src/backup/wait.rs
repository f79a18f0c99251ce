//! Waiting until the WAL of a backup is in the bucket, and looking at it there.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};

use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::{Generation, Lsn, SystemId, Timeline};
use crate::repository::{Repository, WalHead};
use crate::wal::{SegmentName, SegmentSize, WalFileName};

/// The WAL without which a backup is no backup.
#[derive(Debug, Clone, Copy)]
pub struct Needed {
    pub generation: Generation,
    pub timeline: Timeline,
    pub start: Lsn,
    pub stop: Lsn,
    pub size: SegmentSize,
    pub system_id: SystemId,
}

impl Needed {
    /// Its segments.
    pub fn numbers(&self) -> RangeInclusive<u64> {
        self.size.number_at(self.start)..=self.size.number_before(self.stop)
    }
}

/// Between two looks; each wait is half as long again as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// A person is told again after this long.
pub const REMIND: Duration = Duration::from_secs(10);
/// Heads read at once.
const PARALLEL: usize = 16;

pub async fn for_wal(repository: &Repository, needed: &Needed, timeout: Duration, events: &Events) -> Result<()> {
    let clock = repository.clock();
    let mut missing: BTreeSet<u64> = needed.numbers().collect();
    let (began, mut wait, mut told) = (clock.monotonic(), FIRST_WAIT, clock.monotonic());
    loop {
        check(repository, needed, &mut missing).await?;
        let Some(first) = missing.first().copied() else { return Ok(()) };
        let waited = clock.monotonic() - began;
        if waited > timeout {
            return Err(timed_out(needed, first, (missing.len(), waited)).hint("see why archiving fails: SELECT * FROM pg_stat_archiver, and the server's log; the backup was not made visible"));
        }
        if clock.monotonic() - told > REMIND {
            told = clock.monotonic();
            events.emit(Event::BackupWaitsForWal { through: needed.stop, missing: missing.len() as u64 });
        }
        clock.sleep(wait).await;
        wait = (wait * 3 / 2).min(LONGEST_WAIT);
    }
}

/// Strikes off what has arrived: the object is there and its head says that it is this segment of this cluster.
async fn check(repository: &Repository, needed: &Needed, missing: &mut BTreeSet<u64>) -> Result<()> {
    // WAL arrives nearly in order: asking for the first missing ones finds most of it without a listing.
    loop {
        let asked: Vec<u64> = missing.iter().take(PARALLEL).copied().collect();
        let heads: Vec<(u64, bool)> = futures::stream::iter(asked.iter().copied())
            .map(|number| async move { Ok::<_, Error>((number, arrived(repository, needed, number).await?)) })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        heads.iter().filter(|(_, there)| *there).for_each(|(number, _)| {
            missing.remove(number);
        });
        if asked.is_empty() || heads.iter().any(|(_, there)| !there) {
            return Ok(());
        }
    }
}

async fn arrived(repository: &Repository, needed: &Needed, number: u64) -> Result<bool> {
    let name = SegmentName::new(needed.timeline, number, needed.size);
    Ok(head_of(repository, needed, needed.generation, name).await?.is_some())
}

/// The head of a segment, if it is there: it says that it is this segment of this cluster.
pub async fn head_of(
    repository: &Repository,
    needed: &Needed,
    generation: Generation,
    name: SegmentName,
) -> Result<Option<WalHead>> {
    let Some(head) = repository.wal_head(generation, WalFileName::Segment(name)).await? else { return Ok(None) };
    if head.system_id != needed.system_id || head.size != needed.size.bytes() {
        return Err(Error::damaged(format!(
            "{name} in the repository belongs to system {} and holds {} bytes; this is system {} with segments of {}",
            head.system_id,
            head.size,
            needed.system_id,
            needed.size.bytes()
        )));
    }
    Ok(Some(head))
}

pub fn timed_out(needed: &Needed, first: u64, (missing, waited): (usize, Duration)) -> Error {
    let name = SegmentName::new(needed.timeline, first, needed.size);
    let waited = waited.as_secs();
    let why = format!(
        "after {waited} s, {missing} of the backup's WAL segments are not in the repository, the first is {name}"
    );
    Error::new(Kind::Unreachable, why)
}
