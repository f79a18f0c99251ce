//! Restores: choose a backup and check the target against what is reachable (pure), fetch and write files, and leave a
//! directory that PostgreSQL recovers from there. A directory that is not finished can only be restored again.

pub mod beside;
mod delta;
mod fetch;
mod find;
mod layout;
mod outside;
pub mod pg_manifest;
pub mod plan;
mod ranges;
mod recovery;
mod sample;
mod selected;
mod spans;
pub mod standby;
mod target;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::disk::{self, Lock};
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, Beside, Generation, Timeline, human_bytes};
use crate::postgres::data_dir::{OWN_DIR, RESTORE_MARKER};
use crate::postgres::{ControlFile, PostmasterFile, is_vacant, version_of};
use crate::repository::manifest::{BackupHead, Database};
use crate::repository::{Repository, Writer, origin, piece_sums};

use selected::Selection;

pub use plan::{Choice, Reachable};
pub use recovery::RecoverySettings;
pub use sample::{Sample, verify_next};
pub use target::{Action, Target};
pub use verify::{Depth, Finding, Report, verify};

#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    pub backup: Option<BackupId>,
    pub target: Target,
    pub inclusive: bool,
    pub action: Action,
    /// The newest generation of the history to restore; the repository's newest when `None`.
    pub generation: Option<Generation>,
    pub timeline: Option<Timeline>,
    /// The databases that are restored, by name or number, beside those of the system; all when none are named.
    pub databases: Vec<String>,
    /// Where tablespaces go, by oid or by their former location.
    pub tablespace_map: BTreeMap<String, PathBuf>,
    /// What happens to a directory that has something in it.
    pub overwrite: Overwrite,
    /// Leave `archive_mode` as it was, instead of switching it off in the copy.
    pub keep_archiving: bool,
    /// Words of the command that fetches WAL, without placeholders: program, `wal fetch`, repository.
    pub fetch_command: Vec<String>,
    /// Whose directory it becomes, noted in it before it is finished; nobody's yet when `None`.
    pub writer: Option<Writer>,
    /// Directories beside the database, to be put back with it.
    pub beside: Vec<Beside>,
}

/// What a restore does with a directory that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    /// It is refused; but for one that a restore has not finished, which is gone on with.
    Never,
    /// It is emptied.
    Empty,
    /// What it has of the backup stays, if it is a copy of the same cluster.
    Differences,
}

/// What a restore came to.
#[derive(Debug, Clone)]
pub struct Restored {
    pub backup: BackupHead,
    pub choice: Choice,
    /// Databases that are there in name only.
    pub left_out: Vec<Database>,
}

