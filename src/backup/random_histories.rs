//! Random lives of files against a model: whatever happened between backups, each one holds the exact bytes of its moment,
//! and goes on doing so when those before it are gone. In every other life WAL summaries tell what has changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::changes::{BLOCKS, Changes};
use super::copy::{self, Copied, Task};
use super::parent::Parent;
use super::remains::{self, Remains};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::disk::UncachedFile;
use crate::events::Events;
use crate::model::{BackupId, Generation, Lsn};
use crate::postgres::data_dir::FileItem;
use crate::postgres::page::{self, PAGE};
use crate::postgres::summaries::{Relation, Touched, What};
use crate::repository::codec::decompress;
use crate::repository::manifest::{FileEntry, Region};
use crate::repository::pack::FrameRef;
use crate::repository::piece_sums::{PieceSums, Writer};
use crate::repository::{Codec, Repository};
use crate::storage::faulty::{Fault, Faulty};
use crate::storage::{Adapter, Store};

const SEEDS: u64 = 60;
const BACKUPS: usize = 7;

/// A relation's file and its map, as pages; and where WAL is.
struct Disk {
    files: BTreeMap<String, Vec<[u8; PAGE]>>,
    lsn: u64,
    chance: Chance,
    /// What summaries would say of WAL since the last backup, in lives that have them.
    said: Option<Vec<Touched>>,
    /// A page has changed without saying so.
    rotten: bool,
}

/// Gives it a position and its checksum.
fn stamp(page: &mut [u8; PAGE], block: usize, lsn: u64) {
    page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
    let sum = page::checksum(page, block as u32).to_le_bytes();
    page[8..10].copy_from_slice(&sum);
}

impl Disk {
    /// A page of other rows than any.
    fn page(&mut self, block: usize, lsn: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[14] = 1;
        for row in (100..PAGE - 8).step_by(64) {
            page[row..row + 8].copy_from_slice(&self.chance.below(u64::MAX).to_le_bytes());
        }
        stamp(&mut page, block, lsn);
        page
    }

    /// The page with a few other rows.
    fn with_other_rows(&mut self, mut page: [u8; PAGE], block: usize, lsn: u64) -> [u8; PAGE] {
        for _ in 0..=self.chance.below(3) {
            let row = 24 + self.chance.below(PAGE as u64 - 32) as usize;
            page[row..row + 8].copy_from_slice(&self.chance.below(u64::MAX).to_le_bytes());
        }
        stamp(&mut page, block, lsn);
        page
    }

    /// Of the visibility map summaries say nothing that we would believe.
    fn say(&mut self, path: &str, what: What) {
        let Some(relation) = Relation::of_path(path) else { return };
        self.said.iter_mut().for_each(|said| said.push(Touched { relation, what }));
    }

    fn say_block(&mut self, path: &str, block: usize) {
        self.say(path, What::Stretch(block as u32 / BLOCKS));
    }

