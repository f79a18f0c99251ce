//! Bringing files back: frames are fetched in ranges that lie side by side in a pack, many at once, checked, and written
//! to their places in any order.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::StreamExt;

use super::delta::Have;
use super::layout::{control_file_aside, inside, set_mode};
use super::outside;
use super::ranges::{Check, Piece, Range, plan};
use crate::disk::Flusher;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, PackId, RepositoryId};
use crate::postgres::control_file::CONTROL_FILE;
use crate::postgres::data_dir;
use crate::postgres::page::PAGE;
use crate::repository::codec::{Sha256, decompress_to};
use crate::repository::manifest::{Database, Directory, FileEntry, Line, Link, Patch, REGION, Region};
use crate::repository::pack::FrameRef;
use crate::repository::piece_sums::{Filler, lost};
use crate::repository::sums::Sums;
use crate::repository::{BesideHead, Repository, layout, patch};

/// Requests at once. The memory budget of a restore is their product with the most that each asks for, a region and opened
/// patches, and batches of patches: about 75 MB, besides the list of files.
pub(super) const REQUESTS: usize = 6;

/// Progress is told each time this many bytes were written.
const PROGRESS_STEP: u64 = 16 << 20;

/// A manifest, read.
#[derive(Debug, Default)]
pub struct Contents {
    pub packs: Vec<PackId>,
    pub directories: Vec<Directory>,
    /// Of a backup these are not made: the operator may map its tablespaces, which its head lists.
    pub links: Vec<Link>,
    pub files: Vec<FileEntry>,
    /// Of a backup: the databases of the cluster. One that was taken by an older version does not say.
    pub databases: Vec<Database>,
}

impl Contents {
    pub async fn read(repository: &Repository, backup: BackupId) -> Result<Contents> {
        let mut contents = Contents::default();
        repository
            .read_manifest(backup, |line| {
                contents.add(line);
                Ok(())
            })
            .await?;
        contents.check(repository, &layout::manifest(backup))?;
        outside::place(&mut contents);
        Ok(contents)
    }

    /// The same of a directory beside the database.
    pub async fn read_beside(repository: &Repository, head: &BesideHead) -> Result<Contents> {
        let mut contents = Contents::default();
        let key = head.key();
        repository
            .read_beside(&key, |line| {
                contents.add(line);
                Ok(())
            })
            .await?;
        contents.check(repository, &key)?;
        Ok(contents)
    }

