//! The pipeline: files → regions → frames → packs → bucket, everything at once, everything bounded.
//!
//! Regions are read and compressed on blocking threads, at most [`IN_FLIGHT_MAX`] at a time, and taken up in the order of
//! their files, so that a file's frames lie side by side in a pack and a restore can fetch them together.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::UPLOADS;
use super::changes::FileChanges;
use super::gather::{Gathered, Places};
use super::parent::Parent;
use super::rate::Rate;
use super::region::{self, Content, Job, Known, Packed, Read};
use super::remains::Remains;
use super::workers::{Answer, Workers, answer};
use crate::disk::UncachedFile;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::model::{BackupId, ByteSize, Lsn, PackId, WriteId};
use crate::postgres::control_file::{CONTROL_FILE, CONTROL_FILE_SIZE};
use crate::postgres::data_dir::{self, FileItem, Walk};
use crate::postgres::page::PAGE;
use crate::postgres::{ControlFile, Version};
use crate::repository::Repository;
use crate::repository::manifest::{DAMAGED_MAX, DamagedPage, FileEntry, REGION, Region};
use crate::repository::pack::{FrameRef, PackBuilder};
use crate::repository::piece_sums::{PieceSums, Writer};
use crate::repository::sums::Hash;

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

/// On whose behalf files are read.
#[derive(Debug)]
pub struct Task<'a> {
    pub repository: &'a Repository,
    pub id: BackupId,
    pub start: Lsn,
    pub data_checksums: bool,
    pub remains: Option<&'a Remains>,
    /// Bytes a second that may be read.
    pub max_rate: Option<ByteSize>,
}

/// What the copy came to.
#[derive(Debug, Default, Clone)]
pub struct Copied {
    pub files: Vec<FileEntry>,
    /// All that are needed: new ones, and those of the last backup that have what has not changed.
    pub packs: Vec<PackId>,
    /// Bytes of the new ones, and of frames that a backup which was cut off had put already.
    pub stored: u64,
    pub found: u64,
    /// Bytes that were not read.
    pub unread: u64,
    pub damaged: Vec<DamagedPage>,
    pub damaged_pages: u64,
    /// Where the content is another one than in the last backup though no page says that it was changed: up to as many as
    /// pages that are damaged, and how many there are.
    pub behind_wal: Vec<Stretch>,
    pub stretches_behind_wal: u64,
}

/// Blocks of a relation that lie side by side in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    pub file: String,
    pub first_block: u32,
    pub last_block: u32,
}

pub async fn run(
    task: &Task<'_>,
    walk: &Walk,
    outside: &[FileItem],
    (parent, sums): (Option<Parent>, Option<&mut Writer>),
    version: Version,
    events: &Events,
) -> Result<Copied> {
    let total = walk.files().map(|file| file.size).sum();
    let mut copy = Copy::new(task, (parent, sums), total, events)?;
    // The control file goes last: it must not be older than anything it describes.
    for file in walk.files().filter(|file| file.path != CONTROL_FILE) {
        copy.file(file, None, None).await?;
    }
    for file in outside {
        copy.file(file, Some(file.path.clone()), None).await?;
    }
    copy.drain_all().await?;
    let control = walk.files().find(|file| file.path == CONTROL_FILE);
    let control = control.ok_or_else(|| Error::damaged(format!("there is no {CONTROL_FILE}")))?;
    copy.control_file(control, version).await?;
    copy.finish().await
}

/// Files alone, without a server; each with a mark that changes whenever it is written to, if there is one: a file that
/// had the same one in the last snapshot is not read again.
pub async fn files_only(
    task: &Task<'_>,
    files: &[(FileItem, Option<String>)],
    (parent, sums): (Option<Parent>, Option<&mut Writer>),
) -> Result<Copied> {
    let events = Events::silent();
    let mut copy = Copy::new(task, (parent, sums), 0, &events)?;
    for (file, mark) in files {
        copy.file(file, None, mark.clone()).await?;
    }
    copy.finish().await
}

/// A small file, read, and its birth.
type Small = (Read, Option<String>);

/// Work handed out, in order: the first part of a file opens its entry, all parts add a region.
enum Part {
    /// A whole small file and its birth; `None` when it has vanished.
    Whole(FileEntry, Answer<Option<Small>>),
    /// As the last snapshot has it.
    Known(FileEntry),
    /// And how many pages it has, if it is made of pages.
    Opens(FileEntry, u32),
    Region(Answer<Read>),
    /// A frame with patches of regions that were added before it.
    Patches(Answer<Packed>, Places),
}

