//! Bringing files back: frames are fetched in ranges that lie side by side in a pack, many at once, checked, and written
//! to their places in any order.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt;

use super::delta::Have;
use super::layout::{control_file_aside, inside, set_mode};
use super::outside;
use super::sum::{Filled, Sum};
use crate::disk::Flusher;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, PackId};
use crate::postgres::control_file::CONTROL_FILE;
use crate::postgres::page::PAGE;
use crate::repository::codec::{Sha256, decompress_to};
use crate::repository::manifest::{Database, Directory, FileEntry, Line, Link, Pages, Region};
use crate::repository::pack::FrameRef;
use crate::repository::{BesideHead, Repository, layout};

/// Requests at once, and how much each asks for at most. The memory budget of a restore is twice their product and a
/// region for each, about 60 MB, besides the list of files.
pub(super) const REQUESTS: usize = 6;
const RANGE_MAX: u64 = 4 << 20;

/// Bytes between two wanted frames that are cheaper to read than to ask around.
const SKIP_MAX: u64 = 128 << 10;

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
                return Err(wrong(format!("a patch of {} replaces what is not there", file.path)));
            }
        }
        Ok(())
    }
}

/// One frame and where its content goes.
#[derive(Debug, Clone, Copy)]
struct Piece {
    file: usize,
    /// Of the region in the file.
    offset: u64,
    frame: FrameRef,
    part: Part,
}

/// What a frame holds of its region.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// All of it: so many bytes with this CRC-32C.
    Whole { plain: u32, crc: u32 },
    /// These pages, of which later frames have some too.
    Pages { held: Pages, wanted: Pages, sum: usize },
}

impl Part {
    fn plain(self) -> usize {
        match self {
            Part::Whole { plain, .. } => plain as usize,
            Part::Pages { held, .. } => held.count() as usize * PAGE,
        }
    }
}

/// All that is to be fetched.
#[derive(Debug)]
pub(super) struct Fetch {
    pub ranges: Vec<Range>,
    sums: Arc<Vec<Sum>>,
}

/// Frames of one pack that are fetched with one request.
#[derive(Debug)]
pub(super) struct Range {
    pub pack: PackId,
    pub start: u64,
    pub end: u64,
    pieces: Vec<Piece>,
}

/// Writes all files; of what is there already only the sizes and modes.
pub async fn write_files(
    repository: &Repository,
    contents: &Contents,
    have: &Have,
    data_dir: &Path,
    events: &Events,
) -> Result<()> {
    let place = |file: &FileEntry| Ok((place_of(data_dir, &file.path)?, file.mode));
    write_to(repository, contents, have, contents.files.iter().map(place).collect::<Result<_>>()?, events).await
}

/// The same for a directory without a control file.
pub async fn write_plain_files(repository: &Repository, contents: &Contents, directory: &Path) -> Result<()> {
    let place = |file: &FileEntry| Ok((inside(directory, &file.path)?, file.mode));
    let paths = contents.files.iter().map(place).collect::<Result<_>>()?;
    write_to(repository, contents, &Have::default(), paths, &Events::silent()).await
}

async fn write_to(
    repository: &Repository,
    contents: &Contents,
    have: &Have,
    paths: Vec<(PathBuf, u32)>,
    events: &Events,
) -> Result<()> {
    for (number, (file, (path, mode))) in contents.files.iter().zip(&paths).enumerate() {
        if file.regions.is_empty() {
            open(path, *mode)?;
        } else if (0..file.regions.len()).all(|region| have.has(number, region)) {
            set_mode(path, *mode)?;
        }
    }
    let progress = Progress { total: contents.bytes(), done: AtomicU64::new(have.bytes), events: events.clone() };
    let into = Arc::new(Into { paths, progress, flusher: Flusher::default(), given_up: AtomicBool::new(false) });
    let Fetch { ranges, sums } = plan(contents, have);
    let work: Vec<_> = ranges
        .into_iter()
        .map(|range| fetch_range(repository.clone(), range, Arc::clone(&sums), Some(Arc::clone(&into))))
        .collect();
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
    read_only.into_iter().try_for_each(|(path, mode)| set_mode(path, *mode))
}

