//! The generation a server archives under when `perennial run` does not supervise it: claimed by its first push.

use std::path::Path;
use std::sync::Arc;

use super::push::Pusher;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::model::{Timeline, WriteId};
use crate::postgres::data_dir::{OWN_DIR, refuse_partial};
use crate::postgres::{ControlFile, version_of};
use crate::repository::{NewWriter, Repository, Writer, origin};
use crate::storage::Store;
use crate::wal::WalFileName;

/// Attempts to claim when others claim at the same time.
const CLAIM_ATTEMPTS: u32 = 5;

/// The writer of this data directory: as noted, or claimed now. `timeline`: of the WAL that is to be stored. If the server
/// was promoted since the claim, another may have been the primary meanwhile; then the next generation begins.
pub async fn ensure_writer(
    store: Arc<dyn Store>,
    data_dir: &Path,
    timeline: Option<Timeline>,
    host: &str,
    clock: &Clock,
    events: &Events,
) -> Result<Writer> {
    let own_dir = data_dir.join(OWN_DIR);
    let noted = Writer::load(&own_dir)?;
    let address = store.url("").trim_end_matches('/').to_owned();
    let is_current = |writer: &Writer| writer.address == address && !writer.is_older_than(timeline);
    if let Some(writer) = noted.clone().filter(is_current) {
        return Ok(writer);
    }
    let repository = Repository::open(store, clock).await?;
    let same = |writer: &Writer| writer.descriptor.repository_id == repository.descriptor().repository_id;
    let writer = match noted.filter(same) {
        Some(writer)
            if writer.is_older_than(timeline)
                && repository.newest_generation().await? != Some(writer.claim.generation) =>
        {
            claim(&repository, data_dir, host, events).await?
        }
        // The same repository under another address (it was moved), or promoted with nobody else in between.
        Some(writer) => Writer { address, timeline: timeline.max(writer.timeline), ..writer },
        None => claim(&repository, data_dir, host, events).await?,
    };
    writer.save(&own_dir)?;
    origin::forget(&own_dir)?;
    Ok(writer)
}

async fn claim(repository: &Repository, data_dir: &Path, host: &str, events: &Events) -> Result<Writer> {
    refuse_partial(data_dir)?;
    let version = version_of(data_dir)?;
    let control = ControlFile::read(data_dir, version)?;
    if control.is_in_recovery() {
        return Err(Error::refused(format!(
            "{} is a standby: only the primary opens a generation",
            data_dir.display()
        ))
        .hint("set archive_mode = on (not always) on the standby"));
    }
    let new = NewWriter {
        writer_id: WriteId(repository.clock().random()),
        system_id: control.system_id,
        pg_major: version.major,
        segment_size: control.segment_size,
        host: host.to_owned(),
    };
    let own_dir = data_dir.join(OWN_DIR);
    let origin = origin::read(&own_dir, repository.descriptor().repository_id)?;
    for _ in 0..CLAIM_ATTEMPTS {
        let newest = repository.newest_generation().await?;
        if let Some(newest) = newest {
            let holder = repository.claim(newest).await?;
            if holder.system_id != control.system_id {
                return Err(Error::refused(format!(
                    "{} belongs to another cluster: system identifier {} there, {} here",
                    repository.address(),
                    holder.system_id,
                    control.system_id
                ))
                .hint("give each cluster a repository of its own"));
            }
        }
        let parent = origin.or(newest);
        if let Some(claim) = repository.try_claim(newest, parent, &new).await? {
            events.emit(Event::GenerationClaimed { generation: claim.generation, parent: claim.parent });
            let timeline = Some(control.newest_timeline());
            let writer = Writer { timeline, ..Writer::new(repository, claim) };
            push_history(repository, &writer, data_dir, events).await?;
            return Ok(writer);
        }
    }
    Err(Error::refused(format!("{}: several servers claim generations at once", repository.address()))
        .hint("make sure that only one server archives into this repository"))
}

/// Stores the history file of the timeline a server is on. PostgreSQL archives it only once, when the timeline begins,
/// which may have been before this generation or before this program came; without it nobody could follow the timeline.
pub async fn push_history(repository: &Repository, writer: &Writer, data_dir: &Path, events: &Events) -> Result<()> {
    let timeline = ControlFile::read(data_dir, version_of(data_dir)?)?.newest_timeline();
    let path = data_dir.join(format!("pg_wal/{}", WalFileName::History(timeline)));
    if timeline == Timeline(1) {
        return Ok(());
    }
    if !path.is_file() {
        return Err(Error::refused(format!("{} is missing: without it nobody could follow timeline {timeline}", path.display()))
            .hint("bring the file back from another archive of this cluster; a promotion (pg_promote on a standby) starts a new timeline with a file of its own"));
    }
    let (repository, writer) = (repository.clone(), writer.clone());
    let pusher = Pusher { repository, writer, data_dir: data_dir.to_owned(), events: events.clone() };
    pusher.push(&path).await
}
