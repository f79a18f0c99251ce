//! The `object_store` library behind our trait: keys under a prefix, its errors read by [`super::failure`].

use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};

use super::failure::{Meaning, meaning};
use super::lock::{Lock, Look};
use super::{Body, Chunk, Created, Entry, Level, Location, Store};
use crate::clock::Clock;
use crate::error::{Error, IoContext, Kind, Result};
use crate::model::Timestamp;

const LOCK_HINT: &str = "a lock was asked for (--lock): the bucket must have Object Lock, and you s3:PutObjectRetention and s3:GetObjectRetention";

/// One of the library's stores, seen through the repository's prefix.
#[derive(Debug, Clone)]
pub struct Adapter {
    inner: Arc<dyn ObjectStore>,
    /// The repository's address, for messages.
    base: String,
    prefix: String,
    storage_class: Option<String>,
    lock: Option<(Lock, Clock)>,
    /// Files and memory: errors are said by type, and listings come in no order.
    local: bool,
}

impl Adapter {
    pub(super) fn remote(inner: Arc<dyn ObjectStore>, location: &Location, storage_class: Option<String>) -> Adapter {
        Adapter {
            inner,
            base: location.to_string(),
            prefix: location.prefix.clone(),
            storage_class,
            lock: None,
            local: false,
        }
    }

    /// The same, with what is written locked.
    pub(super) fn locking(self, lock: Lock, clock: &Clock) -> Adapter {
        Adapter { lock: Some((lock, clock.clone())), ..self }
    }

    pub fn memory() -> Adapter {
        let inner = Arc::new(object_store::memory::InMemory::new());
        Adapter {
            inner,
            base: "memory://".to_owned(),
            prefix: String::new(),
            storage_class: None,
            lock: None,
            local: true,
        }
    }

    fn path(&self, key: &str) -> Path {
        match (self.prefix.is_empty(), key.is_empty()) {
            (true, _) => Path::from(key),
            (false, true) => Path::from(self.prefix.as_str()),
            (false, false) => Path::from(format!("{}/{key}", self.prefix)),
        }
    }

    fn key(&self, path: &Path) -> String {
        let full = path.as_ref();
        let under = full.strip_prefix(self.prefix.as_str()).unwrap_or(full);
        under.trim_start_matches('/').to_owned()
    }

    fn entry(&self, meta: &object_store::ObjectMeta) -> Entry {
        let modified = Timestamp::from_unix_micros(meta.last_modified.timestamp_micros());
        Entry { key: self.key(&meta.location), size: meta.size, modified }
    }

    fn failed(&self, raw: object_store::Error, key: &str) -> Error {
        match meaning(raw, &self.url(key), self.local) {
            Meaning::Failed(error) => error,
            Meaning::Absent => Error::not_found(format!("{}: not there", self.url(key))),
            Meaning::Taken => Error::new(Kind::Conflict, format!("{}: already there", self.url(key))),
        }
    }
}

#[async_trait]
impl Store for Adapter {
    fn url(&self, key: &str) -> String {
        format!("{}/{key}", self.base)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        let mut options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        if let Some(class) = &self.storage_class {
            options.attributes = Attributes::from_iter([(Attribute::StorageClass, class.clone())]);
        }
        let hold = self.lock.as_ref().and_then(|(lock, clock)| lock.hold(key, clock));
        let holds = hold.is_some();
        if let Some(hold) = hold {
            options.extensions.insert(hold);
        }
        let payload: PutPayload = body.pieces().iter().cloned().collect();
        match self.inner.put_opts(&self.path(key), payload, options).await {
            Ok(_) => Ok(Created::Now),
            Err(raw) => match meaning(raw, &self.url(key), self.local) {
                Meaning::Taken => Ok(Created::AlreadyThere),
                Meaning::Failed(error) if holds && matches!(error.kind(), Kind::Refused | Kind::Denied) => {
                    Err(error.hint(LOCK_HINT))
                }
                Meaning::Failed(error) => Err(error),
                Meaning::Absent => Err(Error::not_found(format!("{}: the place to write to is gone", self.url(key)))),
            },
        }
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let answer = match self.inner.get_opts(&self.path(key), options).await {
            Ok(answer) => answer,
            Err(raw) => {
                return match meaning(raw, &self.url(key), self.local) {
                    Meaning::Absent => Ok(None),
                    Meaning::Failed(error) => Err(error),
                    Meaning::Taken => Err(Error::internal(format!("{}: a read answered 'exists'", self.url(key)))),
                };
            }
        };
        let object_size = answer.meta.size;
        let expected = answer.range.end - answer.range.start;
        let bytes = answer.bytes().await.map_err(|raw| self.failed(raw, key))?;
        if bytes.len() as u64 != expected {
            let cut = format!("{}: got {} of {expected} bytes", self.url(key), bytes.len());
            return Err(Error::new(Kind::Unreachable, cut).retryable());
        }
        Ok(Some(Chunk { bytes, object_size }))
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let this = self.clone();
        let path = self.path(prefix);
        let prefix = prefix.to_owned();
        let raw = match after {
            Some(after) => self.inner.list_with_offset(Some(&path), &self.path(after)),
            None => self.inner.list(Some(&path)),
        };
        let sorts = !self.local;
        let after = after.map(str::to_owned);
        let entries = raw.filter_map(move |meta| {
            let entry = match meta {
                Ok(meta) => Ok(this.entry(&meta)),
                Err(raw) => Err(this.failed(raw, &prefix)),
            };
            // Azure starts with the key itself.
            let wanted = entry.as_ref().map_or(true, |entry| after.as_ref().is_none_or(|after| entry.key > *after));
            std::future::ready(wanted.then_some(entry))
        });
        if sorts {
            return entries.boxed();
        }
        // A directory walk has no order; local repositories are small enough to sort.
        futures::stream::once(async move {
            let mut all: Vec<Entry> = entries.try_collect().await?;
            all.sort_by(|a, b| a.key.cmp(&b.key));
            Ok::<_, Error>(futures::stream::iter(all.into_iter().map(Ok)))
        })
        .try_flatten()
        .boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        let listed = self.inner.list_with_delimiter(Some(&self.path(prefix))).await;
        let listed = listed.map_err(|raw| self.failed(raw, prefix))?;
        let mut level = Level {
            directories: listed.common_prefixes.iter().map(|path| self.key(path)).collect(),
            entries: listed.objects.iter().map(|meta| self.entry(meta)).collect(),
        };
        level.directories.sort();
        level.entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(level)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        match self.inner.delete(&self.path(key)).await {
            Ok(()) => Ok(()),
            Err(raw) => match meaning(raw, &self.url(key), self.local) {
                Meaning::Absent => Ok(()),
                Meaning::Failed(error) => Err(error),
                Meaning::Taken => Err(Error::internal(format!("{}: a delete answered 'exists'", self.url(key)))),
            },
        }
    }

