//! A standby that becomes the database: its files are there already, so what a restore leaves to recovery is all that is
//! left to do.

use std::path::Path;

use super::beside::{self, Point};
use super::plan::Reachable;
use super::recovery;
use crate::disk;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::model::{Beside, Generation, Lsn, Timeline};
use crate::postgres::data_dir::{RECOVERY_SIGNAL, STANDBY_SIGNAL};
use crate::postgres::{ControlFile, conf, version_of};
use crate::repository::Repository;
use crate::repository::manifest::BackupHead;
use crate::repository::reach::View;

/// Written by a base backup, renamed by the first start: until then recovery begins where it says.
const LABEL: &str = "backup_label";

/// Whether a server that starts in the directory would stay in recovery.
pub fn is_standby(data_dir: &Path) -> Result<bool> {
    disk::is_there(&data_dir.join(STANDBY_SIGNAL))
}

/// Whether it was one, or is about to be: somebody may have put the file into the directory of a primary.
pub fn has_followed(data_dir: &Path, control: &ControlFile) -> Result<bool> {
    Ok(is_standby(data_dir)? && (control.is_in_recovery() || disk::is_there(&data_dir.join(LABEL))?))
}

/// Where a stopped standby is in its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From here on it reads WAL.
    pub from: Lsn,
    /// Up to here its files have been changed by WAL, at least.
    pub reached: Option<(Timeline, Lsn)>,
}

impl Place {
    pub fn read(data_dir: &Path, backups: &[BackupHead]) -> Result<Place> {
        let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
        let Some(label) = disk::read_if_there(&data_dir.join(LABEL))? else {
            return Ok(Place { from: control.redo, reached: control.recovered() });
        };
        let label = String::from_utf8_lossy(&label);
        let from = start_of(&label).ok_or_else(|| {
            Error::damaged(format!("{} does not say where WAL starts", data_dir.join(LABEL).display()))
        })?;
        // It has to get to the end of its backup.
        let backup = backups.iter().find(|backup| backup.backup_label == label);
        Ok(Place { from, reached: backup.map(|backup| (backup.timeline, backup.stop_lsn)) })
    }

    /// Why it cannot go on to the end of a history. Pure.
    pub fn misfit(&self, view: &View<'_>, origin: Option<Generation>) -> Option<String> {
        view.left_behind(origin, self.reached).or_else(|| view.falls_short(self.from, self.reached))
    }
}

/// `START WAL LOCATION: 0/2000028 (file …)`.
fn start_of(label: &str) -> Option<Lsn> {
    let rest = label.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: "))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// A standby whose directory a generation was claimed for; the logs before are sealed.
#[derive(Debug)]
pub struct Promotion<'a> {
    pub data_dir: &'a Path,
    pub generation: Generation,
    /// The newest generation it was given anything of, if that is known.
    pub origin: Option<Generation>,
    pub fetch_command: &'a [String],
    pub beside: &'a [Beside],
}

impl Promotion<'_> {
    /// Makes the next start recover to the end of the history, and leave recovery there. May be done again if it was
    /// cut off. `Some`: why the standby has no part in that history; then nothing was changed.
    pub async fn prepare(&self, repository: &Repository, events: &Events) -> Result<Option<String>> {
        let reachable = Reachable::read(repository, Some(self.generation), None).await?;
        let (view, place) = (reachable.view()?, Place::read(self.data_dir, &reachable.backups)?);
        if let Some(why) = place.misfit(&view, self.origin) {
            return Ok(Some(why));
        }
        let through = view.coverage(place.from).through;
        beside::restore(repository, self.beside, &reachable, Point { lsn: through, time: None }, events).await?;
        let oldest = view.oldest_from(place.from).unwrap_or(self.generation);
        let settings = recovery::promotion(self.fetch_command, self.generation, oldest, reachable.timeline);
        conf::apply(self.data_dir, &settings)?;
        disk::durable_write(&self.data_dir.join(RECOVERY_SIGNAL), b"", 0o600)?;
        disk::remove_if_there(&self.data_dir.join(STANDBY_SIGNAL))?;
        disk::sync_dir(self.data_dir)?;
        events.info(format!(
            "the standby goes on to {through} on timeline {}, and is the database from there",
            reachable.timeline
        ));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_says_where_wal_starts() {
        let label = "START WAL LOCATION: A/2000028 (file 000000010000000A00000002)\nCHECKPOINT LOCATION: A/2000060\n";
        assert_eq!(start_of(label), Some(Lsn(0xA_0200_0028)));
        assert_eq!(start_of("CHECKPOINT LOCATION: 0/2000060\n"), None);
    }
}
