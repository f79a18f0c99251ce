//! A backup that goes on with what a dead one has left, and prunes that may delete it, each interrupted by the other at every
//! one of its requests: whatever comes first, a backup that is there has all its packs.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::executor::block_on;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::backup::remains::{self, Remains};
use crate::backup::{make_visible, standby};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::Events;
use crate::model::{BackupId, Generation, Lsn, PackId, SystemId, Timeline, WriteId};
use crate::repository::codec::Sha256;
use crate::repository::manifest::{BackupHead, Line, Lines, LinesWriter};
use crate::repository::pack::PackBuilder;
use crate::repository::{Codec, NewWriter, Repository, layout};
use crate::retention::{self, Keep};
use crate::storage::{Adapter, Body, Chunk, Created, Entry, Level, Store};
use crate::wal::{SegmentName, WalFileName};

/// Lets so many requests through and no more.
#[derive(Debug, Clone)]
struct Gate {
    inner: Arc<dyn Store>,
    open: Arc<Semaphore>,
}

impl Gate {
    async fn pass(&self) {
        self.open.acquire().await.expect("never closed").forget();
    }
}

#[async_trait]
impl Store for Gate {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        self.pass().await;
        self.inner.create(key, body).await
    }

    async fn read(&self, key: &str, range: std::ops::Range<u64>) -> Result<Option<Chunk>> {
        self.pass().await;
        self.inner.read(key, range).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let (this, prefix, after) = (self.clone(), prefix.to_owned(), after.map(str::to_owned));
        let listing = async move {
            this.pass().await;
            Ok::<_, Error>(this.inner.list(&prefix, after.as_deref()))
        };
        futures::stream::once(listing).try_flatten().boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        self.pass().await;
        self.inner.list_level(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.pass().await;
        self.inner.delete(key).await
    }
}

/// More requests than anybody makes here.
const PLENTY: usize = 10_000;

/// Somebody at work, request by request.
struct Actor {
    open: Arc<Semaphore>,
    work: Pin<Box<dyn Future<Output = Result<()>>>>,
    ended: Option<Result<()>>,
}

impl Actor {
    fn new<W: Future<Output = Result<()>> + 'static>(world: &World, work: impl FnOnce(Repository) -> W) -> Actor {
        let open = Arc::new(Semaphore::new(0));
        let gate = Gate { inner: Arc::clone(&world.store), open: Arc::clone(&open) };
        let repository = Repository::assume(Arc::new(gate), world.repository.descriptor().clone(), &world.clock());
        Actor { open, work: Box::pin(work(repository)), ended: None }
    }

    /// Makes at most so many requests more.
    fn go(&mut self, requests: usize) {
        self.open.add_permits(requests);
        // What is under way side by side says several times that it wants to be asked again.
        for _ in 0..50 {
            if self.ended.is_none()
                && let Poll::Ready(ended) = self.work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                self.ended = Some(ended);
            }
        }
    }

    fn finish(&mut self) -> &Result<()> {
        self.go(PLENTY);
        self.ended.as_ref().expect("nothing else holds it up")
    }
}

struct World {
    store: Arc<dyn Store>,
    repository: Repository,
    /// The pack a dead backup has left.
    left: PackId,
}

const TEXT: &str = "what the dead backup has put, and the next one needs";

fn id(generation: u32, nonce: u16) -> BackupId {
    BackupId { generation: Generation(generation), start: Lsn(u64::from(nonce) << 24), nonce }
}

async fn put_pack(repository: &Repository, of: BackupId, text: &str) -> PackId {
    let clock = repository.clock();
    let mut pack = PackBuilder::new(PackId(clock.random()), WriteId(clock.random()), of).expect("a head");
    let frame = Codec::default().compress(text.as_bytes()).expect("compressed");
    pack.add(Bytes::from(frame.clone()), Sha256::of(&frame));
    let (pack, body) = pack.finish().expect("finished");
    repository.put_pack(pack, &body).await.expect("put");
    pack
}

