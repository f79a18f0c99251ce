//! A log that grows under its reader: entry by entry, from where a look has left it. Nothing is listed.
//!
//! What is read here is final: an entry whose number follows on the ones before lies in front of every seal that can
//! still come, and of one that came before only its own number tells. So the reader stops at any seal, and looks again.

use futures::{StreamExt, TryStreamExt};

use super::{Content, LogRun, LogView};
use crate::error::Result;
use crate::model::Lsn;
use crate::repository::codec::Sha256;
use crate::repository::{Repository, layout};

/// Entries read at once when there are many: of 4 MB at most each.
const AT_ONCE: u64 = 8;

/// The reading end.
#[derive(Debug, Clone)]
pub struct Tail {
    /// What was read so far; it begins where it ends while there was no WAL.
    pub run: LogRun,
    previous: Option<Sha256>,
    at_once: u64,
}

/// What came since.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Grown {
    /// Entries, those without WAL too.
    pub entries: u64,
    /// WAL that continues what was read before, in pieces that do not cross the edge of a segment.
    pub wal: Vec<(Lsn, Vec<u8>)>,
    /// The next number has a seal. Whether it ends the log, only a look tells.
    pub sealed: bool,
}

impl Repository {
    /// The reading end of a log that was looked at just now; `None` when it was never opened.
    pub async fn tail(&self, view: &LogView) -> Result<Option<Tail>> {
        let run = self.extent(view).await?;
        Ok(run.map(|run| Tail { run, previous: None, at_once: 1 }))
    }

    /// Reads the entries that come next. None there says that nothing is new only for ten minutes since the last time:
    /// later, it may have come and have been collected. Dropping the future loses nothing.
    pub async fn grow(&self, tail: &mut Tail) -> Result<Grown> {
        let (generation, first) = (tail.run.generation, tail.run.next);
        let numbers: Vec<u64> = (first..first + tail.at_once).collect();
        let reads = numbers.into_iter().map(|number| self.entry_if_there(generation, number));
        let entries: Vec<_> = futures::stream::iter(reads).buffered(AT_ONCE as usize).try_collect().await?;
        let mut grown = Grown::default();
        for entry in entries.into_iter().map_while(|entry| entry) {
            if entry.head.is_seal() {
                grown.sealed = true;
                break;
            }
            let run = &mut tail.run;
            let continues = tail.previous.is_none_or(|previous| entry.head.previous == Some(previous));
            match entry.head.content {
                Content::Wal { timeline, start, end, .. }
                    if continues && (timeline, start) == (run.timeline, run.end) =>
                {
                    run.end = end;
                    grown.wal.push((start, entry.plain));
                }
                Content::Heartbeat { timeline, lsn } if continues && (timeline, lsn) == (run.timeline, run.end) => (),
                _ => {
                    let key = layout::log_entry(generation, run.next);
                    return Err(self.corrupt(&key, "it does not continue the entry before it"));
                }
            }
            (run.next, run.at) = (run.next + 1, entry.head.at);
            tail.previous = Some(entry.sha256);
            grown.entries += 1;
        }
        // One request while nothing happens; more when there is much to come.
        tail.at_once = if grown.entries == tail.at_once { (tail.at_once * 2).min(AT_ONCE) } else { 1 };
        Ok(grown)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::model::{Generation, Timeline};
    use crate::repository::Codec;
    use crate::repository::log::{Appender, Checks, Position, Sealer};
    use crate::storage::Adapter;

    async fn opened() -> (Repository, Appender) {
        let store = Arc::new(Adapter::memory());
        let (repository, _) = Repository::init(store, Codec::default(), &Clock::system()).await.expect("made");
        let start = Position { timeline: Timeline(1), lsn: Lsn(100) };
        let heartbeat = Duration::from_secs(30);
        let mut log = Appender::open(repository.clone(), Generation(1), start, heartbeat, Checks::ALL).expect("opened");
        log.landed().await.expect("landed");
        (repository, log)
    }

    async fn write(log: &mut Appender, plain: &[u8]) {
        let frame = Codec::default().compress(plain).expect("compressed");
        log.append_wal(plain, Bytes::from(frame)).expect("appended");
        log.landed().await.expect("landed");
    }

    async fn tail_of(repository: &Repository) -> Tail {
        let view = repository.log(Generation(1)).await.expect("looked");
        repository.tail(&view).await.expect("looked").expect("opened")
    }

    #[tokio::test]
    async fn what_the_writer_adds_is_read_in_order_and_nothing_twice() {
        let (repository, mut log) = opened().await;
        let mut tail = tail_of(&repository).await;
        assert_eq!(repository.grow(&mut tail).await.expect("read"), Grown::default());
        write(&mut log, b"one").await;
        log.append_heartbeat().expect("appended");
        log.landed().await.expect("landed");
        write(&mut log, b"two").await;
        let mut wal = Vec::new();
        let mut entries = 0;
        for _ in 0..3 {
            let grown = repository.grow(&mut tail).await.expect("read");
            entries += grown.entries;
            wal.extend(grown.wal);
        }
        assert_eq!(wal, [(Lsn(100), b"one".to_vec()), (Lsn(103), b"two".to_vec())]);
        assert_eq!((entries, tail.run.start, tail.run.end, tail.run.next), (3, Lsn(100), Lsn(106), 5));
    }

    #[tokio::test]
    async fn nothing_is_read_past_a_seal() {
        let (repository, mut log) = opened().await;
        write(&mut log, b"acknowledged").await;
        let mut tail = tail_of(&repository).await;
        let sealer = Sealer { generation: Generation(2), checks: Checks::ALL };
        sealer.seal(&repository, Generation(1)).await.expect("sealed");
        for _ in 0..2 {
            let grown = repository.grow(&mut tail).await.expect("read");
            assert_eq!(grown, Grown { sealed: true, ..Grown::default() });
        }
        assert_eq!(tail.run.end, Lsn(112));
    }

    #[tokio::test]
    async fn another_logs_entry_in_the_next_place_is_refused() {
        let (repository, mut log) = opened().await;
        let mut tail = tail_of(&repository).await;
        write(&mut log, b"one").await;
        tail.run.end = Lsn(101);
        assert!(repository.grow(&mut tail).await.is_err(), "it does not begin where the log ended");
    }
}