    fn change(&mut self, path: &str) {
        self.lsn += 8;
        let (lsn, what) = (self.lsn, self.chance.below(20));
        let mut pages = self.files.remove(path).unwrap_or_default();
        match what {
            // Grows, by pages that were written or by zeros.
            0 | 1 => {
                for _ in 0..self.chance.below(40) {
                    if self.chance.below(9) == 0 {
                        // WAL does not tell of these.
                        pages.push([0; PAGE]);
                    } else {
                        self.say_block(path, pages.len());
                        pages.push(self.page(pages.len(), lsn));
                    }
                }
            }
            2 => {
                pages.truncate(self.chance.below(pages.len() as u64 + 1) as usize);
                self.say(path, What::CutTo(pages.len() as u32));
            }
            // Some pages change, here and there or many.
            3..=16 => {
                for _ in 0..[1, 3, 12, 60][self.chance.below(4) as usize] {
                    if !pages.is_empty() {
                        let block = self.chance.below(pages.len() as u64) as usize;
                        self.say_block(path, block);
                        pages[block] = match self.chance.below(4) {
                            0 => self.page(block, lsn),
                            _ => self.with_other_rows(pages[block], block, lsn),
                        };
                    }
                }
            }
            // A page rots on the disk, or is as it should be again: nothing says that it has changed. Or the disk has lost a write,
            // and the page is an older one, sound in itself. With summaries such a page is not even read, and the backup has it
            // as it was.
            17 | 18 => {
                if !pages.is_empty() && self.said.is_none() {
                    let block = self.chance.below(pages.len() as u64) as usize;
                    let old = (1 << 20) + self.chance.below(lsn - (1 << 20));
                    match what {
                        17 => pages[block][4000] ^= 1,
                        _ => pages[block] = self.page(block, old),
                    }
                    self.rotten = true;
                }
            }
            // Dropped, and the path used again by a file whose pages are older than the last backup: CREATE DATABASE by
            // copying files, under the same number.
            _ => {
                let old = (1 << 20) + self.chance.below(lsn - (1 << 20));
                let length = [pages.len() as u64, self.chance.below(200)][self.chance.below(2) as usize];
                pages = (0..length as usize).map(|block| self.page(block, old)).collect();
                // Dropped and made again, alone or with its database.
                let relation = Relation::of_path(path);
                let number = |relation: Relation| if old & 1 == 0 { relation.number } else { 0 };
                if let (Some(said), Some(relation)) = (&mut self.said, relation) {
                    said.push(Touched {
                        relation: Relation { number: number(relation), ..relation },
                        what: What::CutTo(0),
                    });
                }
                // Some of it has been written to since.
                for _ in 0..self.chance.below(3).min(pages.len() as u64) {
                    let block = self.chance.below(pages.len() as u64) as usize;
                    self.say_block(path, block);
                    pages[block] = self.page(block, lsn);
                }
                self.files.insert(format!("new {path}"), Vec::new());
            }
        }
        self.files.insert(path.to_owned(), pages);
    }

    /// Everything said since the last backup.
    fn changes(&self) -> Option<Arc<Changes>> {
        let mut changes = Changes::default();
        self.said.as_ref()?.iter().for_each(|touched| changes.note(*touched).expect("fits"));
        Some(Arc::new(changes))
    }

    /// Brings the directory to the model's state. Files that are the same ones stay the same ones.
    fn write(&mut self, directory: &Path) {
        let anew: Vec<String> =
            self.files.keys().filter_map(|path| path.strip_prefix("new ").map(str::to_owned)).collect();
        for path in &anew {
            self.files.remove(&format!("new {path}"));
            let _ = std::fs::remove_file(directory.join(path));
        }
        for (path, pages) in &self.files {
            use std::io::Write;
            let open = std::fs::File::options().write(true).create(true).truncate(true).open(directory.join(path));
            open.and_then(|mut file| file.write_all(&pages.concat())).expect("written");
        }
    }
}

impl Disk {
    /// A backup begins: what it is to read, who it is and where in WAL.
    fn begin(&mut self, directory: &Path, nonce: u16) -> (Vec<(FileItem, Option<String>)>, BackupId, Lsn) {
        self.write(directory);
        self.lsn += 8;
        let start = Lsn(self.lsn);
        let items = self.files.keys().map(|path| (item(directory, path), None)).collect();
        (items, BackupId { generation: Generation(1), start, nonce }, start)
    }
}

fn item(directory: &Path, path: &str) -> FileItem {
    let source = directory.join(path);
    let size = std::fs::metadata(&source).expect("there").len();
    let is_map = path.contains('_');
    FileItem {
        path: path.to_owned(),
        source,
        mode: 0o600,
        uid: 0,
        size,
        mtime: 0,
        first_block: Some(0),
        pages_have_lsn: !is_map,
    }
}

pub fn task<'a>(repository: &'a Repository, id: BackupId, start: Lsn, remains: &'a Remains) -> Task<'a> {
    Task { repository, id, start, data_checksums: true, remains: Some(remains), max_rate: None }
}

pub async fn content(repository: &Repository, copied: &Copied, file: &FileEntry) -> Vec<u8> {
    let mut all = Vec::new();
    for region in &file.regions {
        all.extend(region_content(repository, copied, region).await);
    }
    all
}

