//! Online base backups: copy a running server's files, then make them a backup once their WAL has arrived too.
//!
//! Two states. *Uploaded*: every pack is in the bucket, nothing shows it. *Restorable*: all WAL from start to stop is
//! there as well and was looked at; only then is the manifest put, and the backup exists. Whatever fails before leaves
//! nothing visible.

pub mod beside;
mod changes;
mod copy;
mod gather;
#[cfg(test)]
mod many_increments;
mod parent;
#[cfg(test)]
mod random_histories;
mod rate;
mod region;
pub mod remains;
mod sparse;
pub(crate) mod standby;
mod summaries;
mod wait;
mod workers;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::disk;
use crate::error::{Error, IoContext, Kind, Result};
use crate::events::{Event, Events, Level};
use crate::model::{BackupId, Beside, ByteSize, Generation, Lsn, PackId, Timestamp, WriteId, human_bytes};
use crate::postgres::client::{Server, Stopped, same_directory};
use crate::postgres::data_dir::{self, FileItem, Item, Walk};
use crate::postgres::{Client, ConnectOptions, ControlFile};
use crate::repository::manifest::{
    BackupHead, Database, Directory, Line, Lines, LinesWriter, Link, REGION, Tablespace,
};
use crate::repository::piece_sums::{self, PieceSums};
use crate::repository::{Repository, layout};
use crate::storage::Body;

use copy::Copied;
pub use copy::Stretch;
use parent::{Descent, Parent};
use remains::Remains;
use standby::Standby;

/// Packs on their way at once. Memory budget of a backup, under 128 MB: one pack being filled and these, 48 MB, and up
/// to [`copy::IN_FLIGHT_MAX`] threads with 5 MB each; after one that was cut off also what that has left ([`remains`]), 36 MB at
/// most. What the last backup has comes on top, about
/// 100 bytes for each megabyte of files and some hundred for each file.
pub const UPLOADS: usize = 2;

#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    pub connect: ConnectOptions,
    /// The generation whose writer archives this server's WAL.
    pub generation: Generation,
    /// Checkpoint at once instead of spreading it (`fast` of `pg_backup_start`).
    pub fast: bool,
    /// The server is a standby of the one that archives.
    pub of_standby: bool,
    /// Fail on a page whose checksum does not hold, instead of reporting it.
    pub fail_on_damage: bool,
    /// Store everything anew instead of building on the last backup.
    pub full: bool,
    /// Bytes a second that are read at most; what is sent is less of it, in packs of 16 MB. `None`: as fast as it goes.
    pub max_rate: Option<ByteSize>,
    /// How long to wait for the backup's WAL to reach the repository.
    pub wal_timeout: Duration,
    /// Directories beside the database, of which a snapshot goes with it.
    pub beside: Vec<Beside>,
}

/// A backup that is restorable.
#[derive(Debug)]
pub struct Done {
    pub head: BackupHead,
    pub elapsed: Duration,
    /// Bytes of files that were not read, because WAL summaries say that they are as in the last backup.
    pub unread: u64,
    /// Why every page was read; `None` when WAL summaries told what had changed.
    pub every_page: Option<String>,
    /// What has changed since the last backup though no page says so: some of it by name, and how much there is.
    pub behind_wal: (Vec<Stretch>, u64),
    /// Why there is no snapshot of a directory beside the database. The backup is sound without it.
    pub failed: Vec<Error>,
}

/// Takes a base backup of the running server.
pub async fn run(repository: &Repository, options: &Options, events: &Events) -> Result<Done> {
    let done = take(repository, options, events).await;
    if options.of_standby { done.map_err(standby::superseded) } else { done }
}

