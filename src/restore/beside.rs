//! Directories beside the database come back with it: from the newest snapshot that is not ahead of the state the database
//! is restored to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fetch::{self, Contents};
use super::layout::{empty_but, inside, set_mode, sync_filesystem};
use super::plan::{Choice, Reachable};
use super::target::Target;
use crate::disk;
use crate::error::{IoContext, Kind, Result};
use crate::events::Events;
use crate::model::{Beside, Generation, Lsn, Timestamp, human_bytes};
use crate::repository::log::Position;
use crate::repository::reach::View;
use crate::repository::{BesideHead, Repository, SET_ASIDE, UNFINISHED};

/// The state of the database, as far as it is known before it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// It has everything up to here.
    pub lsn: Lsn,
    /// And every commit until then, by the clock of the generation whose backup it starts from.
    pub time: Option<(Generation, Timestamp)>,
}

impl Point {
    /// What a restore will come to, at least.
    pub fn of(choice: &Choice) -> Point {
        let located = &choice.located;
        let lsn = match located.target {
            Target::Newest | Target::BeforeGap => choice.through,
            // Somewhere in the segment whose first byte is known.
            Target::Time(_) => located.through.map_or(choice.backup.stop_lsn, |within| Lsn(within.0 - 1)),
            Target::Lsn(lsn) => lsn,
            Target::Xid(_) | Target::Name(_) => {
                let end = located.not_after.unwrap_or(choice.backup.stop_lsn);
                // Just before it: what has seen it is ahead.
                if located.inclusive { end } else { Lsn(end.0 - 1) }
            }
            Target::Immediate => choice.backup.stop_lsn,
        };
        let time = match located.target {
            Target::Time(time) if located.inclusive => Some(time),
            Target::Time(time) => Some(time.earlier_by(Duration::from_micros(1))),
            _ => None,
        };
        let time = time.map(|time| (choice.backup.generation, time));
        Point { lsn: lsn.max(choice.backup.stop_lsn), time }
    }

    fn is_behind(&self, head: &BesideHead) -> bool {
        // Clocks of two machines say nothing of each other.
        let in_time = self.time.is_some_and(|(by, time)| head.generation == by && head.taken_at <= time);
        head.lsn > self.lsn && !in_time
    }
}

/// The snapshots that lie on the way and are not ahead of the point, newest first. Pure.
fn usable<'a>(snapshots: &'a [BesideHead], view: &View<'_>, point: Point) -> Vec<&'a BesideHead> {
    let passes = |head: &&BesideHead| view.passes(head.generation, head.timeline, head.lsn);
    let mut usable: Vec<_> = snapshots.iter().filter(|head| passes(head) && !point.is_behind(head)).collect();
    usable.sort_by_key(|head| std::cmp::Reverse((head.lsn, head.taken_at)));
    usable
}