/// Restores into `options.data_dir`, which the caller has locked ([`lock`]).
pub async fn run(repository: &Repository, options: &Options, events: &Events) -> Result<Restored> {
    let began = repository.clock().monotonic();
    let unfinished = check_directory(&options.data_dir, options.overwrite)?;
    let (choice, reachable) = choose_in(repository, options).await?;
    for damage in &choice.damaged {
        events.warning(format!("a backup cannot be used: {damage}"));
    }
    if let Some((level, text)) = find::note(&options.target, &choice.located) {
        events.emit(Event::Note { level, text });
    }
    let backup = choice.backup.clone();
    let mut contents = fetch::Contents::read(repository, backup.backup_id).await?;
    let selection = Selection::of(&mut contents, &options.databases, &backup)?;
    let (files, bytes) = (contents.files.len() as u64, contents.bytes());
    let target = choice.describe();
    events.emit(Event::RestorePlanned { backup: backup.backup_id, files, bytes, target });
    let tablespaces = layout::Tablespaces::map(&backup, &options.tablespace_map)?;
    tablespaces.check(&options.data_dir, options.overwrite, unfinished.as_deref())?;
    let delta = unfinished.is_some() || options.overwrite == Overwrite::Differences;
    if options.overwrite == Overwrite::Differences && unfinished.is_none() {
        same_cluster(&options.data_dir, &backup)?;
    }
    mark(&options.data_dir, &tablespaces, &backup)?;
    match delta {
        true => delta::clear(&options.data_dir, &contents, &tablespaces, &[RESTORE_MARKER, layout::UNFINISHED])?,
        false => {
            layout::empty(&options.data_dir, Some(RESTORE_MARKER))?;
            tablespaces.empty(backup.pg_major)?;
        }
    }
    layout::make_directories(&options.data_dir, &contents.directories, &tablespaces)?;
    outside::make_directories(&contents, &options.data_dir)?;
    let have = if delta { delta::look(&contents, &options.data_dir).await? } else { delta::Have::default() };
    if delta {
        events.info(format!("{} of {} are there already", human_bytes(have.bytes), human_bytes(bytes)));
    }
    // A directory that goes on with the repository is told what it has.
    let sums = options.writer.as_ref().and_then(|_| {
        let whose = (repository.descriptor().repository_id, backup.backup_id);
        let filler = fetch::piece_sums(&options.data_dir.join(OWN_DIR), whose, &contents);
        filler.inspect_err(|error| events.warning(piece_sums::lost(error))).ok()
    });
    fetch::write_files(repository, &contents, &have, &options.data_dir, (sums, events)).await?;
    let selection = leave_out(selection, &options.data_dir, &backup).await?;
    outside::adapt(&mut contents, &options.data_dir)?;

    let settings = recovery::settings(&choice, options);
    recovery::write(&options.data_dir, &backup, &tablespaces, &settings, options.action.signal())?;
    if options.action == Action::Follow {
        let repository_id = repository.descriptor().repository_id;
        origin::note(&options.data_dir.join(OWN_DIR), repository_id, backup.generation)?;
    }
    if !selection.is_partial() {
        pg_manifest::write(&options.data_dir, &backup, &contents.files, &tablespaces)?;
    }
    let point = beside::Point::of(&choice);
    beside::restore(repository, &options.beside, &reachable, point, events).await?;
    if let Some(writer) = &options.writer {
        writer.save(&options.data_dir.join(OWN_DIR))?;
    }
    finish(&options.data_dir, &tablespaces)?;
    events.emit(Event::RestoreDone {
        backup: backup.backup_id,
        bytes,
        elapsed: repository.clock().monotonic() - began,
    });
    Ok(Restored { backup, choice, left_out: selection.left_out })
}

/// Makes what is there in name only, and says so: a part of a cluster must never be taken for all of it.
async fn leave_out(selection: Selection, data_dir: &Path, backup: &BackupHead) -> Result<Selection> {
    if !selection.is_partial() {
        return Ok(selection);
    }
    selection.mark(data_dir, backup)?;
    let directory = data_dir.to_owned();
    let make = tokio::task::spawn_blocking(move || selection.make(&directory).map(|()| selection));
    make.await.map_err(|e| Error::internal("a writing thread ended").source(e))?
}

/// The databases that a restore as asked for would leave out.
pub async fn left_out(repository: &Repository, options: &Options, choice: &Choice) -> Result<Vec<Database>> {
    if options.databases.is_empty() {
        return Ok(Vec::new());
    }
    let mut contents = fetch::Contents::read(repository, choice.backup.backup_id).await?;
    Ok(Selection::of(&mut contents, &options.databases, &choice.backup)?.left_out)
}

/// Makes the directory if need be and keeps every other process of ours out of it: one that came later would find a
/// restore that is being done, take it for one that was given up, and begin anew in its middle.
pub fn lock(data_dir: &Path) -> Result<Lock> {
    disk::create_dir(data_dir, 0o700)?;
    Lock::of_directory(data_dir)?.ok_or_else(|| {
        Error::refused(format!("another perennial process is at work in {}", data_dir.display()))
            .hint("stop it first, or name another directory with -D")
    })
}

/// Decides what would be restored, without writing anything.
pub async fn choose(repository: &Repository, options: &Options) -> Result<Choice> {
    Ok(choose_in(repository, options).await?.0)
}

async fn choose_in(repository: &Repository, options: &Options) -> Result<(Choice, Reachable)> {
    let mut reachable = Reachable::read(repository, options.generation, options.timeline).await?;
    let target = find::locate(repository, &reachable, &options.target, options.inclusive).await?;
    Ok((plan::choose(&mut reachable, options.backup, &target)?, reachable))
}

