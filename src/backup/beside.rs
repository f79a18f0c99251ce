//! Snapshots of directories beside the database. Nobody holds such a directory still while it is read: it is read again
//! until nothing in it has changed meanwhile, or said that it would not hold still.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::copy::{self, Copied, Task};
use super::parent::Parent;
use super::remains::Remains;
use super::{check_newest, still_there};
use crate::disk::{self, UncachedFile};
use crate::error::{Error, IoContext, Kind, Result};
use crate::events::Events;
use crate::model::{BackupId, Beside, ByteSize, Generation, Lsn, Timeline, Timestamp, WriteId, human_bytes};
use crate::postgres::data_dir::FileItem;
use crate::repository::manifest::{Directory, Line, Lines, LinesWriter, Link};
use crate::repository::{BesideHead, Repository, SET_ASIDE, UNFINISHED};

/// A directory is read this many times at most.
const PASSES: u32 = 4;

/// A file that was changed less than this long before it was looked at may change again without its time telling: it is
/// read the next time too. Timestamps move in steps of some milliseconds; and a page that is written to through a mapping
/// tells so only once it has been written back since, which Linux does within half a minute.
const SETTLED: std::time::Duration = std::time::Duration::from_secs(60);

/// Where a snapshot belongs.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub backup: BackupId,
    pub generation: Generation,
    pub timeline: Timeline,
}

/// What a snapshot has of the backup that it is taken with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Means<'a> {
    /// They may be named as long as that backup is under way.
    pub remains: Option<&'a Remains>,
    pub max_rate: Option<ByteSize>,
    /// Whether packs of which little is used are left behind: it takes time, which a stop does not have.
    pub leaves_sparse_packs: bool,
    /// Nothing that was stored before is built on.
    pub full: bool,
}