/// Puts all of `besides` back, as of the point at the most.
pub async fn restore(
    repository: &Repository,
    besides: &[Beside],
    reachable: &Reachable,
    point: Point,
    events: &Events,
) -> Result<()> {
    let view = reachable.view()?;
    for beside in besides {
        let (snapshots, damaged) = repository.besides(Some(&beside.name)).await?;
        damaged.iter().for_each(|error| events.warning(format!("a snapshot cannot be used: {error}")));
        let usable = usable(&snapshots, &view, point);
        if usable.is_empty() {
            let what =
                if snapshots.is_empty() { "yet".to_owned() } else { format!("that is not ahead of {}", point.lsn) };
            let path = beside.path.display();
            events.warning(format!("there is no snapshot of '{}' {what}: {path} is left as it is", beside.name));
        }
        // Damage of what lies beside it must not keep the database down.
        let mut ours = false;
        for head in usable {
            match put_back(repository, beside, head, (point, &mut ours), events).await {
                Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Local) => {
                    events.alarm(format!("'{}' as of {} cannot be put back: {error}", beside.name, head.lsn));
                }
                done => {
                    done?;
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Names that a restore has made: its mark, and what it has set aside.
fn is_restores(name: &str) -> bool {
    name == UNFINISHED || name.starts_with(SET_ASIDE)
}

/// Directories that have nothing in them, or were not put back whole.
pub fn lost(besides: &[Beside]) -> Result<Vec<Beside>> {
    let mut lost = Vec::new();
    for beside in besides {
        if disk::is_vacant_but(&beside.path, is_restores)? || disk::is_there(&beside.path.join(UNFINISHED))? {
            lost.push(beside.clone());
        }
    }
    Ok(lost)
}

/// Puts directories back beside a database whose own directory is still there.
pub async fn put_back_lost(
    repository: &Repository,
    lost: &[Beside],
    generation: Generation,
    end: Position,
    events: &Events,
) -> Result<()> {
    if lost.is_empty() {
        return Ok(());
    }
    let found = Reachable::find(repository, Some(generation), Some(end.timeline)).await?;
    let Some(reachable) = found else { return Ok(()) };
    restore(repository, lost, &reachable, Point { lsn: end.lsn, time: None }, events).await
}

async fn put_back(
    repository: &Repository,
    beside: &Beside,
    head: &BesideHead,
    (point, ours): (Point, &mut bool),
    events: &Events,
) -> Result<()> {
    // A link to another disk stays one.
    let path = std::fs::canonicalize(&beside.path).unwrap_or_else(|_| beside.path.clone());
    let beside = &Beside { name: beside.name.clone(), path };
    let unfinished = beside.path.join(UNFINISHED);
    // What is there since it was set aside is what we have put there.
    if *ours {
        empty_but(&beside.path, is_restores)?;
    } else if !disk::is_vacant_but(&beside.path, is_restores)? {
        // Whoever started the application in a directory that was not put back whole may have data in it, too.
        let aside = set_aside(repository, &beside.path)?;
        events.warning(format!("what was in {} is set aside: it is now in {}", beside.path.display(), aside.display()));
    }
    disk::create_dir(&beside.path, 0o700)?;
    disk::durable_write(&unfinished, b"", 0o600)?;
    *ours = true;
    let contents = Contents::read_beside(repository, head).await?;
    for directory in &contents.directories {
        disk::create_dir(&inside(&beside.path, &directory.path)?, 0o700)?;
    }
    fetch::write_plain_files(repository, &contents, &beside.path).await?;
    for file in &contents.files {
        set_time(&inside(&beside.path, &file.path)?, file.mtime)?;
    }
    for link in &contents.links {
        let path = inside(&beside.path, &link.path)?;
        std::os::unix::fs::symlink(&link.target, &path).on("create link", &path)?;
    }
    // Last, and from below: one that may not be written to could not have been filled.
    for directory in contents.directories.iter().rev() {
        set_mode(&inside(&beside.path, &directory.path)?, directory.mode)?;
    }
    sync_filesystem(&beside.path)?;
    disk::remove_if_there(&unfinished)?;
    disk::sync_dir(&beside.path)?;
    let mixed = match head.changing {
        0 => String::new(),
        files => format!("; {files} of them were being written to when they were read"),
    };
    events.info(format!(
        "'{}' is back in {}: {} files, {}, as of {} ({}); the database goes to {}{mixed}",
        beside.name,
        beside.path.display(),
        head.files,
        human_bytes(head.bytes),
        head.lsn,
        head.taken_at.short(),
        point.lsn
    ));
    Ok(())
}

/// Nothing is deleted that may be all there is. What cannot be renamed (a mount point, a directory in one that is not ours)
/// gets its content moved into a directory inside.
fn set_aside(repository: &Repository, path: &Path) -> Result<PathBuf> {
    let stamp = repository.clock().now().unix_micros();
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".replaced-{stamp}"));
    let aside = path.with_file_name(name);
    match disk::durable_rename(path, &aside) {
        // It has its new name, though that may not be durable.
        Err(error) if !disk::is_there(path)? => return Err(error),
        Err(_) => (),
        Ok(()) => return Ok(aside),
    }
    let aside = path.join(format!("{SET_ASIDE}{stamp}"));
    disk::create_dir(&aside, 0o700)?;
    for entry in std::fs::read_dir(path).on("list directory", path)? {
        let entry = entry.on("list directory", path)?;
        let name = entry.file_name();
        let stays = name.to_str().is_some_and(|name| name == "lost+found" || name.starts_with(SET_ASIDE));
        if !stays {
            disk::durable_rename(&entry.path(), &aside.join(name))?;
        }
    }
    Ok(aside)
}

/// By path: a file that nobody may write to has a time, too.
fn set_time(path: &Path, seconds: i64) -> Result<()> {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .on("set the time of", path)
}