/// Whether a restore as asked for could be done here: to be known before anything is taken from anybody.
pub async fn check(repository: &Repository, options: &Options) -> Result<()> {
    let unfinished = check_directory(&options.data_dir, options.overwrite)?;
    let choice = choose(repository, options).await?;
    if options.overwrite == Overwrite::Differences && unfinished.is_none() {
        same_cluster(&options.data_dir, &choice.backup)?;
    }
    left_out(repository, options, &choice).await?;
    let tablespaces = layout::Tablespaces::map(&choice.backup, &options.tablespace_map)?;
    tablespaces.check(&options.data_dir, options.overwrite, unfinished.as_deref())
}

/// What a restore that has not finished has noted there.
fn check_directory(data_dir: &Path, overwrite: Overwrite) -> Result<Option<String>> {
    if PostmasterFile::read(data_dir)?.is_some_and(|file| file.is_alive(data_dir)) {
        return Err(Error::refused(format!("a server is running in {}", data_dir.display()))
            .hint("stop it, or restore to another directory"));
    }
    let unfinished = disk::read_if_there(&data_dir.join(RESTORE_MARKER))?;
    if unfinished.is_some() || overwrite != Overwrite::Never || is_vacant(data_dir)? {
        return Ok(unfinished.map(|text| String::from_utf8_lossy(&text).into_owned()));
    }
    Err(Error::refused(format!("{} is not empty", data_dir.display()))
        .hint("restore to a new directory, or add --force to delete what is in this one, or --delta to fetch only what differs in it"))
}

/// Differences are fetched over a copy of the same cluster only: whatever else is in a directory was not meant.
fn same_cluster(data_dir: &Path, backup: &BackupHead) -> Result<()> {
    if is_vacant(data_dir)? {
        return Ok(());
    }
    if !data_dir.join("PG_VERSION").is_file() {
        return Err(Error::refused(format!("{} is not empty and not a data directory", data_dir.display()))
            .hint("--delta is for a copy of the same cluster; restore to another directory"));
    }
    let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
    if control.system_id != backup.system_id {
        return Err(Error::refused(format!(
            "{} belongs to system {}, the backup to {}",
            data_dir.display(),
            control.system_id,
            backup.system_id
        ))
        .hint("--delta is for a copy of the same cluster; --force deletes what is in the directory"));
    }
    Ok(())
}

/// Marks the directory as unfinished. From here to [`finish`] PostgreSQL cannot start in it: the marker says why, and
/// `global/pg_control` is not there.
fn mark(data_dir: &Path, tablespaces: &layout::Tablespaces, backup: &BackupHead) -> Result<()> {
    disk::create_dir(data_dir, 0o700)?;
    set_private(data_dir)?;
    let marker = data_dir.join(RESTORE_MARKER);
    let text = format!(
        "Perennial is restoring backup {} here. Unfinished: restore again.\n{}",
        backup.backup_id,
        tablespaces.note()
    );
    disk::durable_write(&marker, text.as_bytes(), 0o600)?;
    disk::remove_if_there(&data_dir.join("global/pg_control"))?;
    tablespaces.mark()
}

/// Empties a directory that this process has just made and nothing else has used.
pub fn discard(data_dir: &Path) -> Result<()> {
    layout::empty(data_dir, None)
}

fn set_private(data_dir: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let mode = std::fs::metadata(data_dir).on("stat", data_dir)?.mode() & 0o7777;
    // PostgreSQL accepts 0700 and 0750 only.
    match mode {
        0o700 | 0o750 => Ok(()),
        _ => std::fs::set_permissions(data_dir, std::fs::Permissions::from_mode(0o700)).on("set the mode of", data_dir),
    }
}

/// Makes everything durable, puts the control file in its place, and only then takes the marker away.
fn finish(data_dir: &Path, tablespaces: &layout::Tablespaces) -> Result<()> {
    layout::sync_filesystem(data_dir)?;
    tablespaces.roots().try_for_each(layout::sync_filesystem)?;
    let control = data_dir.join("global/pg_control");
    disk::durable_rename(&layout::control_file_aside(data_dir), &control)?;
    tablespaces.unmark()?;
    disk::remove_if_there(&data_dir.join(RESTORE_MARKER))?;
    disk::sync_dir(data_dir)
}