fn manifest(repository: &Repository, id: BackupId, packs: &[PackId]) -> (BackupHead, Body) {
    let at = repository.clock().now();
    let head: BackupHead = serde_json::from_value(json!({
        "format": "", "write_id": WriteId(repository.clock().random()), "backup_id": id,
        "repository_id": repository.descriptor().repository_id, "system_id": SystemId(7),
        "generation": id.generation, "timeline": Timeline(1), "pg_major": 15, "pg_version": "15", "segment_size": 1 << 24,
        "region_size": 1 << 20, "start_lsn": id.start, "stop_lsn": id.start, "started_at": at, "stopped_at": at,
        "next_xid": 3, "data_checksums": true, "backup_label": "", "tablespaces": [], "files": 0, "bytes": 0,
        "stored": 0, "packs": packs.len(), "frames": Lines::none().frames, "frames_sha256": Lines::none().frames_sha256,
    }))
    .expect("a head");
    let mut lines = LinesWriter::new(Codec::default());
    packs.iter().try_for_each(|pack| lines.add(&Line::Pack(*pack))).expect("lines");
    head.with(lines).expect("a manifest")
}

async fn claim(repository: &Repository, after: Option<Generation>) -> Result<()> {
    let new = NewWriter {
        writer_id: WriteId(repository.clock().random()),
        system_id: SystemId(7),
        pg_major: 15,
        segment_size: (1 << 24).try_into().expect("a size"),
        host: String::new(),
    };
    repository.try_claim(after, after, &new).await.map(drop)
}

impl World {
    /// A backup, and a later one that died, on the first machine; `generations` machines there have been.
    async fn new(generations: u32) -> World {
        let store: Arc<dyn Store> = Arc::new(Adapter::memory());
        let (repository, _) =
            Repository::init(Arc::clone(&store), Codec::default(), &Clock::system()).await.expect("made");
        claim(&repository, None).await.expect("claimed");
        let packs = [put_pack(&repository, id(1, 1), "the last backup's").await];
        let (head, body) = manifest(&repository, id(1, 1), &packs);
        make_visible(&repository, &head, &body, &packs).await.expect("visible");
        repository.backup_begins(id(1, 2), None).await.expect("begun");
        let left = put_pack(&repository, id(1, 2), TEXT).await;
        for newest in 1..generations {
            claim(&repository, Some(Generation(newest))).await.expect("claimed");
        }
        World { store, repository, left }
    }

    fn clock(&self) -> Clock {
        self.repository.clock().clone()
    }

    /// Every backup that is there has its packs. Those of `id`, if it is there.
    fn check(&self, of: BackupId) -> Option<Vec<PackId>> {
        block_on(async {
            let there = self.repository.pack_ids().await.expect("listed");
            let mut found = None;
            for id in self.repository.backup_ids().await.expect("listed") {
                let packs = self.repository.packs_of(id).await.expect("a manifest");
                assert!(packs.iter().all(|pack| there.contains(pack)), "{id} has lost a pack");
                found = if id == of { Some(packs) } else { found };
            }
            found
        })
    }
}

/// A backup that needs what the dead one has put, or puts it itself.
async fn back_up(repository: Repository, id: BackupId) -> Result<()> {
    let since = remains::since(&repository).await?;
    let remains = Remains::announce(&repository, id, since, &Events::silent()).await?;
    let frame = Codec::default().compress(TEXT.as_bytes())?;
    let packs = match remains.find(&Sha256::of(&frame), frame.len() as u32) {
        Some(there) => [there.pack],
        None => [put_pack(&repository, id, TEXT).await],
    };
    let (head, body) = manifest(&repository, id, &packs);
    make_visible(&repository, &head, &body, &packs).await
}

async fn prune(repository: Repository, grace: Duration) -> Result<()> {
    let keep = Keep { last: 10, ..Keep::default() };
    let options = retention::Options { keep, grace, dry_run: false, generation: None };
    retention::prune(&repository, &options, &Events::silent()).await.map(drop)
}

/// How often it went which way.
#[derive(Debug, Default)]
struct Outcomes {
    /// The backup names the dead one's pack; or has put its own, and the dead one's is gone or still there.
    named: u32,
    gone: u32,
    spared: u32,
    refused: u32,
}

impl Outcomes {
    /// Looks now, and after one more prune.
    fn add(&mut self, world: &World, of: BackupId, backup: &Result<()>) {
        let visible = world.check(of);
        match (backup, &visible) {
            (Ok(()), Some(packs)) if packs.contains(&world.left) => self.named += 1,
            (Ok(()), Some(_)) => {
                let there = block_on(world.repository.pack_ids()).expect("listed");
                *(if there.contains(&world.left) { &mut self.spared } else { &mut self.gone }) += 1;
            }
            (Err(error), _) if matches!(error.kind(), Kind::Fenced | Kind::Refused) => self.refused += 1,
            (outcome, visible) => panic!("{outcome:?}, and it is there: {visible:?}"),
        }
        block_on(prune(world.repository.clone(), Duration::ZERO)).expect("pruned");
        assert_eq!(world.check(of), visible);
    }
}

