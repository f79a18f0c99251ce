//! A standby's questions against a store in memory, by a clock that only sleep moves.

use std::ops::Range as Bytes;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;

use super::*;
use crate::archive::fetch::FetchOptions;
use crate::error::Kind;
use crate::model::{SystemId, Timestamp, WriteId};
use crate::repository::log::{Appender, Checks, Position, Sealer};
use crate::repository::{Codec, NewWriter, Repository, WalObject};
use crate::storage::{Adapter, Body, Chunk, Created, Entry, Level, Store};

const SEGMENT: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Slept(AtomicU64);

impl crate::clock::Source for Slept {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_micros(1_700_000_000_000_000 + self.0.load(Ordering::Relaxed) as i64)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.0.fetch_add(duration.as_micros() as u64, Ordering::Relaxed);
        Box::pin(std::future::ready(()))
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        Clock::system().random::<16>().iter().cycle().zip(bytes).for_each(|(random, byte)| *byte = *random);
    }
}

#[derive(Debug)]
struct Counting {
    inner: Adapter,
    reads: AtomicU64,
    lists: AtomicU64,
    writes: AtomicU64,
}

#[async_trait]
impl Store for Counting {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.create(key, body).await
    }

    async fn read(&self, key: &str, range: Bytes<u64>) -> Result<Option<Chunk>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read(key, range).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        self.inner.list(prefix, after)
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        self.inner.list_level(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key).await
    }
}

/// A repository, a writer of it, and the directory of a standby.
struct World {
    store: Arc<Counting>,
    repository: Repository,
    directory: tempfile::TempDir,
}

impl World {
    async fn new() -> World {
        let (reads, lists, writes) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let store = Arc::new(Counting { inner: Adapter::memory(), reads, lists, writes });
        let clock = Clock::new(Arc::new(Slept::default()));
        let (repository, _) =
            Repository::init(Arc::<Counting>::clone(&store), Codec::default(), &clock).await.expect("made");
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(directory.path().join("pg_wal")).expect("made");
        std::fs::create_dir(directory.path().join("cache")).expect("made");
        World { store, repository, directory }
    }

    async fn claim(&self, newest: Option<u32>, parent: Option<u32>) {
        let new = NewWriter {
            writer_id: WriteId(self.repository.clock().random()),
            system_id: SystemId(1),
            pg_major: 15,
            segment_size: SegmentSize::try_from(SEGMENT).expect("1 MB"),
            host: "machine".to_owned(),
        };
        let claimed = self.repository.try_claim(newest.map(Generation), parent.map(Generation), &new).await;
        claimed.expect("works").expect("claimed");
    }

    /// Ends what is older than a generation, and opens its log.
    async fn open(&self, generation: u32, timeline: u32, at: u64) -> Appender {
        let sealer = Sealer { generation: Generation(generation), checks: Checks::ALL };
        sealer.seal_older(&self.repository).await.expect("sealed");
        let start = Position { timeline: Timeline(timeline), lsn: Lsn(at) };
        let (repository, heartbeat) = (self.repository.clone(), Duration::from_secs(30));
        let mut log =
            Appender::open(repository, Generation(generation), start, heartbeat, Checks::ALL).expect("opened");
        log.landed().await.expect("landed");
        log
    }

    async fn history(&self, generation: u32, timeline: u32, text: &str) {
        let name = WalFileName::History(Timeline(timeline));
        let identity = (WriteId(self.repository.clock().random()), self.repository.clock().now());
        let object = WalObject::small(name, SystemId(1), text.as_bytes(), Codec::default(), identity).expect("made");
        self.repository.put_wal(Generation(generation), &object, text.as_bytes()).await.expect("stored");
    }

    async fn follow(&self) -> Result<Follower> {
        let options = FetchOptions { follow: true, ..FetchOptions::default() };
        let source = Source::open(self.repository.clone(), options).await?;
        Follower::open(source, self.directory.path(), &self.directory.path().join("cache")).await
    }

    /// A question as PostgreSQL asks it; what it has of the segment then.
    async fn ask(&self, follower: &mut Follower, name: SegmentName) -> Option<Vec<u8>> {
        let Answer::Give(wanted) = follower.answer(name).await.expect("answered") else { return None };
        let restored = self.directory.path().join("pg_wal/RECOVERYXLOG");
        follower.give(name, wanted, None, &restored).await.expect("given");
        let kept = self.directory.path().join(format!("pg_wal/{name}"));
        std::fs::rename(restored, &kept).expect("renamed");
        let bytes = std::fs::read(kept).expect("read");
        assert_eq!(bytes.len() as u64, SEGMENT, "PostgreSQL takes whole segments only");
        Some(bytes)
    }

    fn counted(&self) -> (u64, u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        (count(&self.store.reads), count(&self.store.lists), count(&self.store.writes))
    }
}

