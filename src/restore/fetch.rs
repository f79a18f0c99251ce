//! Bringing files back: frames are fetched in ranges that lie side by side in a pack, many at once, checked, and written
//! to their places in any order.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt;

use super::layout::{control_file_aside, inside, set_mode};
use super::outside;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, PackId};
use crate::postgres::control_file::CONTROL_FILE;
use crate::repository::codec::{Sha256, decompress_to};
use crate::repository::manifest::{Directory, FileEntry, Line, Region};
use crate::repository::{Repository, layout};

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
    pub files: Vec<FileEntry>,
}

impl Contents {
    pub async fn read(repository: &Repository, backup: BackupId) -> Result<Contents> {
        let mut contents = Contents::default();
        repository
            .read_manifest(backup, |line| {
                match line {
                    Line::Pack(pack) => contents.packs.push(pack),
                    Line::Dir(directory) => contents.directories.push(directory),
                    Line::File(file) => contents.files.push(file),
                    // Links are made from the head's list of tablespaces, which the operator may map.
                    Line::Link(_) | Line::End(_) => (),
                }
                Ok(())
            })
            .await?;
        contents.check(repository, backup)?;
        outside::place(&mut contents);
        Ok(contents)
    }

    fn check(&self, repository: &Repository, backup: BackupId) -> Result<()> {
        let wrong = |why: String| repository.corrupt(&layout::manifest(backup), why);
        for file in &self.files {
            let size: u64 = file.regions.iter().map(|region| u64::from(region.plain)).sum();
            if size != file.size {
                return Err(wrong(format!("the regions of {} hold {size} of {} bytes", file.path, file.size)));
            }
            if file.regions.iter().any(|region| region.frame.pack as usize >= self.packs.len()) {
                return Err(wrong(format!("{} names a pack that is not listed", file.path)));
            }
        }
        Ok(())
    }
}

/// One frame and where its content goes.
#[derive(Debug, Clone, Copy)]
struct Piece {
    file: usize,
    offset: u64,
    region: Region,
}

/// Frames of one pack that are fetched with one request.
#[derive(Debug)]
pub(super) struct Range {
    pub pack: PackId,
    pub start: u64,
    pub end: u64,
    pieces: Vec<Piece>,
}

pub async fn write_files(repository: &Repository, contents: &Contents, data_dir: &Path, events: &Events) -> Result<()> {
    let paths = contents
        .files
        .iter()
        .map(|file| Ok((place_of(data_dir, &file.path)?, file.mode)))
        .collect::<Result<Vec<_>>>()?;
    for (file, (path, mode)) in contents.files.iter().zip(&paths) {
        if file.regions.is_empty() {
            open(path, *mode)?;
        }
    }
    let total: u64 = contents.files.iter().map(|file| file.size).sum();
    let progress = Arc::new(Progress { total, done: AtomicU64::new(0), events: events.clone() });
    let paths = Arc::new(paths);
    let work: Vec<_> = ranges(contents)
        .into_iter()
        .map(|range| fetch_range(repository.clone(), range, Arc::clone(&paths), Arc::clone(&progress)))
        .collect();
    let mut work = futures::stream::iter(work).buffer_unordered(REQUESTS);
    while let Some(done) = work.next().await {
        done?;
    }
    Ok(())
}

fn place_of(data_dir: &Path, path: &str) -> Result<PathBuf> {
    if path == CONTROL_FILE { Ok(control_file_aside(data_dir)) } else { inside(data_dir, path) }
}

/// Sorts what is wanted by place in the packs and joins neighbours.
pub(super) fn ranges(contents: &Contents) -> Vec<Range> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (file, entry) in contents.files.iter().enumerate() {
        let mut offset = 0;
        for region in &entry.regions {
            pieces.push(Piece { file, offset, region: *region });
            offset += u64::from(region.plain);
        }
    }
    pieces.sort_by_key(|piece| (piece.region.frame.pack, piece.region.frame.offset));
    let mut ranges: Vec<Range> = Vec::new();
    for piece in pieces {
        let frame = piece.region.frame;
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
    ranges
}

async fn fetch_range(
    repository: Repository,
    range: Range,
    paths: Arc<Vec<(PathBuf, u32)>>,
    progress: Arc<Progress>,
) -> Result<()> {
    let bytes = repository.read_pack(range.pack, range.start..range.end).await?;
    let write = move || write_range(&repository, &range, &bytes, &paths, &progress);
    tokio::task::spawn_blocking(write).await.map_err(|e| Error::internal("a writing thread ended").source(e))?
}

/// Reads a range and checks every frame in it.
pub(super) async fn check_range(repository: Repository, range: Range) -> Result<()> {
    let bytes = repository.read_pack(range.pack, range.start..range.end).await?;
    let check = move || {
        let mut plain = Vec::new();
        range
            .pieces
            .iter()
            .try_for_each(|piece| unpack(&range, &bytes, piece, &mut plain))
            .map_err(|why| repository.corrupt(&layout::pack(range.pack), why))
    };
    tokio::task::spawn_blocking(check).await.map_err(|e| Error::internal("a checking thread ended").source(e))?
}

/// The content of one frame, if it is what the manifest says; otherwise why not.
fn unpack(range: &Range, bytes: &Bytes, piece: &Piece, plain: &mut Vec<u8>) -> std::result::Result<(), String> {
    let frame = piece.region.frame;
    let start = (frame.offset - range.start) as usize;
    let stored = &bytes[start..start + frame.stored as usize];
    if Sha256::of(stored) != frame.sha256 {
        return Err(format!("the checksum of the frame at {} does not hold", frame.offset));
    }
    decompress_to(stored, piece.region.plain as usize, plain)?;
    match crc32c::crc32c(plain) == piece.region.crc {
        true => Ok(()),
        false => Err(format!("the frame at {} does not hold what the manifest says", frame.offset)),
    }
}

fn write_range(
    repository: &Repository,
    range: &Range,
    bytes: &Bytes,
    paths: &[(PathBuf, u32)],
    progress: &Progress,
) -> Result<()> {
    let key = layout::pack(range.pack);
    let mut open_file: Option<(usize, File)> = None;
    let mut plain = Vec::new();
    for piece in &range.pieces {
        unpack(range, bytes, piece, &mut plain).map_err(|why| repository.corrupt(&key, why))?;
        let (path, mode) = &paths[piece.file];
        let file = match open_file.take().filter(|(number, _)| *number == piece.file) {
            Some((_, file)) => file,
            None => open(path, *mode)?,
        };
        file.write_all_at(&plain, piece.offset).on("write", path)?;
        if let Some(length) = std::num::NonZeroU64::new(plain.len() as u64) {
            // Starts writing back now, so that the sync at the end finds little left to do. Only a wish: errors show then.
            let _ = rustix::fs::fadvise(&file, piece.offset, Some(length), rustix::fs::Advice::DontNeed);
        }
        progress.add(plain.len() as u64);
        open_file = Some((piece.file, file));
    }
    Ok(())
}

fn open(path: &Path, mode: u32) -> Result<File> {
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