async fn take(repository: &Repository, options: &Options, events: &Events) -> Result<Done> {
    let began = repository.clock().monotonic();
    data_dir::refuse_partial(&options.data_dir)?;
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    let server = client.server().await?;
    check(&server, options)?;
    let control = ControlFile::read(&options.data_dir, server.version)?;
    if control.system_id != server.system_id {
        return Err(Error::refused(format!(
            "{} belongs to system {}, the server at this address is {}",
            options.data_dir.display(),
            control.system_id,
            server.system_id
        )));
    }
    let standby = match options.of_standby {
        true => Some(Standby::of(repository, &options.data_dir, server.version, options.generation).await?),
        false => None,
    };
    let (started_at, server_started) = (client.now().await?, client.started().await?);
    let system_id = server.system_id;
    let descent = |timeline, start| Descent { generation: options.generation, timeline, system_id, start };
    let look = async |timeline, start| {
        find_parent(repository, descent(timeline, start), server_started, options.full, events).await
    };
    // The server's checkpoint takes a while: the repository is looked at meanwhile.
    let looked = async {
        let newest = check_newest(repository, options.generation);
        // A full backup believes nothing that was stored before.
        let since = async { if options.full { Ok(None) } else { remains::since(repository).await } };
        // Where the backup starts is not known yet.
        tokio::try_join!(newest, look(control.timeline, Lsn(u64::MAX)), since)
    };
    let began_there = client.start_backup(server.version, "perennial", options.fast);
    let (start, ((), parent, since)) = tokio::try_join!(began_there, looked)?;
    // After a promotion the timeline shows there only with the next checkpoint: the one that has just been made.
    let before = control.timeline;
    let control = ControlFile::read(&options.data_dir, server.version)?;
    let is_ahead = parent.as_ref().is_some_and(|parent| parent.ends_behind(start));
    let mut parent =
        if control.timeline == before && !is_ahead { parent } else { look(control.timeline, start).await? };
    if let Some(standby) = &standby {
        standby.check().await?;
    }
    let nonce = u16::from_le_bytes(repository.clock().random());
    let id = BackupId { generation: options.generation, start, nonce };

    let now = summaries::Moment::beginning(&control, start, server_started);
    let clock_and_events = (repository.clock(), events);
    let announced = Remains::announce(repository, id, since, events);
    let built_on = parent.as_ref().filter(|parent| !parent.compared_only).map(|parent| (parent.id, parent.full_at));
    let compared = parent.as_ref().map(|parent| parent.id);
    let (outside, remains, every_page) =
        tokio::try_join!(outside_files(&client, &options.data_dir), announced, async {
            Ok(summaries::ask(&client, server.version, parent.as_mut(), &now, clock_and_events).await)
        })?;
    if options.of_standby
        && let Err(refused) = standby::hold_wal(repository, id).await
    {
        // Nothing of it is there yet, and nothing need be kept for it.
        repository.backup_ended(id).await?;
        return Err(refused);
    }
    let walk = data_dir::walk(&options.data_dir, server.version, control.catalog_version)?;
    announce(events, id, start, &walk);
    let (data_checksums, max_rate) = (control.data_checksums, options.max_rate);
    let task = copy::Task { repository, id, start, data_checksums, remains: Some(&remains), max_rate };
    let own_dir = options.data_dir.join(data_dir::OWN_DIR);
    if let Some(parent) = &mut parent {
        parent.piece_sums = sums_of(repository, &own_dir, parent.id).await?;
    }
    let mut sums = piece_sums::Writer::begin(&own_dir, repository.descriptor().repository_id, id);
    let before_and_now = (parent, sums.as_mut().ok());
    let copied = copy::run(&task, &walk, &outside, before_and_now, server.version, events).await?;
    if copied.found > 0 {
        events.info(format!("{} were there already, of a backup that did not end", human_bytes(copied.found)));
    }
    let place = beside::Place { backup: id, generation: id.generation, timeline: control.timeline };
    let mut failed = besides(&task, options, place, &client, events).await?;
    let databases = client.databases().await?;
    let stopped = client.stop_backup(server.version).await?;
    let needed = wait::Needed {
        generation: options.generation,
        timeline: control.timeline,
        start,
        stop: stopped.lsn,
        size: control.segment_size,
        system_id: server.system_id,
    };
    let end = match standby {
        Some(standby) => Some(standby.end(needed, &client, options.wal_timeout).await?),
        None => None,
    };
    // The session must live until the stop: a backup ends with the session that began it.
    drop(client);
    report_damage(&copied, compared, options, events)?;
    let behind_wal = (copied.behind_wal.clone(), copied.stretches_behind_wal);
    let unread = copied.unread;

    let last_commit = match end {
        Some(end) => end.for_wal(options.wal_timeout, events).await?,
        None => wait::for_wal(repository, &needed, options.wal_timeout, events).await.map(|()| None)?,
    };
    // A restore to a time starts from a backup that ended before it: what one has of later commits cannot be taken back.
    let stopped = Stopped { at: stopped.at.max(last_commit.unwrap_or(stopped.at)), ..stopped };
    let head = commit(
        repository,
        &task,
        (&server, &control),
        (&walk, databases),
        (copied, built_on),
        (started_at, server_started, stopped),
    )
    .await?;
    failed.extend(keep_locked(repository, &head, events).await);
    if let Err(error) = sums.and_then(piece_sums::Writer::keep) {
        events.warning(piece_sums::lost(&error));
    }
    let elapsed = repository.clock().monotonic() - began;
    let read = head.bytes.saturating_sub(unread);
    events.emit(Event::BackupDone { id, read, unread, stored: head.stored, elapsed });
    Ok(Done { head, elapsed, unread, every_page, behind_wal, failed })
}