/// A file as the last backup has it.
struct Past {
    entry: FileEntry,
    /// Where that backup began, if the file's pages say when they were changed.
    pages_since: Option<Lsn>,
    /// Every change of a page has moved its position: without checksums, hints are set behind its back.
    exact: bool,
    sums: Option<Arc<PieceSums>>,
    /// What WAL says has changed, if it does.
    changes: Option<FileChanges>,
    /// Packs that are not named any more.
    left: Arc<BTreeSet<u32>>,
    compared_only: bool,
}

impl Past {
    fn region(&self, number: u64, birth: Option<&str>) -> Option<Known> {
        let same_file = birth.is_some() && birth == self.entry.birth.as_deref();
        let region = self.entry.regions.get(usize::try_from(number).ok()?)?;
        Some(Known {
            region: region.clone(),
            pages_since: self.pages_since,
            sums: self.sums.as_ref().and_then(|sums| sums.region(&self.entry.path, number)),
            exact: self.exact && same_file,
            untouched: self.changes.as_ref().is_some_and(|changes| changes.is_untouched(number)),
            begins_relation: number == 0 && data_dir::first_block(&self.entry.path) == Some(0),
            compared_only: self.compared_only || region.is_in_any(&self.left),
        })
    }
}

/// What a pack holds: whole regions or patches. So neither lies in between for whoever fetches the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Holds {
    Regions,
    Patches,
}

struct Copy<'a> {
    task: &'a Task<'a>,
    events: &'a Events,
    parent: Option<Parent>,
    hash: Hash,
    /// For the next backup.
    sums: Option<&'a mut Writer>,
    /// The place of each pack in the list.
    numbers: HashMap<PackId, u32>,
    owners: HashMap<u32, Option<String>>,
    queue: VecDeque<Part>,
    workers: Workers,
    in_flight: usize,
    /// Patches that have no frame yet.
    gathered: Gathered,
    rate: Option<Rate>,
    copied: Copied,
    /// Packs that are not full.
    building: HashMap<Holds, PackBuilder>,
    uploads: JoinSet<Result<()>>,
    done: u64,
    told: u64,
    total: u64,
}

impl<'a> Copy<'a> {
    fn new(
        task: &'a Task<'a>,
        (parent, sums): (Option<Parent>, Option<&'a mut Writer>),
        total: u64,
        events: &'a Events,
    ) -> Result<Copy<'a>> {
        Ok(Copy {
            workers: Workers::start(in_flight())?,
            hash: Hash::of(task.repository.descriptor().repository_id),
            task,
            events,
            parent,
            sums,
            numbers: HashMap::new(),
            owners: HashMap::new(),
            queue: VecDeque::new(),
            in_flight: in_flight(),
            gathered: Gathered::default(),
            rate: task.max_rate.and_then(Rate::new),
            copied: Copied::default(),
            building: HashMap::new(),
            uploads: JoinSet::new(),
            done: 0,
            told: 0,
            total,
        })
    }

    async fn file(&mut self, file: &FileItem, outside: Option<String>, mark: Option<String>) -> Result<()> {
        let entry = FileEntry { mark, ..self.entry(file, outside) };
        if let Some((parent, past)) = self.parent.as_ref().and_then(|parent| Some((parent, parent.file(&file.path)?)))
            && past.mark.is_some()
            && past.mark == entry.mark
            && !past.regions.iter().any(|region| region.is_in_any(&parent.left))
        {
            let (size, regions) = (past.size, past.regions.clone());
            return self.push(Part::Known(FileEntry { size, regions, ..entry })).await;
        }
        if file.size <= REGION {
            return self.small_file(file, entry).await;
        }
        let source = file.source.clone();
        let Some(open) = answer(self.workers.run(move || UncachedFile::open(&source))).await? else { return Ok(()) };
        let open = Arc::new(open);
        // It may have grown since the walk; what comes after this moment is in WAL.
        let size = open.size()?;
        let birth = open.birth().filter(|_| file.pages_have_lsn);
        let pages = if file.pages_have_lsn && size.is_multiple_of(PAGE as u64) { size / PAGE as u64 } else { 0 };
        let opens = FileEntry { size, birth: birth.clone(), ..entry };
        self.push(Part::Opens(opens, u32::try_from(pages).unwrap_or(0))).await?;
        let past = self.past(file);
        let mut offset = 0;
        while offset < size {
            let length = (size - offset).min(REGION) as usize;
            let known = past.as_ref().and_then(|past| past.region(offset / REGION, birth.as_deref()));
            if known.as_ref().is_none_or(|known| known.unread(length).is_none()) {
                self.may_read(length as u64).await;
            }
            let job = self.job(Arc::clone(&open), file, offset, length, known);
            let read = self.workers.run(move || region::read(&job));
            self.push(Part::Region(read)).await?;
            offset += length as u64;
        }
        Ok(())
    }

