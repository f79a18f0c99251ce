//! Gathering what the boot decision needs. Every look-up answers for certain or fails.

use std::path::Path;
use std::sync::Arc;

use super::Options;
use super::boot::{Bucket, Directory, Facts};
use crate::archive::claim::read_origin;
use crate::clock::Clock;
use crate::error::Result;
use crate::postgres::control_file::State;
use crate::postgres::data_dir::{OWN_DIR, RESTORE_MARKER};
use crate::postgres::{ControlFile, PostmasterFile, is_vacant, version_of};
use crate::repository::{Claim, Found, Repository, Writer};
use crate::restore::Reachable;
use crate::storage::Store;
use crate::wal::{SegmentName, WalFileName};

pub(super) async fn gather(
    store: Arc<dyn Store>,
    options: &Options,
    clock: &Clock,
) -> Result<(Option<Repository>, Facts)> {
    let address = store.url("").trim_end_matches('/').to_owned();
    let repository = match Repository::find(store, clock).await? {
        Found::Repository(repository) => Some(repository),
        Found::Empty => None,
    };
    let bucket = match &repository {
        Some(repository) => look_into(repository).await?,
        None => Bucket::Empty,
    };
    let directory = look_at(&options.data_dir, repository.as_ref()).await?;
    let facts = Facts {
        data_dir: options.data_dir.display().to_string(),
        address,
        directory,
        bucket,
        init: options.init,
        adopt: options.adopt,
    };
    Ok((repository, facts))
}

async fn look_into(repository: &Repository) -> Result<Bucket> {
    let repository_id = repository.descriptor().repository_id;
    let Some(newest) = repository.newest_generation().await? else { return Ok(Bucket::Unused { repository_id }) };
    let newest = repository.claim(newest).await?;
    let restorable = is_restorable(repository, &newest).await?;
    Ok(Bucket::Used { repository_id, newest, restorable })
}

async fn is_restorable(repository: &Repository, newest: &Claim) -> Result<bool> {
    match Reachable::find(repository, Some(newest.generation), None).await? {
        Some(reachable) => Ok(!reachable.view()?.usable(&reachable.backups).is_empty()),
        None => Ok(false),
    }
}

async fn look_at(data_dir: &Path, repository: Option<&Repository>) -> Result<Directory> {
    if is_vacant(data_dir)? {
        return Ok(Directory::Vacant);
    }
    if data_dir.join(RESTORE_MARKER).is_file() {
        return Ok(Directory::Unfinished);
    }
    if !data_dir.join("PG_VERSION").is_file() {
        return Ok(Directory::Foreign);
    }
    if let Some(running) = PostmasterFile::read(data_dir)?.filter(|file| file.is_alive(data_dir)) {
        return Ok(Directory::Running { pid: running.pid });
    }
    let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
    let own_dir = data_dir.join(OWN_DIR);
    let Some(writer) = Writer::load(&own_dir)? else {
        return Ok(Directory::Unclaimed { system_id: control.system_id, origin: read_origin(&own_dir)? });
    };
    let same = repository.filter(|repository| repository.descriptor().repository_id == writer.descriptor.repository_id);
    let behind = match same {
        Some(repository) => behind(repository, data_dir, &control, &writer).await?,
        None => None,
    };
    Ok(Directory::Ours {
        repository_id: writer.descriptor.repository_id,
        generation: writer.claim.generation,
        writer_id: writer.claim.writer_id,
        behind,
    })
}

/// Whether the archive has WAL of this generation that the directory does not continue: then its disk was put back.
async fn behind(
    repository: &Repository,
    data_dir: &Path,
    control: &ControlFile,
    writer: &Writer,
) -> Result<Option<String>> {
    // A directory still in recovery reads the archive itself.
    if matches!(control.state, State::InArchiveRecovery | State::ShutDownInRecovery)
        || data_dir.join("recovery.signal").is_file()
    {
        return Ok(None);
    }
    let generation = writer.claim.generation;
    let lineage = repository.lineage(generation, Some(generation)).await?;
    let index = repository.wal_index(&lineage).await?;
    let Some(timeline) = index.newest_timeline() else { return Ok(None) };
    if timeline > control.timeline {
        return Ok(Some(format!("the archive is on timeline {timeline}, the directory on {}", control.timeline)));
    }
    let Some((number, _)) = index.segments(timeline).next_back().filter(|_| timeline == control.timeline) else {
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