/// Where what is stored is locked for a time: renews that for what is written once, and says when what the backup shares with older
/// ones is about to lose it.
async fn keep_locked(repository: &Repository, head: &BackupHead, events: &Events) -> Option<Error> {
    let keep = repository.store().locks()?;
    let almost = repository.clock().now().earlier_by(keep / 4 * 3);
    if let Some(full_at) = head.full_at.filter(|full_at| *full_at < almost) {
        events.warning(format!("some of what the backup needs has been locked since {} only for as long as --lock says: take a full backup (--full, --full-every)", full_at.short()));
    }
    let error = repository.renew_locks(&layout::manifest(head.backup_id)).await.err()?;
    let hint = error.hint_text().map(|hint| format!(" (hint: {hint})")).unwrap_or_default();
    events
        .alarm(format!("what a restore needs besides the backup may be deleted once its lock runs out: {error}{hint}"));
    Some(error)
}

/// What the pages of a backup were, if this disk has kept that: one look for each file there is.
async fn sums_of(repository: &Repository, own_dir: &Path, backup: BackupId) -> Result<Option<Arc<PieceSums>>> {
    let (own_dir, repository_id) = (own_dir.to_owned(), repository.descriptor().repository_id);
    let look = move || PieceSums::of(&own_dir, repository_id, backup).map(Arc::new);
    tokio::task::spawn_blocking(look).await.map_err(|e| Error::internal("a reading thread ended").source(e))
}

/// Snapshots of what lies beside the database. A directory that cannot be read is no reason to have no backup.
async fn besides(
    task: &copy::Task<'_>,
    options: &Options,
    place: beside::Place,
    client: &Client,
    events: &Events,
) -> Result<Vec<Error>> {
    let mut failed = Vec::new();
    for directory in &options.beside {
        // What an application has put there of a commit, it has put there after the commit.
        let position = async || Ok((client.inserted().await?, client.now_of_commits().await?));
        let means = beside::Means {
            remains: task.remains,
            max_rate: task.max_rate,
            leaves_sparse_packs: true,
            full: options.full,
        };
        match beside::take(task.repository, directory, (place, means), position, events).await {
            Ok(_) => (),
            Err(error) if error.kind() == Kind::Fenced => return Err(error),
            Err(error) => {
                events.alarm(format!("no snapshot of '{}' goes with the backup: {error}", directory.name));
                failed.push(error);
            }
        }
    }
    Ok(failed)
}

/// A last backup that cannot be read must not stand in the way of a new one.
async fn find_parent(
    repository: &Repository,
    descent: Descent,
    server_started: Timestamp,
    full: bool,
    events: &Events,
) -> Result<Option<Parent>> {
    let found = async {
        let mut parent = Parent::find(repository, descent, server_started).await?;
        match &mut parent {
            // A full backup believes nothing that was stored before.
            Some(parent) if full => parent.compared_only = true,
            Some(parent) => parent.leave_sparse_packs(repository).await?,
            None => (),
        }
        Ok::<_, Error>(parent)
    };
    match found.await {
        Err(error) if error.kind() == Kind::Damaged => {
            events.warning(format!("the last backup cannot be read, everything is stored anew: {error}"));
            Ok(None)
        }
        found => found,
    }
}

/// What was built on must not have been deleted meanwhile: from here on our manifest keeps it.
async fn still_there(repository: &Repository, parent: Option<BackupId>, packs: &[PackId]) -> Result<()> {
    let lost = |what: String| {
        Err(Error::refused(format!("{what} was deleted while the backup was under way")).hint("take it again"))
    };
    let (backups, there) = tokio::try_join!(repository.backup_ids(), repository.pack_ids())?;
    if let Some(id) = parent.filter(|id| !backups.contains(id)) {
        return lost(format!("backup {id}, on which this one builds,"));
    }
    match packs.iter().find(|pack| !there.contains(pack)) {
        Some(pack) => lost(format!("pack {pack}")),
        None => Ok(()),
    }
}