/// The owner may write.
const WRITABLE: u32 = 0o200;

fn place_of(data_dir: &Path, path: &str) -> Result<PathBuf> {
    if path == CONTROL_FILE { Ok(control_file_aside(data_dir)) } else { inside(data_dir, path) }
}

/// Sorts what is wanted by place in the packs and joins neighbours.
pub(super) fn plan(contents: &Contents, have: &Have) -> Fetch {
    let (mut pieces, mut sums): (Vec<Piece>, Vec<Sum>) = (Vec::new(), Vec::new());
    for (file, entry) in contents.files.iter().enumerate() {
        let mut offset = 0;
        for (number, region) in entry.regions.iter().enumerate() {
            if !have.has(file, number) {
                add_region(&mut pieces, &mut sums, (file, offset), region);
            }
            offset += u64::from(region.plain);
        }
    }
    // Packs with patches first: a region is whole, and can be written to the disk in one go, when what they patch comes.
    let patches = contents.files.iter().flat_map(|file| &file.regions).flat_map(|region| &region.patches);
    let patching: HashSet<u32> = patches.map(|patch| patch.frame.pack).collect();
    pieces.sort_by_key(|piece| (!patching.contains(&piece.frame.pack), piece.frame.pack, piece.frame.offset));
    let mut ranges: Vec<Range> = Vec::new();
    for piece in pieces {
        let frame = piece.frame;
        let (pack, end) = (contents.packs[frame.pack as usize], frame.offset + u64::from(frame.stored));
        let joins = |range: &&mut Range| {
            range.pack == pack && frame.offset <= range.end + SKIP_MAX && end - range.start <= RANGE_MAX
        };
        match ranges.last_mut().filter(joins) {
            Some(range) => {
                range.end = range.end.max(end);
                range.pieces.push(piece);
            }
            None => ranges.push(Range { pack, start: frame.offset, end, pieces: vec![piece] }),
        }
    }
    Fetch { ranges, sums: Arc::new(sums) }
}

fn add_region(pieces: &mut Vec<Piece>, sums: &mut Vec<Sum>, (file, offset): (usize, u64), region: &Region) {
    if region.patches.is_empty() {
        let part = Part::Whole { plain: region.plain, crc: region.crc };
        return pieces.push(Piece { file, offset, frame: region.frame, part });
    }
    let sum = sums.len();
    let before = pieces.len();
    for (frame, held, wanted) in region.supplies() {
        if !wanted.is_empty() {
            pieces.push(Piece { file, offset, frame, part: Part::Pages { held, wanted, sum } });
        }
    }
    sums.push(Sum::new(region.crc, region.plain, pieces.len() - before));
}

/// Where files go.
struct Into {
    paths: Vec<(PathBuf, u32)>,
    progress: Progress,
    flusher: Flusher,
    /// What has not begun need not begin.
    given_up: AtomicBool,
}

/// Reads a range and checks every frame in it; writes what they hold, if told where to.
async fn fetch_range(repository: Repository, range: Range, sums: Arc<Vec<Sum>>, into: Option<Arc<Into>>) -> Result<()> {
    if into.as_ref().is_some_and(|into| into.given_up.load(Ordering::Relaxed)) {
        return Ok(());
    }
    let bytes = repository.read_pack(range.pack, range.start..range.end).await?;
    let take = move || take_range(&repository, &range, &bytes, &sums, into.as_deref());
    tokio::task::spawn_blocking(take).await.map_err(|e| Error::internal("a writing thread ended").source(e))?
}

/// A range that is read to be checked only.
pub(super) struct Check<F> {
    pub pack: PackId,
    /// How many it reads.
    pub bytes: u64,
    /// Where the frames in it begin.
    pub frames: Vec<u64>,
    pub outcome: F,
}

