//! Many backups, one upon the other, of files that change here and there, while older ones go: the repository stays about as
//! large as what is in it, though each pack was filled once and is never rewritten.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;

use super::copy::{self, Copied, Task};
use super::parent::Parent;
use super::random_histories::{content, task};
use super::remains::Remains;
use crate::chance::Chance;
use crate::clock::Clock;
use crate::model::{BackupId, Generation, Lsn};
use crate::postgres::data_dir::FileItem;
use crate::repository::{Codec, Repository, layout};
use crate::storage::{Adapter, Store};

/// Files of a region each; so many change before each backup, any of them.
const FILES: u64 = 150;
const CHANGED: u64 = 10;
const FILE: u64 = 8 * 8192;
const BACKUPS: u64 = 100;
/// From here on the first backup's pack has gone, in which most was at first.
const SETTLED: u64 = 70;

/// Writes a file that cannot be compressed, of pages that were changed at `lsn`.
fn write(path: &Path, lsn: u64, chance: &mut Chance) {
    let mut bytes = Vec::with_capacity(FILE as usize);
    while bytes.len() < FILE as usize {
        if bytes.len().is_multiple_of(8192) {
            bytes.extend_from_slice(&((lsn >> 32) as u32).to_le_bytes());
            bytes.extend_from_slice(&(lsn as u32).to_le_bytes());
        }
        bytes.extend_from_slice(&chance.below(u64::MAX).to_le_bytes());
    }
    std::fs::write(path, &bytes).expect("written");
}

fn items(directory: &Path) -> Vec<(FileItem, Option<String>)> {
    let item = |number: u64| FileItem {
        path: number.to_string(),
        source: directory.join(number.to_string()),
        mode: 0o600,
        uid: 0,
        size: FILE,
        mtime: 0,
        first_block: None,
        pages_have_lsn: true,
    };
    (0..FILES).map(|number| (item(number), None)).collect()
}

/// How many bytes the repository has at most once it has settled, and the most that one backup has stored by then.
async fn live(leaves_sparse_packs: bool) -> (u64, u64) {
    let directory = tempfile::tempdir().expect("a directory");
    let store: Arc<dyn Store> = Arc::new(Adapter::memory());
    let (repository, _) = Repository::init(store, Codec::default(), &Clock::system()).await.expect("made");
    let (mut chance, mut lsn) = (Chance(7), 1 << 21);
    let (mut kept, remains): (Vec<(BackupId, Copied)>, _) = (Vec::new(), Remains::default());
    let (mut largest, mut dearest) = (0, 0);
    for number in 0..BACKUPS {
        let changed: BTreeSet<u64> = match number {
            0 => (0..FILES).collect(),
            _ => (0..CHANGED).map(|_| chance.below(FILES)).collect(),
        };
        lsn += 8;
        changed.iter().for_each(|file| write(&directory.path().join(file.to_string()), lsn, &mut chance));
        lsn += 8;
        let id = BackupId { generation: Generation(1), start: Lsn(lsn), nonce: 0 };
        let mut parent = kept.last().map(|(id, copied)| Parent::of(*id, id.start, copied));
        if let Some(parent) = parent.as_mut().filter(|_| leaves_sparse_packs) {
            parent.leave_sparse_packs(&repository).await.expect("listed");
        }
        // Without the sums of their pages there are no patches: whole regions alone.
        let task = Task { data_checksums: false, ..task(&repository, id, Lsn(lsn), &remains) };
        let copied = copy::files_only(&task, &items(directory.path()), (parent, None)).await.expect("copied");
        if number >= SETTLED {
            dearest = dearest.max(copied.stored);
        }
        // Of backups the last two stay.
        kept.push((id, copied));
        if kept.len() > 2 {
            kept.remove(0);
        }
        let named: BTreeSet<_> = kept.iter().flat_map(|(_, copied)| &copied.packs).collect();
        let mut size = 0;
        let packs: Vec<_> = repository.packs().try_collect().await.expect("listed");
        for (pack, entry) in packs {
            match named.contains(&pack) {
                true => size += entry.size,
                false => repository.store().delete(&layout::pack(pack)).await.expect("deleted"),
            }
        }
        if number >= SETTLED {
            largest = largest.max(size);
        }
    }
    for (_, copied) in &kept[1..] {
        for file in &copied.files {
            let path = directory.path().join(&file.path);
            assert!(content(&repository, copied, file).await == std::fs::read(path).expect("there"), "{}", file.path);
        }
    }
    (largest, dearest)
}

#[test]
fn the_repository_does_not_grow_with_the_number_of_backups() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("threads");
    let ((with, dearest), (without, _)) = (runtime.block_on(live(true)), runtime.block_on(live(false)));
    let (all, changed) = (FILES * FILE, CHANGED * FILE);
    println!("{all} bytes; at most {with} in the repository, {without} without; at most {dearest} for a backup");
    assert!(with * 2 < all * 5, "{with} bytes for {all}");
    assert!(without * 2 > all * 7, "nothing would have to be done: {without} bytes for {all}");
    assert!(dearest < changed + all / 8, "{dearest} bytes for a backup of which {changed} have changed");
}
