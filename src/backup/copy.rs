//! The pipeline: files → regions → frames → packs → bucket, everything at once, everything bounded.
//!
//! Regions are read and compressed on blocking threads, at most [`IN_FLIGHT_MAX`] at a time, and taken up in the order of
//! their files, so that a file's frames lie side by side in a pack and a restore can fetch them together.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use tokio::task::{JoinHandle, JoinSet};

use super::UPLOADS;
use super::region::{self, Job, Read};
use crate::disk::UncachedFile;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, Lsn, PackId, WriteId};
use crate::postgres::ControlFile;
use crate::postgres::client::Server;
use crate::postgres::control_file::{CONTROL_FILE, CONTROL_FILE_SIZE};
use crate::postgres::data_dir::{FileItem, Walk};
use crate::repository::Repository;
use crate::repository::manifest::{DAMAGED_MAX, DamagedPage, FileEntry, REGION, Region};
use crate::repository::pack::{FrameRef, PackBuilder};

/// Regions being read, compressed or waiting for their turn: two more than processors keep both disk and processors
/// busy, and no more than this. Each thread holds a region, a compressor and its buffer, about 5 MB.
pub const IN_FLIGHT_MAX: usize = 8;

fn in_flight() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).saturating_add(2).min(IN_FLIGHT_MAX)
}

/// The control file is read again this many times when its checksum does not hold: the server may be writing it.
const CONTROL_READS: u32 = 10;

/// Progress is told each time this many bytes were read.
const PROGRESS_STEP: u64 = 16 << 20;

#[derive(Debug)]
pub struct Task<'a> {
    pub repository: &'a Repository,
    pub id: BackupId,
    pub start: Lsn,
    pub server: &'a Server,
    pub control: &'a ControlFile,
    pub data_dir: &'a Path,
}

/// What the copy came to.
#[derive(Debug, Default)]
pub struct Copied {
    pub files: Vec<FileEntry>,
    pub packs: Vec<PackId>,
    pub stored: u64,
    pub damaged: Vec<DamagedPage>,
    pub damaged_pages: u64,
}

pub async fn run(task: &Task<'_>, walk: &Walk, outside: &[FileItem], events: &Events) -> Result<Copied> {
    let total = walk.files().map(|file| file.size).sum();
    let mut copy = Copy {
        task,
        events,
        owners: HashMap::new(),
        queue: VecDeque::new(),
        in_flight: in_flight(),
        copied: Copied::default(),
        pack: None,
        uploads: JoinSet::new(),
        done: 0,
        told: 0,
        total,
    };
    // The control file goes last: it must not be older than anything it describes.
    for file in walk.files().filter(|file| file.path != CONTROL_FILE) {
        copy.file(file, None).await?;
    }
    for file in outside {
        copy.file(file, Some(file.path.clone())).await?;
    }
    copy.drain(0).await?;
    let control = walk.files().find(|file| file.path == CONTROL_FILE);
    copy.control_file(control.ok_or_else(|| Error::damaged(format!("there is no {CONTROL_FILE}")))?).await?;
    copy.finish().await
}

/// Work handed out, in order: the first part of a file opens its entry, all parts add a region.
enum Part {
    /// A whole small file; `None` when it has vanished.
    Whole(FileEntry, JoinHandle<Result<Option<Read>>>),
    Opens(FileEntry),
    Region(JoinHandle<Result<Read>>),
}

struct Copy<'a> {
    task: &'a Task<'a>,
    events: &'a Events,
    owners: HashMap<u32, Option<String>>,
    queue: VecDeque<Part>,
    in_flight: usize,
    copied: Copied,
    pack: Option<PackBuilder>,
    uploads: JoinSet<Result<()>>,
    done: u64,
    told: u64,
    total: u64,
}

