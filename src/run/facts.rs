//! Gathering what the boot decision needs. Every look-up answers for certain or fails.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Options;
use super::boot::{Bucket, Directory, Facts, Holder};
use crate::clock::Clock;
use crate::error::Result;
use crate::model::Generation;
use crate::postgres::data_dir::{OWN_DIR, PARTIAL, RECOVERY_SIGNAL, RESTORE_MARKER};
use crate::postgres::{ControlFile, PostmasterFile, is_vacant, version_of};
use crate::repository::log::LogView;
use crate::repository::{Claim, Found, Repository, WalPlace, WalSource, Writer, layout, origin};
use crate::restore::{Reachable, standby};
use crate::storage::Store;
use crate::wal::{SegmentName, WalFileName};

/// What this machine has seen of the newest generation's log while it waited, by its own clock only.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watched {
    seen: Option<(Generation, u64)>,
    since: Duration,
}

impl Watched {
    /// Whether the log has been as it is for `patience`.
    pub fn is_silent(&mut self, view: &LogView, now: Duration, patience: Duration) -> bool {
        let seen = Some((view.generation, view.next));
        if self.seen != seen {
            *self = Watched { seen, since: now };
        }
        now.saturating_sub(self.since) >= patience
    }
}

pub(super) async fn gather(
    store: Arc<dyn Store>,
    options: &Options,
    clock: &Clock,
    watched: &mut Watched,
) -> Result<(Option<Repository>, Facts)> {
    let address = store.url("").trim_end_matches('/').to_owned();
    let repository = match Repository::find(store, clock).await? {
        Found::Repository(repository) => Some(repository),
        Found::Empty => None,
    };
    let (bucket, reachable) = match &repository {
        Some(repository) => look_into(repository, options, watched).await?,
        None => (Bucket::Empty, None),
    };
    let newest = match &bucket {
        Bucket::Used { newest, .. } => Some(newest),
        _ => None,
    };
    let directory = look_at(&options.data_dir, repository.as_ref(), newest, reachable.as_ref()).await?;
    let facts = Facts {
        data_dir: options.data_dir.display().to_string(),
        address,
        directory,
        bucket,
        init: options.init,
        adopt: options.adopt,
        discard: options.discard_diverged,
    };
    Ok((repository, facts))
}

/// What is there, and what of the newest history can be reached.
async fn look_into(
    repository: &Repository,
    options: &Options,
    watched: &mut Watched,
) -> Result<(Bucket, Option<Reachable>)> {
    let repository_id = repository.descriptor().repository_id;
    let Some(newest) = repository.newest_generation().await? else {
        return Ok((Bucket::Unused { repository_id }, None));
    };
    let newest = repository.claim(newest).await?;
    let view = repository.log(newest.generation).await?;
    let now = repository.clock().monotonic();
    let gone = view.seal.is_some() || view.end().is_none() || watched.is_silent(&view, now, options.takeover_after);
    let holder = if gone { Holder::Gone } else { Holder::MayLive };
    let reachable = Reachable::find(repository, Some(newest.generation), None).await?;
    let restorable = match &reachable {
        Some(reachable) => !reachable.view()?.usable(&reachable.backups).is_empty(),
        None => false,
    };
    Ok((Bucket::Used { repository_id, newest, restorable, holder }, reachable))
}