/// So many requests an actor makes at most, alone in its world, and two more: every moment of its is met.
fn requests(mut actor: Actor) -> usize {
    actor.finish().as_ref().expect("it goes well");
    PLENTY - actor.open.available_permits() + 2
}

#[test]
fn a_backup_names_no_pack_that_a_prune_deletes_whatever_the_order_of_their_requests() {
    let backup = id(2, 3);
    let new_backup = |world: &World| Actor::new(world, |repository| back_up(repository, backup));
    let new_prune = |world: &World, grace| Actor::new(world, move |repository| prune(repository, grace));
    let (hour, none) = (Duration::from_secs(3600), Duration::ZERO);
    let all_of_backup = requests(new_backup(&block_on(World::new(2))));
    let all_of_prune = requests(new_prune(&block_on(World::new(2)), none));
    let mut outcomes = Outcomes::default();
    // The grace of the prune, whether its requests come first, and when another one comes and goes, if there is one.
    let choices =
        [(none, true, 9), (none, false, 9), (hour, true, 9), (none, true, 0), (none, true, 1), (none, true, 2)];
    for (grace, prune_first, other) in choices {
        let moments = (0..=all_of_prune).flat_map(|prune| (0..=all_of_backup).map(move |backup| (prune, backup)));
        for (of_prune, of_backup) in moments {
            let world = block_on(World::new(2));
            let (mut ours, mut pruning) = (new_backup(&world), new_prune(&world, grace));
            let meanwhile = |moment| {
                if other == moment {
                    block_on(prune(world.repository.clone(), hour)).expect("pruned");
                }
            };
            let mut actors = [(&mut pruning, of_prune), (&mut ours, of_backup)];
            if !prune_first {
                actors.reverse();
            }
            for (moment, (actor, requests)) in actors.iter_mut().enumerate() {
                actor.go(*requests);
                meanwhile(moment);
            }
            for (actor, _) in &mut actors {
                actor.finish();
                meanwhile(2);
            }
            pruning.finish().as_ref().expect("pruned");
            outcomes.add(&world, backup, ours.finish());
        }
    }
    let Outcomes { named, gone, spared, refused } = outcomes;
    assert!(named > 100 && gone > 100 && spared > 50 && refused == 0, "{outcomes:?}");
}

/// Backups of a standby begin at its last restart point: here a segment before the last backup of the primary.
async fn back_up_standby(repository: Repository, id: BackupId) -> Result<()> {
    Remains::announce(&repository, id, None, &Events::silent()).await?;
    standby::hold_wal(&repository, id).await?;
    if !wal_is_there(&repository).await {
        return Err(Error::not_found("WAL"));
    }
    let (head, body) = manifest(&repository, id, &[]);
    make_visible(&repository, &head, &body, &[]).await
}

fn segment(number: u64) -> String {
    let size = (1 << 24).try_into().expect("a size");
    layout::wal_file(Generation(1), WalFileName::Segment(SegmentName::new(Timeline(1), number, size)))
}

async fn wal_is_there(repository: &Repository) -> bool {
    let listed: Vec<Entry> =
        repository.store().list(&layout::wal_dir(Generation(1)), None).try_collect().await.expect("listed");
    (0..4).all(|number| listed.iter().any(|entry| entry.key == segment(number)))
}

fn with_wal() -> World {
    block_on(async {
        let world = World::new(1).await;
        for number in 0..4 {
            world.store.create(&segment(number), &Body::from(vec![0; 9])).await.expect("put");
        }
        world
    })
}

