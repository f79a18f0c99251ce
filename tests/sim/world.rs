//! Simulated time, chance and object store: one thread, one queue of events, everything decided by a seed.
//!
//! The store applies each request at one instant, as real ones do for a key. What happens around that instant is the
//! fault model: a request may be refused, be lost, lose its answer, arrive long after its sender gave up, or arrive twice.
//! A sender that dies does not take back what it has sent. Listings come in small pages, each of its own instant.

use std::cell::RefCell;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::executor::{LocalPool, LocalSpawner};
use futures::stream::BoxStream;
use futures::task::LocalSpawnExt;
use futures::{StreamExt, TryStreamExt};

use perennial::clock::{Clock, Source};
use perennial::error::{Error, Kind, Result};
use perennial::model::Timestamp;
use perennial::storage::{Body, Chunk, Created, Entry, Level, Store};

/// Keys in a page of a listing.
const PAGE: usize = 4;

type Action = Box<dyn FnOnce(&mut BTreeMap<String, Bytes>) + Send>;

enum Happening {
    Wake(Arc<Mutex<Waker>>),
    Apply(Action),
}

struct Event {
    at: Duration,
    order: u64,
    happening: Happening,
}

impl PartialEq for Event {
    fn eq(&self, other: &Event) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Event) -> std::cmp::Ordering {
        // A heap gives the greatest first.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// How often things go wrong, in percent of requests.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    pub refused: u64,
    pub lost: u64,
    pub answer_lost: u64,
    pub late: u64,
    pub twice: u64,
}

impl Faults {
    pub const NONE: Faults = Faults { refused: 0, lost: 0, answer_lost: 0, late: 0, twice: 0 };
}

struct State {
    now: Duration,
    orders: u64,
    events: BinaryHeap<Event>,
    objects: BTreeMap<String, Bytes>,
    chance: u64,
    faults: Faults,
    requests: u64,
}

/// Everything there is; clones share it.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

thread_local! {
    static SPAWNER: RefCell<Option<LocalSpawner>> = const { RefCell::new(None) };
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> World {
        World(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            orders: 0,
            events: BinaryHeap::new(),
            objects: BTreeMap::new(),
            chance: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03,
            faults,
            requests: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("one thread")
    }

    pub fn clock(&self) -> Clock {
        Clock::new(Arc::new(self.clone()))
    }

    pub fn now(&self) -> Duration {
        self.state().now
    }

    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// A number below `bound` (splitmix64).
    pub fn below(&self, bound: u64) -> u64 {
        let mut state = self.state();
        state.chance = state.chance.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound.max(1)
    }

    /// Mostly short, now and then very long.
    pub fn delay(&self) -> Duration {
        let ms = match self.below(100) {
            0..=89 => 1 + self.below(30),
            90..=98 => 30 + self.below(500),
            _ => 500 + self.below(20_000),
        };
        Duration::from_millis(ms)
    }

    fn schedule(&self, at: Duration, happening: Happening) {
        let mut state = self.state();
        state.orders += 1;
        let order = state.orders;
        state.events.push(Event { at, order, happening });
    }

    /// Runs `main` and everything it spawns until `main` has ended or nothing can happen any more.
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> Option<T> {
        let mut pool = LocalPool::new();
        SPAWNER.with(|slot| *slot.borrow_mut() = Some(pool.spawner()));
        let result = std::rc::Rc::new(RefCell::new(None));
        let slot = std::rc::Rc::clone(&result);
        pool.spawner().spawn_local(async move { *slot.borrow_mut() = Some(main.await) }).expect("spawned");
        loop {
            pool.run_until_stalled();
            if result.borrow().is_some() {
                return result.borrow_mut().take();
            }
            let next = self.state().events.pop();
            let event = next?;
            let mut state = self.state();
            state.now = state.now.max(event.at);
            match event.happening {
                Happening::Apply(action) => action(&mut state.objects),
                Happening::Wake(waker) => {
                    drop(state);
                    waker.lock().expect("one thread").wake_by_ref();
                }
            }
        }
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        SPAWNER.with(|slot| slot.borrow().as_ref().expect("inside run").spawn_local(task).expect("spawned"));
    }

    /// Sends a request: `act` happens to the objects at one instant, whatever becomes of the sender.
    async fn request<T: Send + 'static>(
        &self,
        act: impl Fn(&mut BTreeMap<String, Bytes>) -> T + Send + Sync + 'static,
    ) -> Result<T> {
        let failed = |what: &str| Error::new(Kind::Unreachable, what.to_owned()).retryable();
        let faults = self.state().faults;
        self.state().requests += 1;
        let (there, back) = (self.delay(), self.delay());
        let roll = self.below(100);
        let within = |start: u64, share: u64| (start..start + share).contains(&roll);
        let mut start = 0;
        let mut is = |share: u64| {
            let hit = within(start, share);
            start += share;
            hit
        };
        if is(faults.refused) {
            self.clock().sleep(there).await;
            return Err(failed("503 or 409"));
        }
        if is(faults.lost) {
            self.clock().sleep(Duration::from_secs(2)).await;
            return Err(failed("no answer"));
        }
        let act = Arc::new(act);
        let now = self.now();
        if is(faults.late) {
            let late = now + there + Duration::from_millis(self.below(60_000));
            self.schedule(late, Happening::Apply(Box::new(move |objects| drop(act(objects)))));
            self.clock().sleep(Duration::from_secs(2)).await;
            return Err(failed("no answer, arrives later"));
        }
        if is(faults.twice) {
            let (again, late) = (Arc::clone(&act), now + there + Duration::from_millis(self.below(60_000)));
            self.schedule(late, Happening::Apply(Box::new(move |objects| drop(again(objects)))));
        }
        let (answer, answered) = futures::channel::oneshot::channel();
        let send = move |objects: &mut BTreeMap<String, Bytes>| drop(answer.send(act(objects)));
        self.schedule(now + there, Happening::Apply(Box::new(send)));
        let lost = is(faults.answer_lost);
        self.clock().sleep(there).await;
        let answer = answered.await.map_err(|_| failed("the world ended"))?;
        self.clock().sleep(back).await;
        if lost { Err(failed("answer lost")) } else { Ok(answer) }
    }
}