impl Copy<'_> {
    async fn file(&mut self, file: &FileItem, outside: Option<String>) -> Result<()> {
        let entry = self.entry(file, outside);
        if file.size <= REGION {
            return self.small_file(file, entry).await;
        }
        let source = file.source.clone();
        let Some(open) = blocking(move || UncachedFile::open(&source)).await? else { return Ok(()) };
        let open = Arc::new(open);
        // It may have grown since the walk; what comes after this moment is in WAL.
        let size = open.size()?;
        self.push(Part::Opens(FileEntry { size, ..entry })).await?;
        let mut offset = 0;
        while offset < size {
            let length = (size - offset).min(REGION) as usize;
            let job = self.job(Arc::clone(&open), file, offset, length);
            self.push(Part::Region(tokio::task::spawn_blocking(move || region::read(&job)))).await?;
            offset += length as u64;
        }
        Ok(())
    }

    async fn small_file(&mut self, file: &FileItem, entry: FileEntry) -> Result<()> {
        let source = file.source.clone();
        let (first_block, start, codec) =
            (self.checked_block(file), self.task.start, self.task.repository.descriptor().codec);
        let work = move || {
            let Some(open) = UncachedFile::open(&source)? else { return Ok(None) };
            let length = open.size()?.min(REGION) as usize;
            let job = Job { file: Arc::new(open), offset: 0, length, first_block, start, codec };
            region::read(&job).map(Some)
        };
        self.push(Part::Whole(entry, tokio::task::spawn_blocking(work))).await
    }

    fn job(&self, open: Arc<UncachedFile>, file: &FileItem, offset: u64, length: usize) -> Job {
        let first_block = self.checked_block(file).map(|block| block + (offset / 8192) as u32);
        Job {
            file: open,
            offset,
            length,
            first_block,
            start: self.task.start,
            codec: self.task.repository.descriptor().codec,
        }
    }

    fn checked_block(&self, file: &FileItem) -> Option<u32> {
        file.first_block.filter(|_| self.task.control.data_checksums)
    }

    fn entry(&mut self, file: &FileItem, outside: Option<String>) -> FileEntry {
        let owner = self.owners.entry(file.uid).or_insert_with(|| {
            let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(file.uid));
            user.ok().flatten().map(|user| user.name)
        });
        FileEntry {
            path: match &outside {
                Some(path) => path.trim_start_matches('/').to_owned(),
                None => file.path.clone(),
            },
            mode: file.mode,
            owner: owner.clone(),
            size: file.size,
            mtime: file.mtime,
            outside,
            regions: Vec::new(),
        }
    }

    async fn push(&mut self, part: Part) -> Result<()> {
        self.queue.push_back(part);
        self.drain(self.in_flight).await
    }

    /// Takes up parts until at most `left` are in flight.
    async fn drain(&mut self, left: usize) -> Result<()> {
        while self.queue.len() > left {
            let Some(part) = self.queue.pop_front() else { break };
            match part {
                Part::Opens(entry) => self.copied.files.push(entry),
                Part::Region(read) => {
                    let read = joined(read).await?;
                    self.take(read).await?;
                }
                Part::Whole(entry, read) => {
                    if let Some(read) = joined(read).await? {
                        self.copied.files.push(FileEntry { size: u64::from(read.plain), ..entry });
                        self.take(read).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds a region to the newest file and to the pack.
    async fn take(&mut self, read: Read) -> Result<()> {
        self.done += u64::from(read.plain);
        if self.done >= self.told + PROGRESS_STEP {
            self.told = self.done;
            self.events.emit(Event::BackupProgress { done: self.done.min(self.total), total: self.total });
        }
        if read.plain == 0 {
            return Ok(());
        }
        let frame = self.add_to_pack(&read).await?;
        let Some(file) = self.copied.files.last_mut() else { return Err(Error::internal("a region without a file")) };
        file.regions.push(Region { frame, plain: read.plain, crc: read.crc });
        self.copied.damaged_pages += read.damaged.len() as u64;
        let room = DAMAGED_MAX.saturating_sub(self.copied.damaged.len());
        let named = read.damaged.iter().take(room).map(|block| DamagedPage { file: file.path.clone(), block: *block });
        self.copied.damaged.extend(named);
        Ok(())
    }

    async fn add_to_pack(&mut self, read: &Read) -> Result<FrameRef> {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => {
                let clock = self.task.repository.clock();
                let pack = PackBuilder::new(PackId(clock.random()), WriteId(clock.random()), self.task.id)?;
                self.copied.packs.push(pack.id);
                pack
            }
        };
        let number = (self.copied.packs.len() - 1) as u32;
        let offset = pack.add(read.frame.clone(), read.sha256);
        let frame = FrameRef { pack: number, offset, stored: read.frame.len() as u32, sha256: read.sha256 };
        if pack.is_full() {
            self.upload(pack).await?;
        } else {
            self.pack = Some(pack);
        }
        Ok(frame)
    }

    /// Sends a pack on its way; waits while [`UPLOADS`] are.
    async fn upload(&mut self, pack: PackBuilder) -> Result<()> {
        while self.uploads.len() >= UPLOADS {
            self.one_upload_ended().await?;
        }
        let (id, body) = pack.finish()?;
        self.copied.stored += body.len();
        let repository = self.task.repository.clone();
        self.uploads.spawn(async move { repository.put_pack(id, &body).await });
        Ok(())
    }

    async fn one_upload_ended(&mut self) -> Result<()> {
        match self.uploads.join_next().await {
            Some(ended) => ended.map_err(|e| Error::internal("an upload ended").source(e))?,
            None => Ok(()),
        }
    }

    async fn control_file(&mut self, file: &FileItem) -> Result<()> {
        let version = self.task.server.version;
        let mut outcome = Err(Error::internal("the control file was not read"));
        for _ in 0..CONTROL_READS {
            let bytes = std::fs::read(&file.source)
                .map_err(|e| Error::local(format!("could not read {}", file.source.display()), e))?;
            outcome = ControlFile::parse(&bytes, version).and_then(|_| match bytes.len() {
                CONTROL_FILE_SIZE => Ok(bytes),
                length => Err(Error::damaged(format!("{CONTROL_FILE} is {length} bytes long"))),
            });
            if outcome.is_ok() {
                break;
            }
            self.task.repository.clock().sleep(std::time::Duration::from_millis(20)).await;
        }
        let bytes = outcome.map_err(|e| e.context(self.task.data_dir.display()))?;
        let read = region::compress(&bytes, self.task.repository.descriptor().codec, Vec::new())?;
        let entry = self.entry(file, None);
        self.copied.files.push(FileEntry { size: bytes.len() as u64, ..entry });
        self.take(read).await
    }

    async fn finish(mut self) -> Result<Copied> {
        if let Some(pack) = self.pack.take() {
            self.upload(pack).await?;
        }
        while !self.uploads.is_empty() {
            self.one_upload_ended().await?;
        }
        self.events.emit(Event::BackupProgress { done: self.total, total: self.total });
        Ok(self.copied)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    joined(tokio::task::spawn_blocking(work)).await
}

async fn joined<T>(handle: JoinHandle<Result<T>>) -> Result<T> {
    handle.await.map_err(|e| Error::internal("a reading thread ended").source(e))?
}
