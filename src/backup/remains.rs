//! What backups that were cut off have left in the bucket: packs whose frames the next backup names instead of putting them
//! again.
//!
//! No manifest speaks for these packs, and a prune may be about to delete them. A backup says in its announcement from when on
//! it may name packs; a prune that looks later leaves those alone. One that looked before has put its record before, which
//! says what it may be deleting; that is not named. So whichever came first, one of the two has seen the other
//! (docs/decisions/0024-what-a-dead-backup-left.md). Whose packs these are does not matter: a frame is what its hash says.

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt, TryStreamExt};

use crate::error::{Kind, Result};
use crate::events::{Event, Events, Level};
use crate::model::{BackupId, PackId, Timestamp};
use crate::repository::Repository;
use crate::repository::codec::Sha256;
use crate::repository::manifest::BackupObjects;
use crate::repository::pack::Indexed;

/// Frames that are remembered, a region each: about 450 GB of files, in 24 MB of memory (36 while the table grows). What is
/// beyond is put again.
const FRAMES_MAX: usize = (1 << 19) / 8 * 7;

/// Indexes read at once, of up to a megabyte each (`pack::INDEX_MAX`); and asked for before what they said is taken up.
const PARALLEL: usize = 8;
const ASKED: usize = 256;

/// A pack nobody names, its size, and when it was put.
type Unnamed = (Timestamp, PackId, u64);

#[derive(Debug, Default)]
pub struct Remains {
    packs: Vec<PackId>,
    /// Where each frame lies: number of the pack, offset, length.
    frames: HashMap<Sha256, (u32, u64, u32)>,
}

/// A frame that is in the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remain {
    pub pack: PackId,
    pub offset: u64,
}

/// When the first backup began that is under way or was cut off since the last one was done, by the store's clock; `None`
/// when there is none. What came before the last one, that one has found.
pub async fn since(repository: &Repository) -> Result<Option<Timestamp>> {
    Ok(first_cut_off(&repository.backup_objects().await?))
}

fn first_cut_off(objects: &BTreeMap<BackupId, BackupObjects>) -> Option<Timestamp> {
    let last = objects.values().filter_map(|of| of.manifest.as_ref()).map(|manifest| manifest.modified).max();
    let unfinished = objects.values().filter(|of| of.manifest.is_none() && of.tombstone.is_none());
    let begun = unfinished.filter_map(|of| of.begun.as_ref()).map(|begun| begun.modified);
    begun.filter(|begun| last.is_none_or(|last| *begun >= last)).min()
}

impl Remains {
    /// Announces a backup, then looks at what was put `since` and may be named by it.
    pub async fn announce(
        repository: &Repository,
        id: BackupId,
        since: Option<Timestamp>,
        events: &Events,
    ) -> Result<Remains> {
        repository.backup_begins(id, since).await?;
        let Some(since) = since else { return Ok(Remains::default()) };
        let Some(after) = beyond_prunes(repository).await? else { return Ok(Remains::default()) };
        let mut unnamed: Vec<Unnamed> = Vec::new();
        let mut listing = repository.packs();
        while let Some((id, entry)) = listing.try_next().await? {
            if entry.modified >= since && entry.modified > after {
                unnamed.push((entry.modified, id, entry.size));
            }
        }
        unnamed.sort_unstable();
        let remains = Remains::read(repository, &unnamed, events).await?;
        if !remains.packs.is_empty() {
            let packs = remains.packs.len();
            events.info(format!("going on with {packs} packs of a backup that did not end"));
        }
        Ok(remains)
    }

    async fn read(repository: &Repository, unnamed: &[Unnamed], events: &Events) -> Result<Remains> {
        let mut remains = Remains::default();
        for some in unnamed.chunks(ASKED) {
            let reads: Vec<_> = some.iter().map(|(_, id, size)| read(repository, *id, *size, events)).collect();
            let mut reads = futures::stream::iter(reads).buffered(PARALLEL);
            while let Some((id, index)) = reads.try_next().await? {
                if !remains.add(id, &index) {
                    return Ok(remains);
                }
            }
        }
        Ok(remains)
    }