    fn locks(&self) -> Option<std::time::Duration> {
        self.lock.as_ref().map(|(lock, _)| lock.keep)
    }

    async fn is_locked(&self, key: &str) -> Result<bool> {
        let (look, mut options) = (Look::default(), GetOptions { head: true, ..GetOptions::default() });
        options.extensions.insert(look.clone());
        self.inner.get_opts(&self.path(key), options).await.map_err(|raw| self.failed(raw, key))?;
        Ok(look.0.get().is_some())
    }

    async fn renew(&self, key: &str) -> Result<()> {
        let renewal = self.lock.as_ref().and_then(|(lock, clock)| lock.renewal(key, clock));
        let Some(renewal) = renewal else { return Ok(()) };
        let mut options = GetOptions { head: true, ..GetOptions::default() };
        options.extensions.insert(renewal);
        let Err(raw) = self.inner.get_opts(&self.path(key), options).await else { return Ok(()) };
        let failed = self.failed(raw, key);
        // An answer without a body does not tell who says that it is not there.
        match failed.is_retryable() || self.read(key, 0..1).await?.is_some() {
            true => Err(failed.context("its lock could not be renewed").hint(LOCK_HINT)),
            false => Ok(()),
        }
    }
}

pub(super) fn open_file(directory: &FilePath) -> Result<Adapter> {
    if !directory.is_dir() {
        return Err(Error::not_found(format!("file://{}: there is no such directory", directory.display()))
            .hint(format!("create it (mkdir -p '{}'), or mount the disk it is on", directory.display())));
    }
    let inner = object_store::local::LocalFileSystem::new_with_prefix(directory)
        .map_err(|e| std::io::Error::other(e.to_string()))
        .on("open directory", directory)?
        // An object that was reported written must be there after a power cut.
        .with_fsync(true);
    Ok(Adapter {
        lock: None,
        inner: Arc::new(inner),
        base: format!("file://{}", directory.display()),
        prefix: String::new(),
        storage_class: None,
        local: true,
    })
}

/// The library must not retry by itself: outcomes would be hidden from [`super::Retrying`], which settles them.
pub(super) fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Deadlines are ours (`storage::Policy`): a fixed one would cut large transfers on slow lines.
pub(super) fn client_options() -> ClientOptions {
    ClientOptions::new().with_timeout_disabled()
}

/// The value of a setting under any of its names.
fn named<'a>(settings: &'a [(String, String)], names: &[&str]) -> Option<&'a str> {
    settings.iter().find(|(name, _)| names.contains(&name.as_str())).map(|(_, value)| value.as_str())
}

pub(super) fn open_google(location: &Location, bucket: &str, settings: &[(String, String)]) -> Result<Adapter> {
    let mut builder = object_store::gcp::GoogleCloudStorageBuilder::new()
        .with_bucket_name(bucket)
        .with_retry(no_retries())
        .with_client_options(client_options());
    for (name, value) in settings {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let inner = builder.build().map_err(|e| unusable(location, &e))?;
    Ok(Adapter::remote(Arc::new(inner), location, None))
}

pub(super) fn open_azure(location: &Location, container: &str, settings: &[(String, String)]) -> Result<Adapter> {
    let endpoint = named(settings, &["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]);
    let plain_http = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
    let mut builder = object_store::azure::MicrosoftAzureBuilder::new()
        .with_container_name(container)
        .with_retry(no_retries())
        .with_client_options(client_options().with_allow_http(plain_http));
    for (name, value) in settings {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let inner = builder.build().map_err(|e| unusable(location, &e))?;
    Ok(Adapter::remote(Arc::new(inner), location, None))
}

pub(super) fn unusable(location: &Location, why: &object_store::Error) -> Error {
    Error::usage(format!("{location}: {why}"))
}