async fn look_at(
    data_dir: &Path,
    repository: Option<&Repository>,
    newest: Option<&Claim>,
    reachable: Option<&Reachable>,
) -> Result<Directory> {
    if is_vacant(data_dir)? {
        return Ok(Directory::Vacant);
    }
    if data_dir.join(RESTORE_MARKER).is_file() {
        return Ok(Directory::Unfinished);
    }
    if data_dir.join(PARTIAL).is_file() {
        return Ok(Directory::Partial);
    }
    if !data_dir.join("PG_VERSION").is_file() {
        return Ok(Directory::Foreign);
    }
    if let Some(running) = PostmasterFile::read(data_dir)?.filter(|file| file.is_alive(data_dir)) {
        return Ok(Directory::Running { pid: running.pid });
    }
    let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
    let own_dir = data_dir.join(OWN_DIR);
    finish_claim(&own_dir, repository, newest)?;
    let Some(writer) = Writer::load(&own_dir)? else {
        let system_id = control.system_id;
        let Some(repository) = repository else { return Ok(Directory::Unclaimed { system_id, origin: None }) };
        let origin = origin::read(&own_dir, repository.descriptor().repository_id)?;
        return Ok(match (origin, reachable) {
            (Some(origin), Some(reachable)) if standby::has_followed(data_dir, &control)? => {
                let place = standby::Place::read(data_dir, &reachable.backups)?;
                Directory::Standby { system_id, origin, misfit: place.misfit(&reachable.view()?, Some(origin)) }
            }
            _ if standby::is_standby(data_dir)? => Directory::Follower,
            _ => Directory::Unclaimed { system_id, origin },
        });
    };
    let same = repository.filter(|repository| repository.descriptor().repository_id == writer.descriptor.repository_id);
    let (mut behind_why, mut unwritten_since) = (None, false);
    if let Some(repository) = same {
        behind_why = behind(repository, data_dir, &control, &writer).await?;
        unwritten_since = nothing_written_since(repository, writer.claim.generation, newest).await?;
    }
    Ok(Directory::Ours {
        repository_id: writer.descriptor.repository_id,
        generation: writer.claim.generation,
        writer_id: writer.claim.writer_id,
        unwritten_since,
        behind: behind_why,
    })
}

/// A claim whose success the last start did not live to see is ours all the same.
pub(super) fn finish_claim(own_dir: &Path, repository: Option<&Repository>, newest: Option<&Claim>) -> Result<()> {
    let (Some(repository), Some(newest), Some(claiming)) = (repository, newest, Writer::claiming(own_dir)?) else {
        return Ok(());
    };
    if newest.writer_id == claiming { Writer::new(repository, newest.clone()).save(own_dir) } else { Ok(()) }
}

/// Whether every generation after `generation` has claimed and done nothing else.
async fn nothing_written_since(
    repository: &Repository,
    generation: Generation,
    newest: Option<&Claim>,
) -> Result<bool> {
    let newest = newest.map_or(generation, |newest| newest.generation);
    for later in (generation.0 + 1..=newest.0).map(Generation) {
        let claim = repository.claim(later).await?;
        let child = claim.parent.is_some_and(|parent| parent >= generation);
        let archived = repository.store().list_level(&layout::wal_dir(later)).await?;
        let wrote = !(archived.directories.is_empty() && archived.entries.is_empty());
        if !child || wrote || repository.log(later).await?.end().is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the archive has WAL of this generation that the directory does not continue: then its disk was put back.
async fn behind(
    repository: &Repository,
    data_dir: &Path,
    control: &ControlFile,
    writer: &Writer,
) -> Result<Option<String>> {
    // A directory still in recovery reads the archive itself.
    if control.is_in_recovery() || data_dir.join(RECOVERY_SIGNAL).is_file() || standby::has_followed(data_dir, control)?
    {
        return Ok(None);
    }
    let generation = writer.claim.generation;
    let lineage = repository.lineage(generation, Some(generation)).await?;
    let index = repository.wal_index(&lineage).await?;
    let Some(timeline) = index.newest_timeline() else { return Ok(None) };
    let local = control.newest_timeline();
    if timeline > local {
        return Ok(Some(format!("the repository is on timeline {timeline}, the directory on {local}")));
    }
    // The log is compared once it is sealed.
    let whole = |(_, place): &(u64, WalPlace)| matches!(place.source, WalSource::Object { .. });
    let Some((number, _)) = index.segments(timeline).rev().find(whole).filter(|_| timeline == local) else {
        return Ok(None);
    };
    let size = control.segment_size;
    if control.checkpoint >= size.start_of(number + 1) {
        return Ok(None);
    }
    // WAL after the last checkpoint is still in pg_wal, to the byte.
    let name = SegmentName::new(timeline, number, size);
    let local = crate::disk::read_if_there(&data_dir.join(format!("pg_wal/{name}")))?;
    match local {
        Some(bytes) if repository.holds(generation, WalFileName::Segment(name), &bytes).await? => Ok(None),
        Some(_) => Ok(Some(format!("the local {name} is not the one that was archived"))),
        None => {
            Ok(Some(format!("{name} was archived, and the directory's last checkpoint is at {}", control.checkpoint)))
        }
    }
}