async fn write(log: &mut Appender, byte: u8, count: usize) {
    let plain = vec![byte; count];
    let frame = Codec::default().compress(&plain).expect("compressed");
    log.append_wal(&plain, frame.into()).expect("appended");
    log.landed().await.expect("landed");
}

fn segment(timeline: u32, number: u64) -> SegmentName {
    SegmentName::new(Timeline(timeline), number, SegmentSize::try_from(SEGMENT).expect("1 MB"))
}

/// How many bytes of each kind come first; the rest is zeros.
fn made_of(bytes: &[u8], parts: &[(u8, usize)]) -> bool {
    let expected = parts.iter().flat_map(|(byte, count)| std::iter::repeat_n(*byte, *count));
    let length: usize = parts.iter().map(|(_, count)| count).sum();
    expected.eq(bytes[..length].iter().copied()) && bytes[length..].iter().all(|byte| *byte == 0)
}

#[tokio::test]
async fn the_tail_of_the_living_log_is_given_as_it_grows_and_across_segments() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 3 * SEGMENT).await;
    write(&mut log, 1, 100).await;
    let mut follower = world.follow().await.expect("opened");
    let first = segment(1, 3);
    assert!(made_of(&world.ask(&mut follower, first).await.expect("there is some"), &[(1, 100)]));

    let began = world.repository.clock().monotonic();
    assert_eq!(world.ask(&mut follower, first).await, None, "nothing new");
    assert!(world.repository.clock().monotonic() - began >= WAIT, "it waits before it says so");

    write(&mut log, 2, 50).await;
    let bytes = world.ask(&mut follower, first).await.expect("there is more");
    assert!(made_of(&bytes, &[(1, 100), (2, 50)]));

    let rest = SEGMENT as usize - 150;
    write(&mut log, 3, rest).await;
    write(&mut log, 4, 7).await;
    assert!(made_of(&world.ask(&mut follower, first).await.expect("whole"), &[(1, 100), (2, 50), (3, rest)]));
    assert!(made_of(&world.ask(&mut follower, segment(1, 4)).await.expect("the next one"), &[(4, 7)]));
    assert_eq!(
        origin::read(&world.directory.path().join(OWN_DIR), world.repository.descriptor().repository_id).expect("read"),
        Some(Generation(1))
    );
}

#[tokio::test]
async fn a_segment_that_is_asked_for_ahead_of_time_holds_nothing_up() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 0).await;
    write(&mut log, 1, SEGMENT as usize).await;
    let mut follower = world.follow().await.expect("opened");
    assert!(world.ask(&mut follower, segment(1, 0)).await.is_some());
    let began = world.repository.clock().monotonic();
    assert_eq!(world.ask(&mut follower, segment(1, 1)).await, None);
    assert_eq!(world.repository.clock().monotonic(), began, "what comes before it may not be replayed yet");
    assert_eq!(world.ask(&mut follower, segment(1, 1)).await, None);
    assert!(world.repository.clock().monotonic() >= began + WAIT);
}

#[tokio::test]
async fn an_idle_hour_costs_a_small_request_a_second_and_hardly_a_listing() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 0).await;
    write(&mut log, 1, 100).await;
    let mut follower = world.follow().await.expect("opened");
    assert!(world.ask(&mut follower, segment(1, 0)).await.is_some());
    let clock = world.repository.clock().clone();
    let (began, mut beat) = (clock.monotonic(), clock.monotonic());
    let (reads, lists, writes) = world.counted();
    while clock.monotonic() - began < SECOND * 3600 {
        assert_eq!(world.ask(&mut follower, segment(1, 0)).await, None);
        follower.give_other(WalFileName::History(Timeline(2)), Path::new("nowhere")).await.expect("answered");
        if clock.monotonic() - beat >= SECOND * 30 {
            beat = clock.monotonic();
            log.append_heartbeat().expect("appended");
            log.landed().await.expect("landed");
        }
    }
    let counted = world.counted();
    let heartbeats = counted.2 - writes;
    assert!(heartbeats >= 110, "{heartbeats}");
    assert!(counted.0 - reads < 4000 + 3 * heartbeats, "{} reads", counted.0 - reads);
    assert!(counted.1 - lists < 20, "{} listings", counted.1 - lists);

    // Without a living writer it looks around once a minute.
    let (_, lists, writes) = world.counted();
    let began = clock.monotonic();
    while clock.monotonic() - began < SECOND * 3600 {
        assert_eq!(world.ask(&mut follower, segment(1, 0)).await, None);
    }
    let counted = world.counted();
    assert!(counted.1 - lists < 60 * 10, "{} listings", counted.1 - lists);
    assert_eq!(counted.2, writes, "a standby writes nothing");
}

