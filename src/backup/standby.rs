//! Backups of standbys. Their WAL is the primary's, so what is self-evident of a primary has to be shown: that the bucket's WAL is
//! what this server has replayed, that no prune takes it away meanwhile, and that no commit in it is later than the backup says.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};

use super::wait::{self, Needed};
use crate::error::{Error, IoContext, Kind, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, Generation, Timestamp};
use crate::postgres::data_dir::OWN_DIR;
use crate::postgres::{Client, ControlFile, Version};
use crate::repository::codec::{Hasher, Sha256};
use crate::repository::reach::View;
use crate::repository::{Lineage, Repository, WalIndex, WalListing, WalSource, layout, origin};
use crate::wal::{SegmentName, WalFileName};

/// Between two looks, each of which lists the WAL of the history; each wait is half as long again as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A server puts a segment that it has been given once more in the place of the one it had, while we look.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Heads read at once.
const PARALLEL: usize = 16;

/// Bytes of a segment read at once.
const PIECE: usize = 1 << 20;

/// A standby whose primary archives under a generation.
#[derive(Debug)]
pub struct Standby<'a> {
    repository: &'a Repository,
    data_dir: &'a Path,
    version: Version,
    lineage: Lineage,
    /// The newest generation it was given anything of, if it was given WAL by the bucket.
    origin: Option<Generation>,
}

/// What a standby has replayed of a segment, up to the end of its backup.
#[derive(Debug)]
struct Replayed {
    name: SegmentName,
    length: u64,
    sha256: Sha256,
}

/// One that has ended its backup.
#[derive(Debug)]
pub struct End<'a> {
    standby: Standby<'a>,
    needed: Needed,
    replayed: Vec<Replayed>,
    /// The last that was replayed before its end.
    last_commit: Option<Timestamp>,
}

/// A segment, and the generation that has it.
type Stored = (u64, Generation);

impl<'a> Standby<'a> {
    pub async fn of(
        repository: &'a Repository,
        data_dir: &'a Path,
        version: Version,
        generation: Generation,
    ) -> Result<Standby<'a>> {
        let lineage = repository.lineage(generation, None).await?;
        let origin = origin::read(&data_dir.join(OWN_DIR), repository.descriptor().repository_id)?;
        Ok(Standby { repository, data_dir, version, lineage, origin })
    }

    /// Refuses one that does not follow the history of its generation.
    pub async fn check(&self) -> Result<()> {
        let (control, index) = self.look().await?;
        self.view(&index, &control).map(drop)
    }

    async fn look(&self) -> Result<(ControlFile, WalIndex)> {
        let control = ControlFile::read(self.data_dir, self.version)?;
        let generation = self.lineage.tip().generation;
        let listed = self.repository.list_wal(self.lineage.claims().iter().map(|claim| claim.generation)).await?;
        // Before a writer has stored anything nobody knows on which timeline it goes on.
        let has_begun = |listing: &WalListing| {
            listing.generation == generation && (listing.run.is_some() || !listing.entries.is_empty())
        };
        if !listed.iter().any(has_begun) {
            return Err(Error::refused(format!(
                "generation {generation}, the newest of {}, has no WAL yet",
                self.repository.address()
            ))
            .hint("take the backup once its server has archived a segment: SELECT pg_switch_wal() there"));
        }
        Ok((control, self.repository.index_of(&self.lineage, &listed).await?))
    }

    /// The way to the newest state, on whose last timeline the standby must be.
    fn view<'v>(&'v self, index: &'v WalIndex, control: &ControlFile) -> Result<View<'v>> {
        let generation = self.lineage.tip().generation;
        let newest = index.newest_timeline().unwrap_or(control.timeline);
        let view = View::new(&self.lineage, index, newest)
            .ok_or_else(|| self.repository.missing(&layout::wal_file(generation, WalFileName::History(newest))))?;
        if let Some(why) = view.left_behind(self.origin, control.recovered()) {
            return Err(Error::refused(format!("the standby follows another history: {why}"))
                .hint("make it anew: perennial restore --standby"));
        }
        let on = control.newest_timeline();
        if (control.timeline, on) != (newest, newest) {
            return Err(Error::refused(format!(
                "the standby is on timeline {on}, since its last restart point on {}; the database is on {newest}",
                control.timeline
            ))
            .hint("take the backup once it has followed: a CHECKPOINT on the primary, then one on the standby"));
        }
        Ok(view)
    }

    /// A backup ends at the minimum recovery point: waits until all before that is replayed, and takes down what has been.
    pub async fn end(self, needed: Needed, client: &Client, timeout: Duration) -> Result<End<'a>> {
        let clock = self.repository.clock();
        let began = clock.monotonic();
        while client.replayed().await? < needed.stop {
            if clock.monotonic() - began > timeout {
                let why = format!("the standby does not get to {}, where its backup ends", needed.stop);
                return Err(Error::new(Kind::Unreachable, why).hint(
                    "see what holds replay up: pg_get_wal_replay_pause_state(), and queries that are in its way",
                ));
            }
            clock.sleep(BETWEEN_LOOKS).await;
        }
        let last_commit = client.last_replayed_commit().await?;
        let replayed = self.replayed(&needed).await?;
        Ok(End { standby: self, needed, replayed, last_commit })
    }

    /// It keeps all WAL since its last restart point. Of that the first segment is taken, that of the checkpoint, with its time
    /// and the next transaction, and the last two.
    async fn replayed(&self, needed: &Needed) -> Result<Vec<Replayed>> {
        let control = ControlFile::read(self.data_dir, self.version)?;
        let (first, last) = needed.numbers().into_inner();
        let (redo, checkpoint) = (needed.size.number_at(control.redo), needed.size.number_at(control.checkpoint));
        let wanted: BTreeSet<u64> = [redo, checkpoint, last.saturating_sub(1), last].into();
        let mut replayed = Vec::new();
        for number in wanted.range(first..=last) {
            let name = SegmentName::new(needed.timeline, *number, needed.size);
            let length = needed.size.bytes().min(needed.stop.bytes_since(needed.size.start_of(*number)));
            match self.hash_of(name, length, *number == last).await? {
                Some(sha256) => replayed.push(Replayed { name, length, sha256 }),
                // Removed by a restart point since.
                None if *number < last => (),
                None => {
                    let why = format!("the standby does not have {name} any more, in which its backup ends");
                    return Err(Error::refused(why).hint("take the backup again"));
                }
            }
        }
        Ok(replayed)
    }

    async fn hash_of(&self, name: SegmentName, length: u64, must_be_there: bool) -> Result<Option<Sha256>> {
        let path = self.data_dir.join("pg_wal").join(name.to_string());
        for look in 0..LOOKS {
            if let Some(hash) = hash_of_file(&path, length)? {
                return Ok(Some(hash));
            }
            if !must_be_there || look + 1 == LOOKS {
                break;
            }
            self.repository.clock().sleep(BETWEEN_LOOKS).await;
        }
        Ok(None)
    }
}