/// Written apart from the restore, in the simplest way: frames one over the other.
async fn region_content(repository: &Repository, copied: &Copied, region: &Region) -> Vec<u8> {
    let stored = async |frame: FrameRef| {
        let range = frame.offset..frame.end();
        repository.read_pack(copied.packs[frame.pack as usize], range).await.expect("there")
    };
    let mut plain = decompress(&stored(region.frame).await, region.plain as usize).expect("a frame");
    for patch in region.patches.iter() {
        let content = decompress(&stored(patch.frame).await, patch.content as usize).expect("a frame");
        let (masks, mut pieces) = content[patch.at as usize..][..patch.plain as usize].split_at(128);
        for piece in (0..1024).filter(|piece| masks[piece / 8] >> (piece % 8) & 1 == 1) {
            plain[piece * 1024..][..1024].copy_from_slice(&pieces[..1024]);
            pieces = &pieces[1024..];
        }
        assert!(pieces.is_empty());
    }
    assert_eq!(crc32c::crc32c(&plain), region.crc);
    plain
}

/// What a life came to: bytes of all backups, bytes stored for them, and regions with patches.
#[derive(Debug, Default, Clone, Copy)]
struct Sum {
    bytes: u64,
    stored: u64,
    patched: usize,
    /// Backups that were cut off, and bytes of theirs that the next ones have named.
    died: usize,
    unread: u64,
    found: u64,
}

/// What nobody names goes.
async fn prune(repository: &Repository, kept: &[(Copied, BTreeMap<String, Vec<u8>>)]) {
    let marked: std::collections::BTreeSet<_> = kept.iter().flat_map(|(copied, _)| &copied.packs).collect();
    for pack in repository.pack_ids().await.expect("listed") {
        if !marked.contains(&pack) {
            repository.store().delete(&crate::repository::layout::pack(pack)).await.expect("deleted");
        }
    }
}