#[tokio::test]
async fn another_writer_is_followed_onto_its_timeline() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 0).await;
    write(&mut log, 1, 100).await;
    let mut follower = world.follow().await.expect("opened");
    assert!(world.ask(&mut follower, segment(1, 0)).await.is_some());
    let destination = world.directory.path().join("history");
    let history = async |follower: &mut Follower| {
        follower.give_other(WalFileName::History(Timeline(2)), &destination).await.expect("answered")
    };
    assert!(matches!(history(&mut follower).await, Fetched::EndOfWal(_)));

    // Claimed, not opened: the old log goes on, and is read on.
    world.claim(Some(1), Some(1)).await;
    follower.look().await.expect("looked");
    write(&mut log, 2, 30).await;
    assert!(made_of(&world.ask(&mut follower, segment(1, 0)).await.expect("more"), &[(1, 100), (2, 30)]));

    // Recovery of the next writer ended at byte 110: what lies behind is no whole record.
    world.history(2, 2, "1\t0/6E\tno recovery target specified\n").await;
    let mut log = world.open(2, 2, 0).await;
    assert_eq!(world.ask(&mut follower, segment(1, 0)).await, None, "the server has to ask for the timeline");
    assert_eq!(history(&mut follower).await, Fetched::Done);
    write(&mut log, 1, 100).await;
    assert_eq!(world.ask(&mut follower, segment(2, 0)).await, None, "it has not got past its beginning");
    write(&mut log, 5, 60).await;
    let bytes = world.ask(&mut follower, segment(2, 0)).await.expect("its WAL");
    assert!(made_of(&bytes, &[(1, 100), (5, 60)]));
    let noted = origin::read(&world.directory.path().join(OWN_DIR), world.repository.descriptor().repository_id);
    assert_eq!(noted.expect("read"), Some(Generation(2)));
}

#[tokio::test]
async fn a_standby_of_an_abandoned_future_is_given_nothing_more() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 0).await;
    write(&mut log, 1, 100).await;
    world.claim(Some(1), Some(1)).await;
    let mut log = world.open(2, 1, 0).await;
    write(&mut log, 1, 100).await;
    write(&mut log, 2, 100).await;
    let mut follower = world.follow().await.expect("opened");
    assert!(world.ask(&mut follower, segment(1, 0)).await.is_some());
    // Somebody goes on from the first life, on the same timeline.
    world.claim(Some(2), Some(1)).await;
    let mut log = world.open(3, 1, 0).await;
    write(&mut log, 1, 100).await;
    write(&mut log, 3, 200).await;
    let error = follower.answer(segment(1, 0)).await.expect_err("another history");
    assert!(error.kind() == Kind::Refused && error.hint_text().is_some(), "{error:?}");
    assert!(error.to_string().contains("generation 2"), "{error}");
    assert!(world.follow().await.is_err(), "nor after a restart");
}

#[tokio::test]
async fn a_log_that_was_released_is_left_when_the_next_generation_is_claimed() {
    let world = World::new().await;
    world.claim(None, None).await;
    let mut log = world.open(1, 1, 0).await;
    write(&mut log, 1, 100).await;
    log.release().await.expect("released");
    let mut follower = world.follow().await.expect("opened");
    assert!(world.ask(&mut follower, segment(1, 0)).await.is_some());
    assert_eq!(world.ask(&mut follower, segment(1, 0)).await, None);
    world.claim(Some(1), Some(1)).await;
    let mut log = world.open(2, 1, 0).await;
    write(&mut log, 1, 100).await;
    write(&mut log, 2, 10).await;
    let bytes = world.ask(&mut follower, segment(1, 0)).await.expect("the next life's WAL");
    assert!(made_of(&bytes, &[(1, 100), (2, 10)]));
}

#[test]
fn what_tells_first_that_there_is_more() {
    let log = |generation: u32, opened: bool, sealed: bool| LogView {
        generation: Generation(generation),
        bound: crate::repository::log::Bound::at(5, opened.then_some(Position { timeline: Timeline(1), lsn: Lsn(0) })),
        next: 9,
        last: None,
        seal: sealed.then(|| seal(generation)),
    };
    let living = log(1, true, false);
    assert_eq!(next_news(std::slice::from_ref(&living)), Some(NextNews::Log(&living)));
    assert_eq!(next_news(&[log(2, false, false), living.clone()]), Some(NextNews::Log(&living)), "claimed, not sealed");
    assert_eq!(next_news(&[log(2, false, false), log(1, true, true)]), Some(NextNews::Entry(Generation(2), 9)));
    assert_eq!(next_news(&[log(1, true, true)]), Some(NextNews::Claim(Generation(2))));
    assert_eq!(next_news(&[log(1, false, false)]), Some(NextNews::Entry(Generation(1), 9)), "it keeps no log");
    assert_eq!(next_news(&[]), None);
}

fn seal(generation: u32) -> crate::repository::log::EntryHead {
    crate::repository::log::EntryHead {
        format: String::new(),
        write_id: WriteId([0; 16]),
        generation: Generation(generation),
        number: 9,
        at: Timestamp::from_unix_micros(0),
        previous: None,
        content: crate::repository::log::Content::Seal { by: Generation(generation + 1), released: false },
    }
}