impl End<'_> {
    /// Waits until all WAL of the backup is in the bucket as whole segments, on the newest history, and the same as this server
    /// has replayed. Returns when the last commit in it was, by the primary's clock.
    pub async fn for_wal(&self, timeout: Duration, events: &Events) -> Result<Option<Timestamp>> {
        let clock = self.standby.repository.clock();
        let (began, mut pause, mut told) = (clock.monotonic(), FIRST_WAIT, None);
        loop {
            let (there, missing) = self.stored().await?;
            let Some(first) = missing.first() else {
                self.compare(&there).await?;
                return Ok(self.last_commit.max(self.last_stored_commit(&there).await?));
            };
            let waited = clock.monotonic() - began;
            if waited > timeout {
                return Err(wait::timed_out(&self.needed, *first, (missing.len(), waited)).hint(
                    "see whether the primary archives: perennial status, pg_stat_archiver; one that has nothing to do sends what it has after SELECT pg_switch_wal(). The backup was not made visible",
                ));
            }
            let through = self.needed.stop;
            if told.is_none() {
                events.info(format!("waiting for the primary's segments up to {through}; one that has nothing to do sends its last after SELECT pg_switch_wal() there"));
                told = Some(clock.monotonic());
            } else if told.is_some_and(|told| clock.monotonic() - told > wait::REMIND) {
                events.emit(Event::BackupWaitsForWal { through, missing: missing.len() as u64 });
                told = Some(clock.monotonic());
            }
            clock.sleep(pause).await;
            pause = (pause * 3 / 2).min(LONGEST_WAIT);
        }
    }

    /// Which segments of the backup are stored, by which generation, and which are not.
    async fn stored(&self) -> Result<(Vec<Stored>, Vec<u64>)> {
        let (control, index) = self.standby.look().await?;
        let view = self.standby.view(&index, &control)?;
        let (mut there, mut missing) = (Vec::new(), Vec::new());
        for number in self.needed.numbers() {
            match view.locate(self.needed.timeline, number) {
                Some(place) if matches!(place.source, WalSource::Object { .. }) => {
                    there.push((number, place.generation));
                }
                _ => missing.push(number),
            }
        }
        Ok((there, missing))
    }

    /// Two histories may have the same numbers: of generations, timelines and positions. They do not have the same bytes.
    async fn compare(&self, there: &[Stored]) -> Result<()> {
        let repository = self.standby.repository;
        for Replayed { name, length, sha256 } in &self.replayed {
            let number = name.number(self.needed.size);
            let lost = || Error::internal(format!("{name} is not among the backup's WAL"));
            let (_, generation) = there.iter().find(|(at, _)| Some(*at) == number).ok_or_else(lost)?;
            let mut hash = Hasher::default();
            let add = |offset: u64, piece: Vec<u8>| {
                let counts = length.saturating_sub(offset).min(piece.len() as u64) as usize;
                hash.update(&piece[..counts]);
                Ok(())
            };
            let file = WalFileName::Segment(*name);
            let key = layout::wal_file(*generation, file);
            repository.read_wal(*generation, file, add).await?.ok_or_else(|| repository.missing(&key))?;
            if hash.finish() != *sha256 {
                return Err(Error::refused(format!(
                    "{name} is not in {} as the standby has replayed it: it follows another history of the same cluster",
                    repository.address()
                ))
                .hint("name the repository to which its primary archives, or make the standby anew: perennial restore --standby"));
            }
        }
        Ok(())
    }

    /// By the heads of the segments. It may lie behind the end of the backup, in the same segment: that does no harm.
    async fn last_stored_commit(&self, there: &[Stored]) -> Result<Option<Timestamp>> {
        let (repository, needed) = (self.standby.repository, &self.needed);
        let heads = futures::stream::iter(there.iter().copied()).map(|(number, generation)| async move {
            let name = SegmentName::new(needed.timeline, number, needed.size);
            let head = wait::head_of(repository, needed, generation, name).await?;
            let key = layout::wal_file(generation, WalFileName::Segment(name));
            head.map(|head| head.last_commit).ok_or_else(|| repository.missing(&key))
        });
        heads.buffered(PARALLEL).try_fold(None, |last, commit| async move { Ok(commit.max(last)) }).await
    }
}