    async fn small_file(&mut self, file: &FileItem, entry: FileEntry) -> Result<()> {
        let source = file.source.clone();
        let (first_block, start, codec) =
            (self.checked_block(file), self.task.start, self.task.repository.descriptor().codec);
        let hash = self.hash.clone();
        let (past, in_pages) = (self.past(file), file.pages_have_lsn);
        let work = move || {
            let Some(open) = UncachedFile::open(&source)? else { return Ok(None) };
            let length = open.size()?.min(REGION) as usize;
            let birth = open.birth().filter(|_| in_pages);
            let known = past.and_then(|past| past.region(0, birth.as_deref()));
            let job = Job { file: Arc::new(open), offset: 0, length, first_block, in_pages, start, codec, hash, known };
            Ok(Some((region::read(&job)?, birth)))
        };
        self.may_read(file.size).await;
        let read = self.workers.run(work);
        self.push(Part::Whole(entry, read)).await
    }

    /// Waits until so many bytes may be read.
    async fn may_read(&mut self, bytes: u64) {
        let Some(rate) = &mut self.rate else { return };
        let clock = self.task.repository.clock();
        let wait = rate.wait(bytes, clock.monotonic());
        if !wait.is_zero() {
            clock.sleep(wait).await;
        }
    }

    /// The file as the last backup has it.
    fn past(&self, file: &FileItem) -> Option<Past> {
        let parent = self.parent.as_ref()?;
        Some(Past {
            entry: parent.file(&file.path)?.clone(),
            pages_since: file.pages_have_lsn.then_some(parent.start),
            exact: parent.exact && self.task.data_checksums,
            sums: parent.piece_sums.clone(),
            changes: parent.changes_of(file),
            left: Arc::clone(&parent.left),
            compared_only: parent.compared_only,
        })
    }

    fn job(&self, open: Arc<UncachedFile>, file: &FileItem, offset: u64, length: usize, known: Option<Known>) -> Job {
        let first_block = self.checked_block(file).map(|block| block + (offset / 8192) as u32);
        Job {
            file: open,
            offset,
            length,
            first_block,
            in_pages: file.pages_have_lsn,
            start: self.task.start,
            codec: self.task.repository.descriptor().codec,
            hash: self.hash.clone(),
            known,
        }
    }