#[test]
fn a_backup_of_a_standby_keeps_its_wal_or_is_not_there_whatever_the_order_of_requests() {
    let backup = BackupId { start: Lsn(0), ..id(1, 3) };
    let new_backup = |world: &World| Actor::new(world, |repository| back_up_standby(repository, backup));
    let new_prune = |world: &World| Actor::new(world, |repository| prune(repository, Duration::ZERO));
    let (all_of_backup, all_of_prune) = (requests(new_backup(&with_wal())), requests(new_prune(&with_wal())));
    let (mut visible, mut refused) = (0, 0);
    let moments = (0..=all_of_prune).flat_map(|prune| (0..=all_of_backup).map(move |backup| (prune, backup)));
    for ((of_prune, of_backup), prune_first) in moments.flat_map(|moment| [true, false].map(|first| (moment, first))) {
        let world = with_wal();
        let (mut ours, mut pruning) = (new_backup(&world), new_prune(&world));
        let mut actors = [(&mut pruning, of_prune), (&mut ours, of_backup)];
        if !prune_first {
            actors.reverse();
        }
        actors.iter_mut().for_each(|(actor, requests)| actor.go(*requests));
        for (actor, _) in &mut actors {
            actor.finish();
        }
        let there = block_on(world.repository.backup_ids()).expect("listed").contains(&backup);
        match ours.finish() {
            Ok(()) => {
                assert!(there && block_on(wal_is_there(&world.repository)), "{of_prune} {of_backup} {prune_first}");
                visible += 1;
            }
            Err(error) => {
                assert!(!there && error.kind() == Kind::Refused, "{of_prune} {of_backup} {prune_first}: {error}");
                refused += 1;
            }
        }
    }
    assert!(visible > 100 && refused > 100, "{visible} {refused}");
}

#[test]
fn a_backup_of_a_standby_whose_primary_is_replaced_keeps_its_wal_or_is_not_there() {
    let backup = BackupId { start: Lsn(0), ..id(1, 3) };
    let new_backup = |world: &World| Actor::new(world, |repository| back_up_standby(repository, backup));
    let replace = |world: &World| {
        Actor::new(world, |repository| async move {
            claim(&repository, Some(Generation(1))).await?;
            prune(repository, Duration::ZERO).await
        })
    };
    let all_of_backup = requests(new_backup(&with_wal()));
    let all_of_other = requests(replace(&with_wal()));
    let (mut visible, mut not) = (0, 0);
    let moments = (0..=all_of_backup).flat_map(|ours| (0..=all_of_other).map(move |other| (ours, other)));
    for ((of_backup, of_other), more) in moments.flat_map(|moment| [0, 1, 2, 3].map(|more| (moment, more))) {
        let world = with_wal();
        let (mut ours, mut replacing) = (new_backup(&world), replace(&world));
        ours.go(of_backup);
        replacing.go(of_other);
        ours.go(more);
        replacing.finish().as_ref().expect("pruned");
        let ended = ours.finish();
        let there = block_on(world.repository.backup_ids()).expect("listed").contains(&backup);
        assert!(there || ended.is_err(), "{of_backup} {of_other} {more}: {ended:?}");
        // It may be there although it was told that it was taken for dead.
        if there {
            assert!(block_on(wal_is_there(&world.repository)), "{of_backup} {of_other} {more}");
        }
        *(if there { &mut visible } else { &mut not }) += 1;
    }
    assert!(visible > 10 && not > 100, "{visible} {not}");
}

#[test]
fn a_backup_of_a_machine_that_was_replaced_is_whole_or_not_there() {
    let backup = id(1, 3);
    let new_backup = |world: &World| Actor::new(world, |repository| back_up(repository, backup));
    let replace = |world: &World| {
        Actor::new(world, |repository| async move {
            claim(&repository, Some(Generation(1))).await?;
            prune(repository, Duration::ZERO).await
        })
    };
    let all_of_backup = requests(new_backup(&block_on(World::new(1))));
    let all_of_other = requests(replace(&block_on(World::new(1))));
    let mut outcomes = Outcomes::default();
    let moments = (0..=all_of_backup).flat_map(|ours| (0..=all_of_other).map(move |other| (ours, other)));
    for ((of_backup, of_other), more) in moments.flat_map(|moment| [0, 1, 2].map(|more| (moment, more))) {
        let world = block_on(World::new(1));
        let (mut ours, mut replacing) = (new_backup(&world), replace(&world));
        ours.go(of_backup);
        replacing.go(of_other);
        ours.go(more);
        replacing.finish().as_ref().expect("pruned");
        outcomes.add(&world, backup, ours.finish());
    }
    let Outcomes { named, gone, spared, refused } = outcomes;
    assert!(named > 10 && refused > 100 && gone + spared == 0, "{outcomes:?}");
}