    /// Takes the frames of a pack up; `false` when there are too many of them.
    fn add(&mut self, id: PackId, index: &[Indexed]) -> bool {
        if self.frames.len() + index.len() > FRAMES_MAX {
            return false;
        }
        if !index.is_empty() {
            let number = self.packs.len() as u32;
            self.packs.push(id);
            for (offset, stored, sha256) in index {
                self.frames.entry(*sha256).or_insert((number, *offset, *stored));
            }
        }
        true
    }

    /// Where a frame of this hash and length is, if it is there.
    pub fn find(&self, sha256: &Sha256, stored: u32) -> Option<Remain> {
        let (pack, offset, length) = *self.frames.get(sha256)?;
        let pack = *self.packs.get(pack as usize)?;
        (length == stored).then_some(Remain { pack, offset })
    }
}

/// The frames of a pack; none of one that has gone, or cannot be made out.
async fn read(repository: &Repository, id: PackId, size: u64, events: &Events) -> Result<(PackId, Vec<Indexed>)> {
    match repository.pack_index(id, size).await {
        Ok(index) => Ok((id, index.unwrap_or_default())),
        Err(error) if error.kind() == Kind::Damaged => {
            events.emit(Event::Note { level: Level::Detail, text: format!("not gone on with: {error}") });
            Ok((id, Vec::new()))
        }
        Err(error) => Err(error),
    }
}