impl Source for World {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_micros(World::now(self).as_micros() as i64)
    }

    fn monotonic(&self) -> Duration {
        self.state().now
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let until = World::now(self) + duration;
        Box::pin(Sleep { world: self.clone(), until, waker: None })
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.below(256) as u8);
    }
}

struct Sleep {
    world: World,
    until: Duration,
    /// The task to wake, shared with the one event that does it.
    waker: Option<Arc<Mutex<Waker>>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &self.waker {
            Some(_) if self.world.now() >= self.until => return Poll::Ready(()),
            Some(waker) => *waker.lock().expect("one thread") = context.waker().clone(),
            None => {
                let waker = Arc::new(Mutex::new(context.waker().clone()));
                self.world.schedule(self.until, Happening::Wake(Arc::clone(&waker)));
                self.waker = Some(waker);
            }
        }
        Poll::Pending
    }
}

#[async_trait]
impl Store for World {
    fn url(&self, key: &str) -> String {
        format!("sim://{key}")
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        let (key, bytes) = (key.to_owned(), Bytes::from(body.head(usize::MAX)));
        self.request(move |objects| match objects.contains_key(&key) {
            true => Created::AlreadyThere,
            false => {
                objects.insert(key.clone(), bytes.clone());
                Created::Now
            }
        })
        .await
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        let key = key.to_owned();
        self.request(move |objects| {
            objects.get(&key).map(|bytes| {
                let size = bytes.len() as u64;
                let part = bytes.slice(range.start.min(size) as usize..range.end.min(size) as usize);
                Chunk { bytes: part, object_size: size }
            })
        })
        .await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let world = self.clone();
        let (under, after) = (format!("{prefix}/"), after.unwrap_or("").to_owned());
        futures::stream::try_unfold(Some(after), move |after| {
            let (world, under) = (world.clone(), under.clone());
            async move {
                let Some(after) = after else { return Ok(None) };
                let page: Vec<Entry> = world
                    .request(move |objects| {
                        let later = objects.iter().filter(|(key, _)| key.starts_with(&under) && **key > after);
                        let entry = |(key, bytes): (&String, &Bytes)| Entry {
                            key: key.clone(),
                            size: bytes.len() as u64,
                            modified: Timestamp::from_unix_micros(0),
                        };
                        later.take(PAGE).map(entry).collect()
                    })
                    .await?;
                let next = (page.len() == PAGE).then(|| page[PAGE - 1].key.clone());
                Ok::<_, Error>(Some((futures::stream::iter(page.into_iter().map(Ok)), next)))
            }
        })
        .try_flatten()
        .boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        let under = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        self.request(move |objects| {
            let mut level = Level::default();
            for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with(&under)) {
                match key[under.len()..].split_once('/') {
                    Some((directory, _)) => level.directories.push(format!("{under}{directory}")),
                    None => level.entries.push(Entry {
                        key: key.clone(),
                        size: bytes.len() as u64,
                        modified: Timestamp::from_unix_micros(0),
                    }),
                }
            }
            level.directories.dedup();
            level
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.request(move |objects| drop(objects.remove(&key))).await
    }
}