fn check(server: &Server, options: &Options) -> Result<()> {
    if !same_directory(&server.data_directory, &options.data_dir)? {
        return Err(Error::refused(format!(
            "the server at this address runs in {}, not in {}",
            server.data_directory.display(),
            options.data_dir.display()
        ))
        .hint("name the right directory with -D, or the right server with PGHOST and PGPORT"));
    }
    if server.in_recovery != options.of_standby {
        let (is, was) =
            if server.in_recovery { ("in recovery", "a primary's") } else { ("no standby any more", "a standby's") };
        return Err(Error::refused(format!("the server is {is}, and its directory was {was}"))
            .hint("run it again once that has settled"));
    }
    if !server.archiving && !options.of_standby {
        return Err(Error::refused("nothing brings this server's WAL to the repository, and without it a backup cannot be restored")
            .hint("start the server with `perennial run`, or set archive_mode = on and archive_command = 'perennial wal push \"%p\"'"));
    }
    Ok(())
}

fn announce(events: &Events, id: BackupId, start: Lsn, walk: &Walk) {
    for what in &walk.left_out {
        events.emit(Event::Note { level: Level::Warning, text: format!("left out of the backup: {what}") });
    }
    let (files, bytes) = walk.files().fold((0, 0), |(files, bytes), file| (files + 1, bytes + file.size));
    events.emit(Event::BackupStarted { id, start, files, bytes });
}

/// Configuration files outside the data directory (Debian keeps them in /etc), saved beside the data.
async fn outside_files(client: &Client, data_dir: &Path) -> Result<Vec<FileItem>> {
    use std::os::unix::fs::MetadataExt;
    let inside = std::fs::canonicalize(data_dir).on("resolve", data_dir)?;
    let mut outside = Vec::new();
    for path in client.configuration_files().await? {
        let path = match std::fs::canonicalize(&path) {
            Ok(path) => path,
            // The server names files that need not be there, such as an hba_file that was moved since its start.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e).on("resolve", &path),
        };
        let metadata = std::fs::metadata(&path).on("stat", &path)?;
        let name = path.to_str().ok_or_else(|| Error::refused(format!("{}: the name is not UTF-8", path.display())))?;
        if !path.starts_with(&inside) && metadata.is_file() {
            outside.push(FileItem {
                path: name.to_owned(),
                source: path.clone(),
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                size: metadata.len(),
                mtime: metadata.mtime(),
                first_block: None,
                pages_have_lsn: false,
            });
        }
    }
    Ok(outside)
}

fn report_damage(copied: &Copied, compared: Option<BackupId>, options: &Options, events: &Events) -> Result<()> {
    for Stretch { file, first_block, last_block } in copied.behind_wal.iter().cloned() {
        events.emit(Event::ChangedBehindWal { file, first_block, last_block });
    }
    for page in &copied.damaged {
        events.emit(Event::PageDamaged { file: page.file.clone(), block: page.block });
    }
    let behind = copied.behind_wal.first().zip(compared);
    match (copied.damaged.first(), behind) {
        (Some(first), _) if options.fail_on_damage => Err(Error::damaged(format!(
            "{} pages fail their checksum, the first is {} block {}",
            copied.damaged_pages, first.file, first.block
        ))
        .hint("find what they hold with pg_amcheck; without --fail-on-damage the backup is taken and the pages are listed in it")),
        (_, Some((first, last_backup))) if options.fail_on_damage => Err(Error::damaged(format!(
            "{} stretches of files have changed since backup {last_backup} though no page says so, the first is {} from block {}",
            copied.stretches_behind_wal, first.file, first.first_block
        ))
        .hint("restore that backup elsewhere and compare; without --fail-on-damage this one is taken, with what the files hold now")),
        (damaged, behind) => {
            if let Some((_, last_backup)) = behind {
                let stretches = copied.stretches_behind_wal;
                events.emit(Event::StretchesBehindWal { stretches, last_backup });
            }
            if damaged.is_some() {
                let files: BTreeSet<&str> = copied.damaged.iter().map(|page| page.file.as_str()).collect();
                events.emit(Event::PagesDamaged { files: files.len() as u64, pages: copied.damaged_pages });
            }
            Ok(())
        }
    }
}

