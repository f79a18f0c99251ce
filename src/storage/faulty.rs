//! A store that misbehaves on purpose, for tests: each fault is asked for, none happens by itself.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;

use super::{Body, Chunk, Created, Entry, Level, Store};
use crate::error::{Error, Kind, Result};

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It works.
    None,
    /// It is refused before anything happened, as a 503 or a 409 would.
    Refused,
    /// It happens, and the answer is lost.
    AnswerLost,
    /// Credentials do not hold: no retry will help.
    Denied,
}

/// Applies the queued faults to the next requests, one each, then works.
#[derive(Debug, Clone)]
pub struct Faulty {
    inner: Arc<dyn Store>,
    faults: Arc<Mutex<VecDeque<Fault>>>,
    /// When set, every create is answered as if the key had been free, as a store without conditions would.
    pub ignores_conditions: bool,
    /// What begins with one of these cannot be deleted, as under a lock.
    locked: Arc<Mutex<Vec<String>>>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Store>) -> Faulty {
        Faulty { inner, faults: Arc::default(), ignores_conditions: false, locked: Arc::default() }
    }

    pub fn queue(&self, faults: &[Fault]) {
        self.lock().extend(faults);
    }

    /// Leaves out the faults that were not met.
    pub fn forget(&self) {
        self.lock().clear();
    }

    /// From now on just what begins with one of these is locked.
    pub fn keep(&self, beginnings: &[&str]) {
        let mut locked = self.locked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *locked = beginnings.iter().map(|beginning| (*beginning).to_owned()).collect();
    }

    fn keeps(&self, key: &str) -> bool {
        let locked = self.locked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        locked.iter().any(|beginning| key.starts_with(beginning))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Fault>> {
        self.faults.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn with_fault<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let fault = self.lock().pop_front().unwrap_or(Fault::None);
        match fault {
            Fault::None => request.await,
            Fault::Refused => Err(Error::new(Kind::Unreachable, "503 on purpose").retryable()),
            Fault::Denied => Err(Error::new(Kind::Denied, "403 on purpose")),
            Fault::AnswerLost => {
                request.await?;
                Err(Error::new(Kind::Unreachable, "connection lost on purpose").retryable())
            }
        }
    }
}

#[async_trait]
impl Store for Faulty {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        let created = self.with_fault(self.inner.create(key, body)).await?;
        Ok(if self.ignores_conditions { Created::Now } else { created })
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        self.with_fault(self.inner.read(key, range)).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        self.inner.list(prefix, after)
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        self.with_fault(self.inner.list_level(prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        if self.keeps(key) {
            return Err(Error::new(Kind::Denied, format!("{}: locked on purpose", self.url(key))));
        }
        self.with_fault(self.inner.delete(key)).await
    }
}