    fn add(&mut self, line: Line) {
        match line {
            Line::Pack(pack) => self.packs.push(pack),
            Line::Dir(directory) => self.directories.push(directory),
            Line::Link(link) => self.links.push(link),
            Line::File(file) => self.files.push(file),
            Line::Database(database) => self.databases.push(database),
            Line::End(_) => (),
        }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    fn check(&self, repository: &Repository, key: &str) -> Result<()> {
        let wrong = |why: String| repository.corrupt(key, why);
        for file in &self.files {
            let size: u64 = file.regions.iter().map(|region| u64::from(region.plain)).sum();
            if size != file.size {
                return Err(wrong(format!("the regions of {} hold {size} of {} bytes", file.path, file.size)));
            }
            let frames = file.regions.iter().flat_map(Region::frames);
            if frames.into_iter().any(|frame| frame.pack as usize >= self.packs.len()) {
                return Err(wrong(format!("{} names a pack that is not listed", file.path)));
            }
            if !file.regions.iter().all(Region::is_sound) {
                return Err(wrong(format!("{} has a region that cannot be", file.path)));
            }
        }
        Ok(())
    }
}

/// Writes all files; of what is there already only the sizes and modes.
pub async fn write_files(
    repository: &Repository,
    contents: &Contents,
    have: &Have,
    data_dir: &Path,
    (sums, events): (Option<Filler>, &Events),
) -> Result<()> {
    let place = |file: &FileEntry| Ok((place_of(data_dir, &file.path)?, file.mode));
    let paths = contents.files.iter().map(place).collect::<Result<_>>()?;
    write_to(repository, contents, have, paths, (sums, events)).await
}

/// The same for a directory without a control file.
pub async fn write_plain_files(repository: &Repository, contents: &Contents, directory: &Path) -> Result<()> {
    let place = |file: &FileEntry| Ok((inside(directory, &file.path)?, file.mode));
    let paths = contents.files.iter().map(place).collect::<Result<_>>()?;
    write_to(repository, contents, &Have::default(), paths, (None, &Events::silent())).await
}

async fn write_to(
    repository: &Repository,
    contents: &Contents,
    have: &Have,
    paths: Vec<(PathBuf, u32)>,
    (sums, events): (Option<Filler>, &Events),
) -> Result<()> {
    for (number, (file, (path, mode))) in contents.files.iter().zip(&paths).enumerate() {
        if file.regions.is_empty() {
            open(path, *mode)?;
        } else if (0..file.regions.len()).all(|region| have.has(number, region)) {
            set_mode(path, *mode)?;
        }
    }
    let progress = Progress { total: contents.bytes(), done: AtomicU64::new(have.bytes), events: events.clone() };
    let (flusher, given_up) = (Flusher::default(), AtomicBool::new(false));
    let writing = paths.iter().map(|_| Mutex::default()).collect();
    let into = Arc::new(Into { paths, writing, progress, flusher, sums, given_up });
    let ranges = plan(contents, have);
    let work: Vec<_> =
        ranges.into_iter().map(|range| fetch_range(repository.clone(), range, Some(Arc::clone(&into)))).collect();
    let mut work = futures::stream::iter(work).buffer_unordered(REQUESTS);
    // Threads that write cannot be stopped: whoever goes on in this directory after an error must not meet them.
    let mut outcome = Ok(());
    while let Some(done) = work.next().await {
        if done.is_err() && outcome.is_ok() {
            into.given_up.store(true, Ordering::Relaxed);
            outcome = done;
        }
    }
    drop(work);
    outcome?;
    into.flusher.end().map_err(|e| Error::local("could not sync what was restored", e))?;
    // What its owner must not write to could not be filled with that mode.
    let read_only = into.paths.iter().filter(|(_, mode)| mode & WRITABLE == 0);
    read_only.into_iter().try_for_each(|(path, mode)| set_mode(path, *mode))?;
    let sums = Arc::into_inner(into).and_then(|into| into.sums);
    if let Some(Err(error)) = sums.map(Filler::keep) {
        events.warning(lost(&error));
    }
    Ok(())
}

/// To be filled with the hashes of all pieces, for the next backup there.
pub(super) fn piece_sums(own_dir: &Path, whose: (RepositoryId, BackupId), contents: &Contents) -> Result<Filler> {
    let pages = |file: &FileEntry| match data_dir::pages_have_lsn(&file.path) && file.size.is_multiple_of(PAGE as u64) {
        true => u32::try_from(file.size / PAGE as u64).unwrap_or(0),
        false => 0,
    };
    Filler::begin(own_dir, whose, contents.files.iter().map(|file| (file.path.as_str(), pages(file))))
}

/// The owner may write.
const WRITABLE: u32 = 0o200;

fn place_of(data_dir: &Path, path: &str) -> Result<PathBuf> {
    if path == CONTROL_FILE { Ok(control_file_aside(data_dir)) } else { inside(data_dir, path) }
}

/// Where files go.
struct Into {
    paths: Vec<(PathBuf, u32)>,
    /// Held while a file is written to. Its file system lets but one thread do that, and has the others spin meanwhile.
    writing: Vec<Mutex<()>>,
    progress: Progress,
    flusher: Flusher,
    /// What the next backup wants to know.
    sums: Option<Filler>,
    /// What has not begun need not begin.
    given_up: AtomicBool,
}

/// Reads a range and checks all that is in it.
pub(super) async fn check_range(repository: &Repository, range: Range) -> Result<()> {
    fetch_range(repository.clone(), range, None).await
}

/// Reads a range and checks every frame in it; writes what they hold, if told where to.
async fn fetch_range(repository: Repository, range: Range, into: Option<Arc<Into>>) -> Result<()> {
    if into.as_ref().is_some_and(|into| into.given_up.load(Ordering::Relaxed)) {
        return Ok(());
    }
    let patches = Arc::clone(&range.patches);
    let bytes = tokio::try_join!(range.span.read(&repository), patches.fetch_all(&repository))?.0;
    let take = move || take_range(&repository, &range, &bytes, into.as_deref());
    tokio::task::spawn_blocking(take).await.map_err(|e| Error::internal("a writing thread ended").source(e))?
}

fn take_range(repository: &Repository, range: &Range, bytes: &Bytes, into: Option<&Into>) -> Result<()> {
    let mut open_file: Option<(usize, File)> = None;
    let (mut plain, mut opened) = (Vec::new(), Opened::default());
    for piece in &range.pieces {
        let stored = range.span.frame(bytes, piece.frame);
        let content = check_frame(&stored, piece.frame).and_then(|()| match &piece.check {
            Check::Region { plain: length, .. } => decompress_to(&stored, *length as usize, &mut plain),
            Check::Frame => Ok(()),
        });
        content.map_err(|why| repository.corrupt(&layout::pack(range.span.pack), why))?;
        let Check::Region { crc, patches: over, .. } = &piece.check else { continue };
        for patch in over.iter() {
            let (pack, stored) = range.patches.get(patch.frame)?;
            let applied = opened.content(stored, patch).and_then(|content| patch::apply(content, &mut plain));
            applied.map_err(|why| repository.corrupt(&layout::pack(*pack), why))?;
        }
        // The next backup wants sums of each piece and page, and theirs add up to the region's.
        let filler = into.and_then(|into| into.sums.as_ref());
        let sums = filler.and_then(|filler| filler.sums(piece.file, &plain));
        if sums.as_ref().map_or_else(|| crc32c::crc32c(&plain), Sums::crc) != *crc {
            let (key, at, with) = (layout::pack(range.span.pack), piece.frame.offset, over.len());
            let why = format!("the region at {at}, with its {with} patches, is not what the manifest says");
            return Err(repository.corrupt(&key, why));
        }
        if let Some(into) = into {
            let file = match open_file.take().filter(|(number, _)| *number == piece.file) {
                Some((_, file)) => file,
                None => open(&into.paths[piece.file].0, into.paths[piece.file].1)?,
            };
            into.write(piece, &file, &plain)?;
            if let Some((filler, sums)) = filler.zip(sums) {
                filler.region(piece.file, piece.offset / REGION, &sums);
            }
            open_file = Some((piece.file, file));
        }
    }
    Ok(())
}

/// What frames with patches of several regions hold: of each pack the one that was needed last, because the next region needs
/// it too.
#[derive(Default)]
struct Opened {
    shared: HashMap<u32, (u64, Vec<u8>)>,
    alone: Vec<u8>,
}

impl Opened {
    /// Bytes that stay: of each of a region's patches a frame, of 96 kB at most.
    const MAX: usize = 3 << 20;