async fn commit(
    repository: &Repository,
    task: &copy::Task<'_>,
    (server, control): (&Server, &ControlFile),
    (walk, databases): (&Walk, Vec<(u32, String)>),
    (copied, built_on): (Copied, Option<(BackupId, Option<Timestamp>)>),
    (started_at, server_started, stopped): (Timestamp, Timestamp, Stopped),
) -> Result<BackupHead> {
    let mut writer = LinesWriter::new(repository.descriptor().codec);
    copied.packs.iter().try_for_each(|pack| writer.add(&Line::Pack(*pack)))?;
    for (oid, name) in databases {
        writer.add(&Line::Database(Database { oid, name }))?;
    }
    for item in &walk.items {
        if let Item::Dir { path, mode } = item {
            writer.add(&Line::Dir(Directory { path: path.clone(), mode: *mode }))?;
        }
    }
    let mut tablespaces = Vec::new();
    for found in &walk.tablespaces {
        let location = found.location.as_deref().map(|path| path.to_string_lossy().into_owned());
        if let Some(target) = &location {
            writer.add(&Line::Link(Link { path: format!("pg_tblspc/{}", found.oid), target: target.clone() }))?;
        }
        tablespaces.push(Tablespace { oid: found.oid, location });
    }
    let (mut files, mut bytes) = (0, 0);
    for file in copied.files {
        files += 1;
        bytes += file.size;
        writer.add(&Line::File(file))?;
    }
    let head = BackupHead {
        format: String::new(),
        write_id: WriteId(repository.clock().random()),
        backup_id: task.id,
        repository_id: repository.descriptor().repository_id,
        system_id: control.system_id,
        generation: task.id.generation,
        timeline: control.timeline,
        pg_major: server.version.major,
        pg_version: server.version_text.clone(),
        segment_size: control.segment_size,
        region_size: REGION,
        start_lsn: task.start,
        stop_lsn: stopped.lsn,
        started_at,
        stopped_at: stopped.at,
        server_started: Some(server_started),
        next_xid: stopped.next_xid,
        data_checksums: control.data_checksums,
        backup_label: stopped.backup_label,
        tablespace_map: stopped.tablespace_map,
        tablespaces,
        files,
        bytes,
        stored: copied.stored,
        packs: copied.packs.len() as u64,
        parent: built_on.map(|(parent, _)| parent),
        full_at: built_on.map_or(Some(started_at), |(_, full_at)| full_at),
        damaged: copied.damaged,
        damaged_pages: copied.damaged_pages,
        lines: Lines::none(),
    };
    let (head, body) = head.with(writer)?;
    make_visible(repository, &head, &body, &copied.packs).await?;
    Ok(head)
}

/// Puts the manifest, once all that it names is there to stay.
pub(crate) async fn make_visible(
    repository: &Repository,
    head: &BackupHead,
    body: &Body,
    packs: &[PackId],
) -> Result<()> {
    let id = head.backup_id;
    tokio::try_join!(check_newest(repository, id.generation), still_there(repository, head.parent, packs))?;
    repository.put_manifest(id, body).await?;
    if repository.has_tombstone(id).await? {
        return Err(Error::refused(format!("backup {id} was taken for dead, and deleted, before it was done"))
            .hint("one that takes longer than a week is; if no other machine has taken over, take it again"));
    }
    // Left behind it does no harm: the backup exists.
    let _ = repository.backup_ended(id).await;
    Ok(())
}

async fn check_newest(repository: &Repository, generation: Generation) -> Result<()> {
    let newest = repository.newest_generation().await?;
    match newest.filter(|newest| *newest > generation) {
        None => Ok(()),
        Some(newest) => Err(Error::new(
            Kind::Fenced,
            format!("generation {generation}, under which this server archives, was superseded by generation {newest}"),
        )
        .hint("another machine is the database now (`perennial list`): stop this server")),
    }
}

/// Whether a directory looks like one whose server is being backed up: used by `cli` for a clear message.
pub fn is_data_dir(path: &Path) -> Result<bool> {
    Ok(disk::read_if_there(&path.join("PG_VERSION"))?.is_some())
}
