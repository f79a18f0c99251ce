//! Frames that lie side by side in a pack, fetched with one request; and patches, fetched for some regions together, which
//! stay in memory until these have come.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Kind, Result};
use crate::model::PackId;
use crate::repository::Repository;
use crate::repository::pack::FrameRef;

/// How much a request asks for at most.
const SPAN_MAX: u64 = 4 << 20;

/// Requests for patches at once.
const PATCH_REQUESTS: usize = 3;

/// Bytes between two wanted frames that are cheaper to read than to ask around.
const SKIP_MAX: u64 = 128 << 10;

/// A stretch of a pack.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub pack: PackId,
    number: u32,
    start: u64,
    end: u64,
}

impl Span {
    /// Just a frame.
    fn of(packs: &[PackId], frame: FrameRef) -> Span {
        Span { pack: packs[frame.pack as usize], number: frame.pack, start: frame.offset, end: frame.end() }
    }

    /// Whether the frame is near enough behind its end.
    fn takes(&self, frame: FrameRef) -> bool {
        frame.pack == self.number && frame.offset <= self.end + SKIP_MAX && frame.end() <= self.start + SPAN_MAX
    }

    fn add(&mut self, frame: FrameRef) {
        self.end = self.end.max(frame.end());
    }

    pub async fn read(&self, repository: &Repository) -> Result<Bytes> {
        repository.read_pack(self.pack, self.start..self.end).await
    }

    /// A frame in it, of what was read.
    pub fn frame(&self, bytes: &Bytes, frame: FrameRef) -> Bytes {
        let start = (frame.offset - self.start) as usize;
        bytes.slice(start..start + frame.stored as usize)
    }
}

/// What lies side by side in a pack, by place; `frame` says where.
pub fn neighbours<T>(packs: &[PackId], mut all: Vec<T>, frame: impl Fn(&T) -> FrameRef) -> Vec<(Span, Vec<T>)> {
    all.sort_by_key(|one| (frame(one).pack, frame(one).offset));
    let mut spans: Vec<(Span, Vec<T>)> = Vec::new();
    for one in all {
        let frame = frame(&one);
        match spans.last_mut().filter(|(span, _)| span.takes(frame)) {
            Some((span, together)) => {
                span.add(frame);
                together.push(one);
            }
            None => spans.push((Span::of(packs, frame), vec![one])),
        }
    }
    spans
}

/// Where a frame is.
pub type Place = (u32, u64);

pub fn place(frame: FrameRef) -> Place {
    (frame.pack, frame.offset)
}

/// Patches, read, with the packs they are of; or what is wrong with those packs.
type Fetched = HashMap<Place, Result<(PackId, Bytes), Arc<Error>>>;

/// Frames with patches of some regions, as they are stored.
#[derive(Debug)]
pub struct Patches {
    spans: Vec<(Span, Vec<FrameRef>)>,
    fetched: OnceCell<(Fetched, OwnedSemaphorePermit)>,
    /// How many of its kind may be fetched at once, this one among them until it is done with.
    room: Arc<Semaphore>,
    /// Those that are needed next, until they are asked for: so nobody waits for them.
    next: Mutex<Option<Arc<Patches>>>,
}

impl Patches {
    pub fn of(
        packs: &[PackId],
        frames: Vec<FrameRef>,
        (next, room): (Option<Arc<Patches>>, Arc<Semaphore>),
    ) -> Patches {
        let spans = neighbours(packs, frames, |frame| *frame);
        Patches { spans, fetched: OnceCell::new(), room, next: Mutex::new(next) }
    }

    /// A frame of those that were fetched, and its pack.
    pub fn get(&self, frame: FrameRef) -> Result<&(PackId, Bytes)> {
        match self.fetched.get().and_then(|(fetched, _)| fetched.get(&place(frame))) {
            Some(Ok(found)) => Ok(found),
            Some(Err(damage)) => {
                let error = Error::damaged(damage.to_string());
                Err(damage.hint_text().into_iter().fold(error, |error, hint| error.hint(hint)))
            }
            None => Err(Error::internal("a patch was not fetched")),
        }
    }

    /// The first one who asks has them fetched, and the next ones after them; the others wait.
    pub async fn fetch_all(&self, repository: &Repository) -> Result<()> {
        self.fetched.get_or_try_init(|| self.fetch(repository)).await?;
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(next) = next {
            let repository = repository.clone();
            // Should it fail, it is tried again by whoever needs them, who says so.
            tokio::spawn(async move { next.fetched.get_or_try_init(|| next.fetch(&repository)).await.map(drop) });
        }
        Ok(())
    }

    /// What is damaged stays so, and is told to whoever needs it.
    async fn fetch(&self, repository: &Repository) -> Result<(Fetched, OwnedSemaphorePermit)> {
        let room = Arc::clone(&self.room).acquire_owned().await;
        let room = room.map_err(|e| Error::internal("no room for patches").source(e))?;
        let reads = self.spans.iter().map(|(span, frames)| async move {
            let bytes = match span.read(repository).await {
                Err(error) if error.kind() == Kind::Damaged && !error.is_retryable() => Err(Arc::new(error)),
                read => Ok(read?),
            };
            // Copied, so that what lies between them does not stay in memory.
            let copy = |frame: &FrameRef| {
                let bytes = bytes.as_ref().map_err(Arc::clone)?;
                Ok((span.pack, Bytes::copy_from_slice(&span.frame(bytes, *frame))))
            };
            let frames = frames.iter().map(|frame| (place(*frame), copy(frame)));
            Ok::<_, Error>(frames.collect::<Vec<_>>())
        });
        let reads: Vec<_> = reads.collect();
        let mut fetched = Fetched::default();
        let mut reads = futures::stream::iter(reads).buffer_unordered(PATCH_REQUESTS);
        while let Some(frames) = reads.try_next().await? {
            fetched.extend(frames);
        }
        Ok((fetched, room))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::codec::Sha256;

    fn frame(pack: u32, offset: u64, stored: u32) -> FrameRef {
        FrameRef { pack, offset, stored, sha256: Sha256([0; 32]) }
    }

    #[test]
    fn neighbours_are_fetched_together_as_far_as_that_is_cheaper() {
        let packs = [PackId([1; 16]), PackId([2; 16])];
        let far = 100 + SKIP_MAX;
        let frames = vec![
            frame(1, 50, 10),
            frame(0, far, 10),
            frame(0, 0, 100),
            frame(0, far + 11 + SKIP_MAX, 5),
            frame(1, 60, SPAN_MAX as u32 - 10),
            frame(1, 50 + SPAN_MAX, 1),
        ];
        let patches = Patches::of(&packs, frames, (None, Arc::new(Semaphore::new(1))));
        let of = |(span, frames): &(Span, Vec<FrameRef>)| (span.number, span.start, span.end, frames.len());
        let spans: Vec<_> = patches.spans.iter().map(of).collect();
        let one = far + 11 + SKIP_MAX;
        let expected = [
            (0, 0, far + 10, 2),
            (0, one, one + 5, 1),
            (1, 50, 50 + SPAN_MAX, 2),
            (1, 50 + SPAN_MAX, 51 + SPAN_MAX, 1),
        ];
        assert_eq!(spans, expected);
        assert_eq!((patches.spans[0].0.pack, patches.spans[2].0.pack), (packs[0], packs[1]));
    }
}
