//! The end of a log whose server has ended: brought up to its last byte, and released.

use std::path::Path;
use std::time::Duration;

use crate::archive::push::Pusher;
use crate::archive::stream::catch_up;
use crate::backup::beside::{self, Means, Place};
use crate::error::{Error, IoContext, Result};
use crate::events::Events;
use crate::model::{Beside, Lsn};
use crate::postgres::control_file::State;
use crate::postgres::{ControlFile, version_of};
use crate::repository::log::Appender;
use crate::wal::{SegmentName, record_end};

/// Ends the log so that the next machine need not wait, if the server ended cleanly and all of its WAL is there.
pub(super) async fn release(
    mut log: Appender,
    pusher: &Pusher,
    success: bool,
    beside: (&[Beside], Duration),
    events: &Events,
) -> Result<()> {
    let control = ControlFile::read(&pusher.data_dir, version_of(&pusher.data_dir)?)?;
    if !success || control.state != State::ShutDown {
        return Err(Error::postgres("the server did not shut down cleanly: what it wrote last is on its disk only"));
    }
    catch_up(&mut log, pusher, shutdown_end(&pusher.data_dir, &control)?).await?;
    snapshots(pusher, &control, log.durable().position.lsn, beside, events).await;
    let durable = log.release().await?;
    events.info(format!("released: everything up to {} is in the repository", durable.position.lsn));
    Ok(())
}

/// Snapshots of what lies beside the database, as of its last state. The next machine waits for our log's end: a snapshot
/// that takes too long is given up, and the one before it counts.
async fn snapshots(
    pusher: &Pusher,
    control: &ControlFile,
    end: Lsn,
    (besides, deadline): (&[Beside], Duration),
    events: &Events,
) {
    let Pusher { repository, writer, .. } = pusher;
    let work = async {
        let lineage = repository.lineage(writer.claim.generation, None).await?;
        let ids = repository.backup_ids().await?;
        // It goes with the newest backup: without one there is nothing that it could be restored with.
        let backup = ids.into_iter().rev().find(|id| lineage.contains(id.generation));
        let Some(backup) = backup else { return Ok(()) };
        let (generation, timeline) = (writer.claim.generation, control.newest_timeline());
        let position = async || Ok((end, repository.clock().now()));
        for beside in besides {
            let place = Place { backup, generation, timeline };
            beside::take(repository, beside, (place, Means::default()), position, events).await?;
        }
        Ok::<_, Error>(())
    };
    if besides.is_empty() {
        return;
    }
    // Half of what is left: the other half is for the log's end.
    let at_most = deadline.saturating_sub(repository.clock().monotonic()) / 2;
    let failed = match repository.clock().within(at_most, work).await {
        Some(Ok(())) => return,
        Some(Err(error)) => error.to_string(),
        None => "it takes too long for the grace period".to_owned(),
    };
    events.alarm(format!("no snapshot was taken of what lies beside the database: {failed}"));
}

/// Where the WAL of a server that was shut down ends: behind its last checkpoint's record.
fn shutdown_end(data_dir: &Path, control: &ControlFile) -> Result<Lsn> {
    let size = control.segment_size;
    let name = SegmentName::new(control.newest_timeline(), size.number_at(control.checkpoint), size);
    let path = data_dir.join("pg_wal").join(name.to_string());
    let content = std::fs::read(&path).on("read", &path)?;
    // A checkpoint's record is short; one that crosses into the next segment ends in its first page.
    Ok(record_end(name, &content, control.checkpoint)?.unwrap_or(size.start_of(size.number_at(control.checkpoint) + 1)))
}
