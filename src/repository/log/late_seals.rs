//! A claimant that was too slow: its seal lands where an entry has been collected since, while somebody else looks.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::entry::{self, FORMAT};
use super::{Appender, Bound, Checks, Content, EntryHead, Position};
use crate::clock::Clock;
use crate::error::{Kind, Result};
use crate::model::{Generation, Lsn, Timeline, WriteId};
use crate::repository::{Codec, Repository, layout};
use crate::storage::{Adapter, Body, Chunk, Created, Entry, Level, Store};

const WRITER: Generation = Generation(1);
const SLOW: Generation = Generation(2);

/// In the middle of the next listing of the log the writer collects entry 3 and a late seal takes its place. What else
/// is to be collected is not gone yet.
#[derive(Debug, Clone)]
struct Meddling {
    inner: Arc<dyn Store>,
    armed: Arc<AtomicBool>,
}

impl Meddling {
    async fn meddle(&self) {
        let clock = Clock::system();
        let store = Arc::clone(&self.inner);
        let (repository, _) = Repository::init(store, Codec::default(), &clock).await.expect("opened");
        put_bound(&repository, 5).await;
        self.inner.delete(&layout::log_entry(WRITER, 3)).await.expect("deleted");
        let head = EntryHead {
            format: FORMAT.to_owned(),
            write_id: WriteId(clock.random()),
            generation: WRITER,
            number: 3,
            at: clock.now(),
            previous: None,
            content: Content::Seal { by: SLOW, released: false },
        };
        let (body, _) = entry::encode(&head, None).expect("encoded");
        assert_eq!(self.inner.create(&layout::log_entry(WRITER, 3), &body).await.expect("put"), Created::Now);
    }
}

#[async_trait]
impl Store for Meddling {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        self.inner.create(key, body).await
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        self.inner.read(key, range).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let (this, prefix, after) = (self.clone(), prefix.to_owned(), after.map(str::to_owned));
        futures::stream::once(async move {
            if this.armed.swap(false, Ordering::Relaxed) {
                this.meddle().await;
            }
            this.inner.list(&prefix, after.as_deref())
        })
        .flatten()
        .boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        self.inner.list_level(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key).await
    }
}

async fn put_bound(repository: &Repository, number: u64) {
    let bound = Bound::at(number, Some(at(100 + 10 * (number - 2))));
    repository
        .store()
        .create(
            &layout::collected(WRITER, number),
            &Body::from(super::super::document::write(&bound).expect("written")),
        )
        .await
        .expect("put");
}

fn at(lsn: u64) -> Position {
    Position { timeline: Timeline(1), lsn: Lsn(lsn) }
}

/// A log of an opening and five times ten bytes; the first two entries are collected.
async fn log() -> (Repository, Meddling) {
    let store = Meddling { inner: Arc::new(Adapter::memory()), armed: Arc::default() };
    let clock = Clock::system();
    let (repository, _) = Repository::init(Arc::new(store.clone()), Codec::default(), &clock).await.expect("made");
    let heartbeat = Duration::from_secs(30);
    let mut log = Appender::open(repository.clone(), WRITER, at(100), heartbeat, Checks::ALL).expect("opened");
    for byte in 0..5u8 {
        let frame = Codec::default().compress(&[byte; 10]).expect("compressed");
        log.append_wal(&[byte; 10], Bytes::from(frame)).expect("appended");
    }
    while log.in_flight() > 0 {
        log.landed().await.expect("landed");
    }
    let bound = Bound::at(3, Some(at(110)));
    repository.collect_log(WRITER, 1, &bound).await.expect("collected");
    (repository, store)
}

#[tokio::test]
async fn a_late_seal_ends_nothing_for_whoever_looks_at_that_moment() {
    let (repository, store) = log().await;
    store.armed.store(true, Ordering::Relaxed);
    let view = repository.log(WRITER).await.expect("looked");
    assert_eq!((view.seal.as_ref(), view.next, view.end()), (None, 7, Some(at(150))));
}

#[tokio::test]
async fn a_late_seal_is_not_taken_for_damage_by_whoever_reads_at_that_moment() {
    let (repository, store) = log().await;
    let run = repository.log_and_run(WRITER).await.expect("looked").1.expect("has WAL");
    store.meddle().await;
    let error = repository.read_log(&run, run.start, run.end, |_, _| Ok(())).await.expect_err("it is gone");
    assert!(error.kind() == Kind::Damaged && error.is_retryable(), "{error:?}");
    let run = repository.log_and_run(WRITER).await.expect("looked").1.expect("has WAL");
    repository.read_log(&run, run.start, run.end, |_, _| Ok(())).await.expect("read");
}