/// `None` when it is not there.
fn hash_of_file(path: &Path, length: u64) -> Result<Option<Sha256>> {
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.on("open", path)?,
    };
    let (mut hash, mut piece) = (Hasher::default(), vec![0; PIECE]);
    let mut at = 0;
    while at < length {
        let part = &mut piece[..PIECE.min((length - at) as usize)];
        file.read_exact_at(part, at).on("read", path)?;
        hash.update(part);
        at += part.len() as u64;
    }
    Ok(Some(hash.finish()))
}

/// Prunes that look from now on see that the backup is under way, and leave its WAL alone. Those that have looked before may
/// take WAL away: they have said up to where. (A prune puts its record first and looks then, a backup its announcement.)
pub async fn hold_wal(repository: &Repository, id: BackupId) -> Result<()> {
    let (start, kept_from) = (id.start, repository.latest_points_from().await?);
    if start >= kept_from {
        return Ok(());
    }
    Err(Error::refused(format!("the backup needs WAL from {start} on, and prunes keep all of it from {kept_from} on only"))
        .hint("take it again once the standby has made a restart point behind that: CHECKPOINT on the primary, then on the standby"))
}

/// Another machine has taken over meanwhile, or the primary was started anew. This one is no writer that was fenced.
pub fn superseded(error: Error) -> Error {
    match error.kind() {
        Kind::Fenced => Error::refused(format!(
            "another machine has taken over during the backup, or the primary was started anew: {error}"
        ))
        .hint("take the backup again once the standby has followed"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::Clock;
    use crate::model::{Lsn, SystemId, Timeline, WriteId};
    use crate::repository::{Codec, Frame, NewWriter, Plain, WalObject};
    use crate::storage::Adapter;
    use crate::wal::SegmentFacts;

    #[tokio::test]
    async fn a_backup_ends_no_earlier_than_the_last_commit_in_its_wal_whatever_the_clocks_say() {
        let store = Arc::new(Adapter::memory());
        let (repository, _) = Repository::init(store, Codec::default(), &Clock::system()).await.expect("made");
        let (size, system_id, generation) = ((1 << 24).try_into().expect("16 MB"), SystemId(1), Generation(1));
        let (writer_id, host) = (WriteId([0; 16]), String::new());
        let new = NewWriter { writer_id, system_id, pg_major: 15, segment_size: size, host };
        repository.try_claim(None, None, &new).await.expect("asked").expect("claimed");
        let at = Timestamp::from_unix_micros;
        for (number, last_commit) in [(2, Some(at(9))), (3, Some(at(7))), (4, None)] {
            let name = WalFileName::Segment(SegmentName::new(Timeline(1), number, size));
            let plain = Plain {
                size: 1 << 24,
                crc32c: 0,
                facts: Some(SegmentFacts { last_commit, ..SegmentFacts::default() }),
            };
            let frame = Frame { stored: vec![0; 9].into(), plain: 1 << 24 };
            let identity = (WriteId([number as u8; 16]), at(0));
            let object = WalObject::assemble(name, system_id, plain, vec![frame], identity).expect("assembled");
            repository.put_wal(generation, &object, &[]).await.expect("put");
        }
        let version = Version::of(15).expect("known");
        let standby = Standby::of(&repository, Path::new("/nowhere"), version, generation).await.expect("opened");
        let (start, stop) = (Lsn((2 << 24) + 40), Lsn((4 << 24) + 40));
        let needed = Needed { generation, timeline: Timeline(1), start, stop, size, system_id };
        let end = End { standby, needed, replayed: Vec::new(), last_commit: None };
        let there = [(2, generation), (3, generation), (4, generation)];
        assert_eq!(end.last_stored_commit(&there).await.expect("read"), Some(at(9)));
        assert_eq!(end.last_stored_commit(&there[2..]).await.expect("read"), None);
    }
}