    /// A patch, of the frame as it is stored.
    fn content(&mut self, stored: &[u8], patch: &Patch) -> std::result::Result<&[u8], String> {
        let (frame, length) = (patch.frame, patch.content as usize);
        if patch.plain == patch.content {
            check_frame(stored, frame)?;
            decompress_to(stored, length, &mut self.alone)?;
            return Ok(&self.alone);
        }
        if self.shared.get(&frame.pack).is_none_or(|(offset, _)| *offset != frame.offset) {
            self.shared.remove(&frame.pack);
            if self.shared.values().map(|(_, content)| content.capacity()).sum::<usize>() > Opened::MAX {
                self.shared.clear();
            }
            let mut content = Vec::new();
            check_frame(stored, frame)?;
            decompress_to(stored, length, &mut content)?;
            self.shared.insert(frame.pack, (frame.offset, content));
        }
        let content = self.shared.get(&frame.pack).and_then(|(_, content)| patch.of(content));
        content.ok_or_else(|| "a patch is longer than its frame".to_owned())
    }
}

/// Whether a frame is the one that the manifest names; otherwise why not.
fn check_frame(stored: &[u8], frame: FrameRef) -> std::result::Result<(), String> {
    match Sha256::of(stored) == frame.sha256 {
        true => Ok(()),
        false => Err(format!("the checksum of the frame at {} does not hold", frame.offset)),
    }
}

impl Into {
    fn write(&self, piece: &Piece, file: &File, bytes: &[u8]) -> Result<()> {
        let path = &self.paths[piece.file].0;
        let alone = self.writing[piece.file].lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all_at(bytes, piece.offset).on("write", path)?;
        drop(alone);
        self.progress.add(bytes.len() as u64);
        self.flusher.wrote(file, bytes.len() as u64).on("sync", path)
    }
}

fn open(path: &Path, mode: u32) -> Result<File> {
    let mode = mode | WRITABLE;
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(path).on("create", path)?;
    set_mode(path, mode)?;
    Ok(file)
}

struct Progress {
    total: u64,
    done: AtomicU64,
    events: Events,
}

impl Progress {
    fn add(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        let now = before + bytes;
        if before / PROGRESS_STEP != now / PROGRESS_STEP || now == self.total {
            self.events.emit(Event::RestoreProgress { done: now, total: self.total });
        }
    }
}