async fn live(seed: u64) -> Sum {
    let directory = tempfile::tempdir().expect("a directory");
    let clock = Clock::system();
    let faulty = Faulty::new(Arc::new(Adapter::memory()));
    let store: Arc<dyn Store> = Arc::new(faulty.clone());
    let (repository, _) = Repository::init(store, Codec::default(), &clock).await.expect("made");
    let repository_id = repository.descriptor().repository_id;
    let said = (seed % 2 == 1).then(Vec::new);
    let mut disk = Disk { files: BTreeMap::new(), lsn: 1 << 21, chance: Chance(seed), said, rotten: false };
    std::fs::create_dir_all(directory.path().join("base/5")).expect("made");
    let paths = ["base/5/16384", "base/5/16385", "base/5/16384_vm"];
    for path in paths {
        let pages = (0..disk.chance.below(200) as usize).map(|block| disk.page(block, 1 << 21)).collect();
        disk.files.insert(path.to_owned(), pages);
    }
    let mut kept: Vec<(Copied, BTreeMap<String, Vec<u8>>)> = Vec::new();
    let mut newest: Option<(BackupId, Lsn, Copied)> = None;
    let mut sum = Sum::default();
    for n in 0..BACKUPS {
        for _ in 0..disk.chance.below(6) {
            let path = paths[disk.chance.below(3) as usize];
            disk.change(path);
        }
        let own = directory.path().join("own");
        let parent = |changes: Option<Arc<Changes>>| {
            let (id, start, copied) = newest.as_ref()?;
            let mut parent = Parent::of(*id, *start, copied);
            parent.changes = changes;
            parent.piece_sums = PieceSums::of(&own, repository_id, *id).map(Arc::new);
            Some(parent)
        };
        let mut begun = Vec::new();
        // Now and then it dies, at once, midway or just before its manifest: what it has put stays behind, named by nobody.
        for died in 0..[0, 0, 1, 2][disk.chance.below(4) as usize] {
            let (items, id, start) = disk.begin(directory.path(), u16::MAX - 2 * n as u16 - died);
            let since = remains::since(&repository).await.expect("looked");
            let found = Remains::announce(&repository, id, since, &Events::silent()).await.expect("looked");
            begun.push(id);
            let lived_for = disk.chance.below(3) as usize;
            faulty.queue(&[vec![Fault::None; lived_for], vec![Fault::Denied; 8]].concat());
            let task = task(&repository, id, start, &found);
            let mut sums = Writer::begin(&own, repository_id, id).expect("begun");
            let before_and_now = (parent(disk.changes()), Some(&mut sums));
            sum.died += usize::from(copy::files_only(&task, &items, before_and_now).await.is_err() || lived_for > 0);
            faulty.forget();
            // Some of it is written to, and what is left may go, before it is done again.
            match disk.chance.below(4) {
                0 => {
                    let path = paths[disk.chance.below(3) as usize];
                    disk.change(path);
                }
                1 => prune(&repository, &kept).await,
                _ => (),
            }
        }
        let (items, id, start) = disk.begin(directory.path(), n as u16);
        let since = remains::since(&repository).await.expect("looked");
        assert_eq!(since.is_some(), !begun.is_empty());
        let found = Remains::announce(&repository, id, since, &Events::silent()).await.expect("looked");
        let task = task(&repository, id, start, &found);
        let mut sums = Writer::begin(&own, repository_id, id).expect("begun");
        let before_and_now = (parent(disk.changes()), Some(&mut sums));
        let copied = copy::files_only(&task, &items, before_and_now).await.expect("copied");
        // Now and then what is kept beside the data is lost.
        if disk.chance.below(9) > 0 {
            sums.keep().expect("kept");
        }
        for id in begun.into_iter().chain([id]) {
            repository.backup_ended(id).await.expect("ended");
        }
        assert!(copied.stretches_behind_wal == 0 || disk.rotten, "seed {seed}: {:?}", copied.behind_wal);
        sum.stored += copied.stored;
        sum.unread += copied.unread;
        sum.found += copied.found;
        let regions = copied.files.iter().flat_map(|file| &file.regions);
        sum.patched += regions.filter(|region| !region.patches.is_empty()).count();
        let files = disk.files.iter().map(|(path, pages)| (path.clone(), pages.concat()));
        let files: BTreeMap<_, _> = files.collect();
        sum.bytes += files.values().map(|content| content.len() as u64).sum::<u64>();
        newest = Some((id, start, copied.clone()));
        disk.said.iter_mut().for_each(Vec::clear);
        kept.push((copied, files));
        // Each backup, now and again later.
        for (copied, files) in &kept {
            assert_eq!(copied.files.len(), files.len());
            for file in &copied.files {
                assert!(content(&repository, copied, file).await == files[&file.path], "seed {seed}, {}", file.path);
            }
        }
        // Old ones go; those that stay need what is theirs.
        if kept.len() > 3 {
            kept.remove(disk.chance.below(3) as usize);
            prune(&repository, &kept).await;
        }
    }
    sum
}

#[test]
fn every_backup_holds_the_bytes_of_its_moment() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("threads");
    let mut sum = Sum::default();
    #[allow(clippy::disallowed_methods, reason = "a longer run is asked for like this")]
    let seeds = std::env::var("PERENNIAL_HISTORIES").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    for seed in 0..seeds {
        let life = runtime.block_on(live(seed));
        sum = Sum {
            bytes: sum.bytes + life.bytes,
            stored: sum.stored + life.stored,
            patched: sum.patched + life.patched,
            died: sum.died + life.died,
            unread: sum.unread + life.unread,
            found: sum.found + life.found,
        };
    }
    assert!(sum.bytes > 100 << 20, "too little was looked at: {sum:?}");
    assert!(sum.died > 10, "hardly any backup was cut off: {sum:?}");
    assert!(sum.found > 50_000, "hardly anything was gone on with: {sum:?}");
    let scratch = tempfile::NamedTempFile::new().expect("a file");
    let tells_birth = UncachedFile::open(scratch.path()).expect("opened").is_some_and(|file| file.birth().is_some());
    assert!(sum.patched > 100 || !tells_birth, "patches were hardly met: {sum:?}");
    assert!(sum.unread > 10 << 20 || !tells_birth, "hardly anything was left unread: {sum:?}");
}