    fn checked_block(&self, file: &FileItem) -> Option<u32> {
        file.first_block.filter(|_| self.task.data_checksums)
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
            birth: None,
            mark: None,
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
                Part::Opens(entry, pages) => self.begin(entry, pages),
                Part::Known(mut entry) => {
                    let regions = std::mem::take(&mut entry.regions);
                    entry.regions = regions.into_iter().map(|region| self.adopt(region)).collect::<Result<_>>()?;
                    self.copied.files.push(entry);
                }
                Part::Region(read) => {
                    let read = answer(read).await?;
                    self.take(read).await?;
                }
                Part::Whole(entry, read) => {
                    if let Some((read, birth)) = answer(read).await? {
                        let pages = read.sums.as_ref().map_or(0, |_| read.plain / PAGE as u32);
                        self.begin(FileEntry { size: u64::from(read.plain), birth, ..entry }, pages);
                        self.take(read).await?;
                    }
                }
                Part::Patches(packed, places) => {
                    let frame = self.add_to_pack(answer(packed).await?, Holds::Patches).await?;
                    places.fill(&mut self.copied.files, frame)?;
                }
            }
        }
        Ok(())
    }

    /// Takes up everything, patches that wait for others too.
    async fn drain_all(&mut self) -> Result<()> {
        self.drain(0).await?;
        let patches = self.gathered.take();
        self.pack_patches(patches);
        self.drain(0).await
    }

    /// Has a frame made of patches.
    fn pack_patches(&mut self, patches: Option<(Vec<u8>, Places)>) {
        if let Some((content, places)) = patches {
            let codec = self.task.repository.descriptor().codec;
            let packed = self.workers.run(move || Packed::of(&content, codec));
            self.queue.push_back(Part::Patches(packed, places));
        }
    }

    /// Puts the patch of the newest file's next region to those of its neighbours.
    fn gather(&mut self, patch: Vec<u8>) {
        let file = self.copied.files.len().saturating_sub(1);
        let place = (file, self.copied.files.last().map_or(0, |file| file.regions.len()));
        if self.gathered.ends_before(place) {
            let patches = self.gathered.take();
            self.pack_patches(patches);
        }
        let patches = self.gathered.add(place, patch);
        self.pack_patches(patches);
    }

    fn begin(&mut self, entry: FileEntry, pages: u32) {
        if let Some(sums) = &mut self.sums {
            sums.file(&entry.path, pages);
        }
        self.copied.files.push(entry);
    }

    /// Adds a region to the newest file and to the pack.
    async fn take(&mut self, read: Read) -> Result<()> {
        self.done += u64::from(read.plain);
        if read.unread {
            self.copied.unread += u64::from(read.plain);
        }
        if self.done >= self.told + PROGRESS_STEP {
            self.told = self.done;
            self.events.emit(Event::BackupProgress { done: self.done.min(self.total), total: self.total });
        }
        if read.plain == 0 {
            return Ok(());
        }
        if let Some(sums) = &mut self.sums {
            sums.region(read.plain / PAGE as u32, read.sums.as_ref());
        }
        let region = match read.content {
            Content::Same(region) => self.adopt(region)?,
            Content::Whole(packed) => {
                let frame = self.add_to_pack(packed, Holds::Regions).await?;
                Region::whole(frame, read.plain, read.crc)
            }
            Content::Patch(region, patch) => {
                let region = self.adopt(region)?;
                self.gather(patch);
                Region { crc: read.crc, ..region }
            }
        };
        let Some(file) = self.copied.files.last_mut() else { return Err(Error::internal("a region without a file")) };
        for pages in read.behind_wal.runs() {
            self.copied.stretches_behind_wal += 1;
            if self.copied.behind_wal.len() < DAMAGED_MAX {
                self.copied.behind_wal.push(stretch(file, pages));
            }
        }
        file.regions.push(region);
        self.copied.damaged_pages += read.damaged.len() as u64;
        let room = DAMAGED_MAX.saturating_sub(self.copied.damaged.len());
        let named = read.damaged.iter().take(room).map(|block| DamagedPage { file: file.path.clone(), block: *block });
        self.copied.damaged.extend(named);
        Ok(())
    }

    /// A region of the last backup, its packs numbered as ours are.
    fn adopt(&mut self, mut region: Region) -> Result<Region> {
        self.renumber(&mut region.frame)?;
        if !region.patches.is_empty() {
            let patches = Arc::make_mut(&mut region.patches);
            patches.iter_mut().try_for_each(|patch| self.renumber(&mut patch.frame))?;
        }
        Ok(region)
    }

    fn renumber(&mut self, frame: &mut FrameRef) -> Result<()> {
        let pack = self.parent.as_ref().and_then(|parent| parent.packs.get(frame.pack as usize)).copied();
        let Some(pack) = pack else { return Err(Error::internal("a region of the last backup without a pack")) };
        frame.pack = self.number(pack);
        Ok(())
    }

    /// The place of a pack in the list.
    fn number(&mut self, pack: PackId) -> u32 {
        let next = self.copied.packs.len() as u32;
        let number = *self.numbers.entry(pack).or_insert(next);
        if number == next {
            self.copied.packs.push(pack);
        }
        number
    }

    async fn add_to_pack(&mut self, packed: Packed, holds: Holds) -> Result<FrameRef> {
        let (stored, sha256) = (packed.frame.len() as u32, packed.sha256);
        if let Some(there) = self.task.remains.and_then(|remains| remains.find(&sha256, stored)) {
            self.copied.found += u64::from(stored);
            return Ok(FrameRef { pack: self.number(there.pack), offset: there.offset, stored, sha256 });
        }
        let mut pack = match self.building.remove(&holds) {
            Some(pack) => pack,
            None => {
                let clock = self.task.repository.clock();
                PackBuilder::new(PackId(clock.random()), WriteId(clock.random()), self.task.id)?
            }
        };
        let pack_number = self.number(pack.id);
        let offset = pack.add(packed.frame, sha256);
        let frame = FrameRef { pack: pack_number, offset, stored, sha256 };
        if pack.is_full() {
            self.upload(pack).await?;
        } else {
            self.building.insert(holds, pack);
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

    async fn control_file(&mut self, file: &FileItem, version: Version) -> Result<()> {
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
        let bytes = outcome.map_err(|e| e.context(file.source.display()))?;
        let read = region::pack_alone(&bytes, self.task.repository.descriptor().codec)?;
        let entry = self.entry(file, None);
        self.copied.files.push(FileEntry { size: bytes.len() as u64, ..entry });
        self.take(read).await
    }

    async fn finish(mut self) -> Result<Copied> {
        self.drain_all().await?;
        for (_, pack) in std::mem::take(&mut self.building) {
            self.upload(pack).await?;
        }
        while !self.uploads.is_empty() {
            self.one_upload_ended().await?;
        }
        self.events.emit(Event::BackupProgress { done: self.total, total: self.total });
        Ok(self.copied)
    }
}

/// From the first to the last of these pages of a file's next region.
fn stretch(file: &FileEntry, (first, last): (u32, u32)) -> Stretch {
    let before = (file.regions.len() as u64 * REGION / PAGE as u64) as u32;
    let begin = data_dir::first_block(&file.path).unwrap_or(0) + before;
    Stretch { file: file.path.clone(), first_block: begin + first, last_block: begin + last }
}
