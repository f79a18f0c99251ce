//! Bounded retries with a deadline on every request, and the settling of unknown outcomes.
//!
//! A create whose answer was lost may have happened. When a later attempt finds the key taken, the object's first
//! bytes are read back: they hold the write id of whoever wrote it, so either it is our own write or somebody else's.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::{Body, Chunk, Created, Entry, HEAD, Level, Store};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};

/// How long to try. All bounds are stated here.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// A request (all its attempts) is given up after this long, plus the time its bytes may take.
    pub patience: Duration,
    /// One attempt is given up after this long, plus the time its bytes may take.
    pub attempt: Duration,
    /// Bytes a second below which a transfer counts as stalled.
    pub slowest: u64,
    pub first_wait: Duration,
    pub longest_wait: Duration,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            patience: Duration::from_secs(60),
            attempt: Duration::from_secs(20),
            slowest: 256 << 10,
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(5),
        }
    }
}

impl Policy {
    fn transfer(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.slowest.max(1) as f64)
    }

    /// Exponential with jitter: half the wait is certain, half is chance, so that clients do not come in step.
    fn wait(&self, attempt: u32, chance: f64) -> Duration {
        let doubled = self.first_wait.saturating_mul(1 << attempt.min(16).saturating_sub(1));
        doubled.min(self.longest_wait).mul_f64(0.5 + chance / 2.0)
    }
}

#[derive(Debug, Clone)]
pub struct Retrying {
    inner: Arc<dyn Store>,
    policy: Policy,
    clock: Clock,
    events: Events,
}

impl Retrying {
    pub fn new(inner: Arc<dyn Store>, policy: Policy, clock: Clock, events: Events) -> Retrying {
        Retrying { inner, policy, clock, events }
    }

    /// Runs attempts until one gives an answer, one fails for good, or patience ends.
    async fn attempts<T, F>(&self, request: &str, bytes: u64, mut once: impl FnMut(u32) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let transfer = self.policy.transfer(bytes);
        let deadline = self.clock.monotonic() + self.policy.patience + transfer;
        for attempt in 1.. {
            let left = deadline.saturating_sub(self.clock.monotonic());
            let limit = left.min(self.policy.attempt + transfer);
            let error = match self.clock.within(limit, once(attempt)).await {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(error)) if !error.is_retryable() => return Err(error),
                Some(Err(error)) => error,
                None => {
                    Error::new(Kind::Unreachable, format!("{request}: no answer within {:.0} s", limit.as_secs_f64()))
                        .hint("check the network between this machine and the store, then run the command again")
                }
            };
            let wait = self.policy.wait(attempt, self.clock.random_share());
            if self.clock.monotonic() + wait >= deadline {
                return Err(error.context(format!("gave up after {attempt} attempts")));
            }
            self.events.emit(Event::StoreRetry {
                request: request.to_owned(),
                attempt,
                wait,
                error: error.to_string(),
            });
            self.clock.sleep(wait).await;
        }
        Err(Error::internal("retries without an end"))
    }

    /// Whether the object at `key` is the one `body` was to become.
    async fn is_ours(&self, key: &str, body: &Body) -> Result<bool> {
        let there = self.inner.read(key, 0..HEAD).await?;
        Ok(there.is_some_and(|chunk| chunk.object_size == body.len() && chunk.bytes == body.head(HEAD as usize)))
    }
}

#[async_trait]
impl Store for Retrying {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        let request = format!("PUT {}", self.url(key));
        self.attempts(&request, body.len(), |attempt| async move {
            match self.inner.create(key, body).await? {
                // An earlier attempt may have been the one that made it.
                Created::AlreadyThere if attempt > 1 && self.is_ours(key, body).await? => Ok(Created::Now),
                answer => Ok(answer),
            }
        })
        .await
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        let request = format!("GET {}", self.url(key));
        let bytes = range.end.saturating_sub(range.start);
        self.attempts(&request, bytes, |_| self.inner.read(key, range.clone())).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let start = Listing {
            retrying: self.clone(),
            prefix: prefix.to_owned(),
            after: after.map(str::to_owned),
            open: None,
            ended: false,
        };
        futures::stream::unfold(start, |mut listing| async move {
            let next = listing.next().await?;
            Some((next, listing))
        })
        .boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        let request = format!("LIST {}", self.url(prefix));
        self.attempts(&request, 0, |_| self.inner.list_level(prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let request = format!("DELETE {}", self.url(key));
        self.attempts(&request, 0, |_| self.inner.delete(key)).await
    }

    fn locks(&self) -> Option<std::time::Duration> {
        self.inner.locks()
    }

    async fn is_locked(&self, key: &str) -> Result<bool> {
        let request = format!("HEAD {}", self.url(key));
        self.attempts(&request, 0, |_| self.inner.is_locked(key)).await
    }

    async fn renew(&self, key: &str) -> Result<()> {
        let request = format!("PUT {}?retention", self.url(key));
        self.attempts(&request, 0, |_| self.inner.renew(key)).await
    }
}

/// A listing that goes on after the last key it gave when a page of it fails.
struct Listing {
    retrying: Retrying,
    prefix: String,
    after: Option<String>,
    open: Option<BoxStream<'static, Result<Entry>>>,
    ended: bool,
}

impl Listing {
    async fn next(&mut self) -> Option<Result<Entry>> {
        if self.ended {
            return None;
        }
        let request = format!("LIST {}", self.retrying.url(&self.prefix));
        let mut open = self.open.take();
        let (inner, prefix, after) = (&self.retrying.inner, &self.prefix, self.after.as_deref());
        // A stream that has failed is dropped with its attempt, and the next one starts after the last key.
        let page = |_| {
            let mut stream = open.take().unwrap_or_else(|| inner.list(prefix, after));
            async move {
                let next = stream.next().await.transpose()?;
                Ok((stream, next))
            }
        };
        match self.retrying.attempts(&request, 0, page).await {
            Ok((stream, Some(entry))) => {
                self.open = Some(stream);
                self.after = Some(entry.key.clone());
                Some(Ok(entry))
            }
            Ok((_, None)) => {
                self.ended = true;
                None
            }
            Err(error) => {
                self.ended = true;
                Some(Err(error))
            }
        }
    }
}