/// Checks of all ranges.
pub(super) fn checks(
    repository: &Repository,
    fetch: Fetch,
) -> impl Iterator<Item = Check<impl Future<Output = Result<()>>>> {
    let (repository, sums) = (repository.clone(), fetch.sums);
    fetch.ranges.into_iter().map(move |range| Check {
        pack: range.pack,
        bytes: range.end - range.start,
        frames: range.pieces.iter().map(|piece| piece.frame.offset).collect(),
        outcome: fetch_range(repository.clone(), range, Arc::clone(&sums), None),
    })
}

/// The content of one frame, if it is what the manifest says; otherwise why not.
fn unpack(range: &Range, bytes: &Bytes, piece: &Piece, plain: &mut Vec<u8>) -> std::result::Result<(), String> {
    let frame = piece.frame;
    let start = (frame.offset - range.start) as usize;
    let stored = &bytes[start..start + frame.stored as usize];
    if Sha256::of(stored) != frame.sha256 {
        return Err(format!("the checksum of the frame at {} does not hold", frame.offset));
    }
    decompress_to(stored, piece.part.plain(), plain)?;
    match piece.part {
        Part::Whole { crc, .. } if crc32c::crc32c(plain) != crc => {
            Err(format!("the frame at {} does not hold what the manifest says", frame.offset))
        }
        _ => Ok(()),
    }
}

/// Hands the wanted stretches of a frame's content over, each with its place in the region.
fn stretches(part: Part, plain: &[u8], mut take: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let Part::Pages { held, wanted, .. } = part else { return take(0, plain) };
    for (first, last) in wanted.runs() {
        let from = held.before(first) as usize * PAGE;
        take(first as usize * PAGE, &plain[from..from + (last - first + 1) as usize * PAGE])?;
    }
    Ok(())
}

fn take_range(repository: &Repository, range: &Range, bytes: &Bytes, sums: &[Sum], into: Option<&Into>) -> Result<()> {
    let key = layout::pack(range.pack);
    let mut open_file: Option<(usize, File)> = None;
    let mut plain = Vec::new();
    for piece in &range.pieces {
        unpack(range, bytes, piece, &mut plain).map_err(|why| repository.corrupt(&key, why))?;
        if let Some(into) = into {
            let file = match open_file.take().filter(|(number, _)| *number == piece.file) {
                Some((_, file)) => file,
                None => open(&into.paths[piece.file].0, into.paths[piece.file].1)?,
            };
            stretches(piece.part, &plain, |at, bytes| into.write(piece, &file, at, bytes))?;
            open_file = Some((piece.file, file));
        }
        let filled = match piece.part {
            Part::Whole { .. } => Filled::Wholly,
            Part::Pages { sum, .. } => {
                stretches(piece.part, &plain, |at, bytes| {
                    sums[sum].add(at, bytes);
                    Ok(())
                })?;
                sums[sum].frame_is_done()
            }
        };
        match (filled, into, &open_file) {
            (Filled::Wrongly, ..) => {
                let last = piece.frame.offset;
                let why = format!("a region whose last frame read is at {last} is not what the manifest says");
                return Err(repository.corrupt(&key, why));
            }
            (Filled::Wholly, Some(into), Some((_, file))) => into.region_is_written(piece, file, sums)?,
            _ => (),
        }
    }
    Ok(())
}

impl Into {
    fn write(&self, piece: &Piece, file: &File, at: usize, bytes: &[u8]) -> Result<()> {
        let offset = piece.offset + at as u64;
        file.write_all_at(bytes, offset).on("write", &self.paths[piece.file].0)?;
        self.progress.add(bytes.len() as u64);
        Ok(())
    }

    /// Counts towards the next sync on the way: all of a region at once, not its pages as they come.
    fn region_is_written(&self, piece: &Piece, file: &File, sums: &[Sum]) -> Result<()> {
        let length = match piece.part {
            Part::Whole { plain, .. } => plain as usize,
            Part::Pages { sum, .. } => sums[sum].plain(),
        };
        self.flusher.wrote(file, length as u64).on("sync", &self.paths[piece.file].0)
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