/// Packs that were put later than this are not what any prune on record is deleting; `None` when nobody can say.
async fn beyond_prunes(repository: &Repository) -> Result<Option<Timestamp>> {
    let mut after = Timestamp::from_unix_micros(i64::MIN);
    for record in repository.prunes().await? {
        let reach = match repository.prune_reach(&record).await {
            Err(error) if error.kind() == Kind::Damaged => None,
            read => read?,
        };
        let Some(reach) = reach else { return Ok(None) };
        after = after.max(reach);
    }
    Ok(Some(after))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use age::secrecy::ExposeSecret;
    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::model::{Generation, Lsn, WriteId};
    use crate::repository::pack::PackBuilder;
    use crate::repository::vault::Vault;
    use crate::repository::{Codec, PruneRecord};
    use crate::storage::{Adapter, Entry};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_unix_micros(seconds * 1_000_000)
    }

    fn id(nonce: u16) -> BackupId {
        BackupId { generation: Generation(1), start: Lsn(40), nonce }
    }

    #[test]
    fn only_what_was_begun_since_the_last_backup_is_gone_on_with() {
        let entry = |seconds| Some(Entry { key: String::new(), size: 0, modified: at(seconds) });
        let done = |seconds| BackupObjects { manifest: entry(seconds), ..BackupObjects::default() };
        let begun = |seconds| BackupObjects { begun: entry(seconds), ..BackupObjects::default() };
        let buried = |seconds| BackupObjects { tombstone: entry(seconds + 9), ..begun(seconds) };
        let first = |all: Vec<BackupObjects>| first_cut_off(&(0..).map(id).zip(all).collect());
        assert_eq!(first(vec![]), None);
        assert_eq!(first(vec![done(10)]), None);
        assert_eq!(first(vec![begun(5)]), Some(at(5)));
        assert_eq!(first(vec![begun(5), done(10), begun(11), begun(12)]), Some(at(11)));
        assert_eq!(first(vec![begun(10), done(10)]), Some(at(10)), "the store's clock may tell seconds only");
        assert_eq!(first(vec![buried(11), begun(12)]), Some(at(12)));
    }

    async fn put(repository: &Repository, id: BackupId, texts: &[&str]) -> (PackId, Vec<(Sha256, u32, u64)>) {
        let clock = repository.clock();
        let mut pack = PackBuilder::new(PackId(clock.random()), WriteId(clock.random()), id).expect("a head");
        let mut frames = Vec::new();
        for text in texts {
            let frame = Codec::default().compress(text.as_bytes()).expect("compressed");
            let (sha256, stored) = (Sha256::of(&frame), frame.len() as u32);
            frames.push((sha256, stored, pack.add(Bytes::from(frame), sha256)));
        }
        let (pack, body) = pack.finish().expect("finished");
        repository.put_pack(pack, &body).await.expect("put");
        (pack, frames)
    }

    async fn pruned(repository: &Repository, grace: Duration) {
        let (write_id, at) = (WriteId(repository.clock().random()), repository.clock().now());
        let record = PruneRecord {
            kind: "perennial/prune".to_owned(),
            format: 1,
            write_id,
            generation: Generation(1),
            at,
            points_from: Lsn(0),
            deleted: Vec::new(),
            grace_ms: grace.as_millis() as u64,
        };
        repository.put_prune(&record).await.expect("put");
    }

    #[tokio::test]
    async fn frames_of_a_dead_backup_are_found_unless_a_prune_may_be_deleting_them() {
        let store = Arc::new(Adapter::memory());
        let (repository, _) = Repository::init(store, Codec::default(), &Clock::system()).await.expect("made");
        are_found_unless_a_prune_may_be_deleting_them(repository).await;
    }

    #[tokio::test]
    async fn so_are_those_of_an_encrypted_repository() {
        let identity = age::x25519::Identity::generate();
        let secret = identity.to_string().expose_secret().to_owned();
        let recipient = identity.to_public().to_string().parse().expect("a recipient");
        let store = Arc::new(Vault::new(Arc::new(Adapter::memory()), Arc::new(move || Ok(Some(secret.clone())))));
        let made = Repository::make(store, Codec::default(), &[recipient], &Clock::system()).await;
        are_found_unless_a_prune_may_be_deleting_them(made.expect("made").0).await;
    }

    async fn are_found_unless_a_prune_may_be_deleting_them(repository: Repository) {
        put(&repository, id(1), &["of nobody that has begun"]).await;
        repository.backup_begins(id(2), None).await.expect("begun");
        let (pack, frames) = put(&repository, id(2), &["one", "two", "three"]).await;
        let events = Events::silent();
        let look = async |nonce| {
            let since = since(&repository).await.expect("looked");
            Remains::announce(&repository, id(nonce), since, &events).await.expect("looked")
        };
        let found = look(3).await;
        for (sha256, stored, offset) in &frames {
            assert_eq!(found.find(sha256, *stored), Some(Remain { pack, offset: *offset }));
            assert_eq!(found.find(sha256, stored + 1), None);
        }
        assert_eq!(found.packs, [pack], "what was put before it began may be what anybody deletes");
        // A prune that leaves alone what is younger than an hour, and one that does not.
        pruned(&repository, Duration::from_secs(3600)).await;
        assert_eq!(look(4).await.packs, [pack]);
        pruned(&repository, Duration::ZERO).await;
        assert!(look(5).await.packs.is_empty());
        let (later, _) = put(&repository, id(5), &["four"]).await;
        assert_eq!(look(6).await.packs, [later]);
        // What cannot be made out is left alone.
        let body = crate::storage::Body::from(b"no pack at all".to_vec());
        repository.put_pack(PackId([1; 16]), &body).await.expect("put");
        assert_eq!(look(7).await.packs, [later]);
    }

    #[test]
    fn no_more_frames_are_remembered_than_there_is_memory_for() {
        let hash = |number: u32| {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&number.to_le_bytes());
            Sha256(hash)
        };
        let mut remains = Remains::default();
        let full: Vec<Indexed> = (0..FRAMES_MAX as u32).map(|number| (8, 9, hash(number))).collect();
        assert!(remains.add(PackId([1; 16]), &full));
        assert!(!remains.add(PackId([2; 16]), &[(8, 9, hash(u32::MAX))]));
        assert!(remains.find(&hash(7), 9).is_some() && remains.find(&hash(u32::MAX), 9).is_none());
    }
}
