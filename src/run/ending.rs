//! The end of a log whose server has ended: brought up to its last byte, and released.

use std::path::Path;

use crate::archive::push::Pusher;
use crate::archive::stream::catch_up;
use crate::error::{Error, IoContext, Result};
use crate::events::Events;
use crate::model::Lsn;
use crate::postgres::control_file::State;
use crate::postgres::{ControlFile, version_of};
use crate::repository::log::Appender;
use crate::wal::{SegmentName, record_end};

/// Ends the log so that the next machine need not wait, if the server ended cleanly and all of its WAL is there.
pub(super) async fn release(mut log: Appender, pusher: &Pusher, success: bool, events: &Events) -> Result<()> {
    let control = ControlFile::read(&pusher.data_dir, version_of(&pusher.data_dir)?)?;
    if !success || control.state != State::ShutDown {
        return Err(Error::postgres("the server did not shut down cleanly: what it wrote last is on its disk only"));
    }
    catch_up(&mut log, pusher, shutdown_end(&pusher.data_dir, &control)?).await?;
    let durable = log.release().await?;
    events.info(format!("released: everything up to {} is in the repository", durable.position.lsn));
    Ok(())
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