/// Takes a snapshot. `position` tells, once the directory has been read, where WAL is and what time. `None` when there is
/// nothing in the directory.
pub async fn take(
    repository: &Repository,
    beside: &Beside,
    (place, means): (Place, Means<'_>),
    position: impl AsyncFn() -> Result<(Lsn, Timestamp)>,
    events: &Events,
) -> Result<Option<BesideHead>> {
    if !aside(&beside.path, Found::has_content).await? {
        let path = beside.path.display();
        events.warning(format!("{path} has nothing in it: no snapshot is taken of '{}'", beside.name));
        return Ok(None);
    }
    let before = if means.full { Ok(None) } else { newest(repository, beside).await };
    let mut parent = match before {
        Err(error) if error.kind() == Kind::Damaged => {
            events.warning(format!("the last snapshot cannot be built on, everything is stored anew: {error}"));
            None
        }
        found => found?,
    };
    if let Some(parent) = parent.as_mut().filter(|_| means.leaves_sparse_packs) {
        parent.leave_sparse_packs(repository).await?;
    }
    let built_on = parent.as_ref().map(|parent| parent.id);
    let Means { remains, max_rate, .. } = means;
    let task = Task { repository, id: place.backup, start: Lsn(0), data_checksums: false, remains, max_rate };
    let look = |now| aside(&beside.path, move |top| Found::look(top, now));
    let mut found = look(repository.clock().now()).await?;
    let (mut stored, mut pass) = (0, 1);
    let (copied, changing) = loop {
        let copied = copy::files_only(&task, &found.files_with_marks(), (parent.take(), None)).await?;
        stored += copied.stored;
        let after = look(repository.clock().now()).await?;
        let changing = found.differences(&after);
        if changing == 0 || pass == PASSES {
            break (copied, changing);
        }
        parent = Some(Parent::of(place.backup, Lsn(0), &copied));
        (found, pass) = (after, pass + 1);
    };
    let (lsn, taken_at) = position().await?;
    for what in &found.left_out {
        events.warning(format!("left out of the snapshot of '{}': {what}", beside.name));
    }
    if changing > 0 {
        events.warning(format!(
            "'{}' did not hold still: {changing} files were changed each of the {PASSES} times it was read, and may be mixtures of two moments",
            beside.name
        ));
    }
    let head = BesideHead {
        format: String::new(),
        write_id: WriteId(repository.clock().random()),
        repository_id: repository.descriptor().repository_id,
        backup_id: place.backup,
        name: beside.name.clone(),
        path: beside.path.to_string_lossy().into_owned(),
        generation: place.generation,
        timeline: place.timeline,
        lsn,
        taken_at,
        files: copied.files.len() as u64,
        bytes: copied.files.iter().map(|file| file.size).sum(),
        stored,
        changing,
        lines: Lines::none(),
    };
    put(repository, &head, &found, copied, built_on).await?;
    events.info(format!(
        "'{}': {} files, {} ({} new), not ahead of {lsn}",
        head.name,
        head.files,
        human_bytes(head.bytes),
        human_bytes(head.stored)
    ));
    Ok(Some(head))
}

async fn newest(repository: &Repository, beside: &Beside) -> Result<Option<Parent>> {
    match repository.newest_beside(&beside.name).await? {
        Some(head) => Parent::beside(repository, &head).await.map(Some),
        None => Ok(None),
    }
}

async fn put(
    repository: &Repository,
    head: &BesideHead,
    found: &Found,
    copied: Copied,
    built_on: Option<BackupId>,
) -> Result<()> {
    let mut writer = LinesWriter::new(repository.descriptor().codec);
    copied.packs.iter().try_for_each(|pack| writer.add(&Line::Pack(*pack)))?;
    for (path, mode) in &found.directories {
        writer.add(&Line::Dir(Directory { path: path.clone(), mode: *mode }))?;
    }
    for (path, target) in &found.links {
        writer.add(&Line::Link(Link { path: path.clone(), target: target.clone() }))?;
    }
    for file in copied.files {
        writer.add(&Line::File(file))?;
    }
    let body = head.clone().with(writer)?;
    check_newest(repository, head.generation).await?;
    still_there(repository, built_on, &copied.packs).await?;
    repository.put_beside(&head.key(), &body).await
}

/// What is in a directory, by path from its top.
#[derive(Debug, Default)]
struct Found {
    directories: BTreeMap<String, u32>,
    links: BTreeMap<String, String>,
    /// Files, what changes whenever they are written to, and whether that can be relied on by now.
    files: BTreeMap<String, (FileItem, String, bool)>,
    left_out: Vec<String>,
}

impl Found {
    /// Whether there is anything to store. A directory that was not put back whole is refused.
    fn has_content(top: &Path) -> Result<bool> {
        if disk::is_there(&top.join(UNFINISHED))? {
            return Err(Error::refused(format!("{} was not put back whole", top.display()))
                .hint("start `perennial run` with it again, or remove the file in it that says so"));
        }
        disk::is_vacant_but(top, |name| name.starts_with(SET_ASIDE)).map(|vacant| !vacant)
    }

    fn look(top: &Path, now: Timestamp) -> Result<Found> {
        let mut found = Found::default();
        let mut todo = vec![String::new()];
        while let Some(below) = todo.pop() {
            let directory = top.join(&below);
            let entries = match std::fs::read_dir(&directory) {
                // It went since it was seen.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !below.is_empty() => continue,
                entries => entries.on("list directory", &directory).map_err(unreadable)?,
            };
            for entry in entries {
                let path = entry.on("list directory", &directory)?.path();
                let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                    found.left_out.push(format!("{} (its name is not UTF-8)", path.display()));
                    continue;
                };
                let name = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
                if let Some(directory) = found.add(&path, name, now)? {
                    todo.push(directory);
                }
            }
        }
        Ok(found)
    }

    /// Takes up one thing; a directory is given back, to be looked into.
    fn add(&mut self, path: &Path, name: String, now: Timestamp) -> Result<Option<String>> {
        let metadata = match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.on("stat", path).map_err(unreadable)?,
        };
        let mode = metadata.mode() & 0o7777;
        if metadata.is_dir() {
            // A file system makes the one of itself, a restore the other.
            if name != "lost+found" && !name.starts_with(SET_ASIDE) {
                self.directories.insert(name.clone(), mode);
                return Ok(Some(name));
            }
        } else if metadata.is_symlink() {
            match std::fs::read_link(path).on("read link", path)?.into_os_string().into_string() {
                Ok(target) => drop(self.links.insert(name, target)),
                Err(_) => self.left_out.push(format!("{} (what it points at is not UTF-8)", path.display())),
            }
        } else if metadata.is_file() {
            let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            let changed = nanos(metadata.ctime(), metadata.ctime_nsec());
            let birth = UncachedFile::open(path).map_err(unreadable)?.and_then(|file| file.birth());
            let mark = format!(
                "{}-{changed}-{}-{}",
                birth.as_deref().unwrap_or("unknown"),
                nanos(metadata.mtime(), metadata.mtime_nsec()),
                metadata.len()
            );
            let settled = changed / 1000 < i128::from(now.earlier_by(SETTLED).unix_micros());
            let item = FileItem {
                path: name.clone(),
                source: path.to_owned(),
                mode,
                uid: metadata.uid(),
                size: metadata.len(),
                mtime: metadata.mtime(),
                first_block: None,
                pages_have_lsn: false,
            };
            self.files.insert(name, (item, mark, settled && birth.is_some()));
        } else {
            self.left_out.push(format!("{} (a socket, a pipe or a device)", path.display()));
        }
        Ok(None)
    }

    fn files_with_marks(&self) -> Vec<(FileItem, Option<String>)> {
        let mark = |(file, mark, settled): &(FileItem, String, bool)| (file.clone(), settled.then(|| mark.clone()));
        self.files.values().map(mark).collect()
    }

    /// How many files, directories and links are not the same in both.
    fn differences(&self, other: &Found) -> u64 {
        let mark = |found: &Found, path: &String| found.files.get(path).map(|(_, mark, _)| mark.clone());
        let all = self.files.keys().chain(other.files.keys().filter(|path| !self.files.contains_key(*path)));
        let files = all.filter(|path| mark(self, path) != mark(other, path)).count() as u64;
        files + u64::from(self.directories != other.directories) + u64::from(self.links != other.links)
    }
}

/// On a thread of its own: a file system that hangs must not hold up whoever waits for something else.
async fn aside<T: Send + 'static>(top: &Path, look: impl FnOnce(&Path) -> Result<T> + Send + 'static) -> Result<T> {
    let top = top.to_owned();
    let looked = tokio::task::spawn_blocking(move || look(&top)).await;
    looked.map_err(|e| Error::internal("a looking thread ended").source(e))?
}

fn unreadable(error: Error) -> Error {
    error
        .hint("perennial runs as the owner of the data directory: let that user read it, for example by a common group")
}
