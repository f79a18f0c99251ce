//! An object store, as little of it as we need: create, read, list, delete. Knows nothing of backups.
//!
//! Three answers, never two: a read says *present* (`Some`), *proven absent* (`None`) or *unknown* (an error). Nothing
//! may treat an error as absence. Writing is create-only: there is no call that could overwrite.

mod adapter;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
mod credentials;
mod delete;
mod failure;
#[cfg(any(test, feature = "testing"))]
pub mod faulty;
mod location;
mod lock;
mod probe;
mod read_only;
mod retry;
mod s3;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::model::Timestamp;

pub use adapter::Adapter;
pub use delete::{Deleted, Refused, delete_if_allowed};
pub use location::{Location, Scheme};
pub use lock::{Lock, LockMode};
pub use probe::probe;
pub use read_only::ReadOnly;
pub use retry::{Policy, Retrying};
pub use s3::S3Settings;

/// Whether a create-only write made the object or found one there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    Now,
    AlreadyThere,
}

/// A part of an object (or all of it) and the size of the whole.
#[derive(Debug, Clone)]
pub struct Chunk {
    pub bytes: Bytes,
    pub object_size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub size: u64,
    /// When it was written, by the store's clock: to be compared with nothing but other objects of the same store.
    pub modified: Timestamp,
}

/// One level of the key space: "directories" without their trailing slash, and objects.
#[derive(Debug, Clone, Default)]
pub struct Level {
    pub directories: Vec<String>,
    pub entries: Vec<Entry>,
}

/// The bytes of a new object, in pieces so that a pack need not be copied together.
#[derive(Debug, Clone, Default)]
pub struct Body(Vec<Bytes>);

impl Body {
    pub fn len(&self) -> u64 {
        self.0.iter().map(|piece| piece.len() as u64).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    pub fn pieces(&self) -> &[Bytes] {
        &self.0
    }

    pub fn push(&mut self, piece: Bytes) {
        self.0.push(piece);
    }

    /// The first `count` bytes, or all when there are fewer.
    pub fn head(&self, count: usize) -> Vec<u8> {
        let mut head = Vec::with_capacity(count.min(self.len() as usize));
        for piece in &self.0 {
            head.extend_from_slice(&piece[..piece.len().min(count - head.len())]);
        }
        head
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body(vec![bytes.into()])
    }
}

/// The store as the rest of the program sees it. Keys are relative to the repository's prefix and never start with `/`.
///
/// Implementations must be linearisable per key (S3, GCS and Azure are since 2020): a read that starts after a write
/// ended sees it, a listing too.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync {
    /// The URL of the key, for messages.
    fn url(&self, key: &str) -> String;

    /// Makes the object if the key is free. Every body starts with random bytes of its own (a write id within the
    /// first [`HEAD`] bytes), which is how an unknown outcome is settled; see [`Retrying`].
    async fn create(&self, key: &str, body: &Body) -> Result<Created>;

    /// Reads `range` of the object, cut short at its end; `None` only when the key is proven to be free.
    async fn read(&self, key: &str, range: std::ops::Range<u64>) -> Result<Option<Chunk>>;

    /// Objects under `prefix` (a "directory" without trailing slash, or empty), keys after `after` only, in key order.
    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>>;

    /// What is directly under `prefix`.
    async fn list_level(&self, prefix: &str) -> Result<Level>;

    /// Deletes the object; a free key is fine.
    async fn delete(&self, key: &str) -> Result<()>;

    /// For how long what is made is locked, if it is; then [`Store::renew`] is worth it.
    fn locks(&self) -> Option<std::time::Duration> {
        None
    }

    /// Whether the store says that an object is locked: one that was written with a lock is, if the store keeps its word.
    async fn is_locked(&self, key: &str) -> Result<bool> {
        let _ = key;
        Ok(false)
    }

    /// Has the lock of an object that is there last about as long as that of one that is made now: three quarters of that are left
    /// alone. Nothing where nothing is locked.
    async fn renew(&self, key: &str) -> Result<()> {
        let _ = key;
        Ok(())
    }
}

/// How many bytes of an object tell whose write it is.
pub const HEAD: u64 = 4096;

/// Reads all of an object that is known to be small, at most `limit` bytes; a larger one is damaged, not truncated.
pub async fn read_small(store: &dyn Store, key: &str, limit: u64) -> Result<Option<Bytes>> {
    let Some(chunk) = store.read(key, 0..limit).await? else { return Ok(None) };
    if chunk.object_size > limit {
        return Err(Error::damaged(format!(
            "{} is {} bytes long, more than the {limit} it can have",
            store.url(key),
            chunk.object_size
        )));
    }
    Ok(Some(chunk.bytes))
}

/// Settings of the stores that the URL does not carry; filled by `cli` from the environment and the config file.
#[derive(Debug, Clone, Default)]
pub struct StoreSettings {
    pub s3: S3Settings,
    /// Environment variables of the Google and Azure clients (`GOOGLE_…`, `AZURE_…`), passed on as they are.
    pub google: Vec<(String, String)>,
    pub azure: Vec<(String, String)>,
    pub retry: Policy,
}

/// Opens the store of a URL; nothing is requested yet.
pub fn open(location: &Location, settings: &StoreSettings, clock: &Clock, events: &Events) -> Result<Arc<dyn Store>> {
    if settings.s3.lock.is_some() && !matches!(location.scheme, Scheme::S3 { .. }) {
        events.warning(format!(
            "nothing is locked in {location}: --lock is for S3, other stores have policies of their own"
        ));
    }
    let adapter = match &location.scheme {
        Scheme::S3 { bucket } => s3::open(location, bucket, &settings.s3, clock)?,
        Scheme::Google { bucket } => adapter::open_google(location, bucket, &settings.google)?,
        Scheme::Azure { container } => adapter::open_azure(location, container, &settings.azure)?,
        Scheme::File { directory } => adapter::open_file(directory)?,
        Scheme::Memory => Adapter::memory(),
    };
    Ok(Arc::new(Retrying::new(Arc::new(adapter), settings.retry, clock.clone(), events.clone())))
}
