//! May a directory go on where the log of its generation ends? Only if its own WAL continues the log, to the byte.

use std::path::Path;

use crate::disk;
use crate::error::Result;
use crate::postgres::{ControlFile, version_of};
use crate::repository::Repository;
use crate::repository::log::LogView;
use crate::wal::SegmentName;

/// Why the directory's WAL does not continue the log; `None` when it does. The log must be sealed: it goes no further.
pub async fn diverges(repository: &Repository, view: &LogView, data_dir: &Path) -> Result<Option<String>> {
    let Some(end) = view.end() else { return Ok(None) };
    let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
    if control.newest_timeline() != end.timeline {
        let timeline = control.newest_timeline();
        return Ok(Some(format!("the log is on timeline {}, the directory on timeline {timeline}", end.timeline)));
    }
    let Some(run) = repository.log_run(view).await? else { return Ok(None) };
    let size = control.segment_size;
    let number = size.number_before(run.end);
    let (name, from) = (SegmentName::new(run.timeline, number, size), size.start_of(number).max(run.start));
    let path = data_dir.join("pg_wal").join(name.to_string());
    let Some(local) = disk::read_if_there(&path)? else {
        let behind = control.checkpoint < run.end;
        return Ok(behind.then(|| {
            format!(
                "the log goes to {}, the directory's last checkpoint is at {} and {name} is not there",
                run.end, control.checkpoint
            )
        }));
    };
    let mut differs = None;
    let compare = |at: crate::model::Lsn, piece: &[u8]| {
        let offset = at.bytes_since(size.start_of(number)) as usize;
        if local.get(offset..offset + piece.len()) != Some(piece) {
            differs.get_or_insert(at);
        }
        Ok(())
    };
    repository.read_log(&run, from, run.end, compare).await?;
    Ok(differs.map(|at| format!("the log goes to {}, the directory's {name} is another from {at} on", run.end)))
}
