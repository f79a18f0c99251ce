//! Encryption below everything else: a store that encrypts what is written and proves what is read. Keys, sizes (but for a few
//! bytes) and times stay visible; `perennial.json`, the wrapped key and the probe of `init` are in the clear.
//!
//! It finds out by itself whether the repository is encrypted, on the first request, unless that is known.

mod chunks;
mod keys;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::{DOCUMENT_MAX, Descriptor, layout};
use crate::error::{Error, Kind, Result};
use crate::storage::{Body, Chunk, Created, Entry, Level, Store, read_small};

use chunks::{CHUNK, Sealed, plain_size, stored_range};

pub use keys::{Key, KeyId, Recipient, no_identity, recipients_of};

/// What the descriptor says of an encrypted repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// Always `aes-256-gcm-siv/1`.
    pub cipher: String,
    /// Of the key: a wrong one is told apart before anything is read with it.
    pub key_id: KeyId,
}

impl Encryption {
    pub const CIPHER: &str = "aes-256-gcm-siv/1";

    pub fn with(key: &Key) -> Result<Encryption> {
        Ok(Encryption { cipher: Encryption::CIPHER.to_owned(), key_id: key.id()? })
    }
}

/// Gives the text of an age identity file when it is needed; `None` when nobody named one.
pub type Identities = Arc<dyn Fn() -> Result<Option<String>> + Send + Sync>;

/// What is known of a repository before anything is asked.
#[derive(Debug, Clone, Default)]
pub struct Known {
    pub encryption: Option<Encryption>,
    /// Its wrapped key.
    pub wrapped: Option<Vec<u8>>,
}

#[derive(Debug, Clone)]
enum State {
    /// Nothing was asked yet, or there was no repository.
    Unknown(Option<Known>),
    Clear,
    Open {
        key: Key,
        wrapped: Arc<Vec<u8>>,
    },
}

/// A store whose repository may be encrypted.
#[derive(Clone)]
pub struct Vault {
    inner: Arc<dyn Store>,
    identities: Identities,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vault({:?})", self.inner)
    }
}

impl Vault {
    pub fn new(inner: Arc<dyn Store>, identities: Identities) -> Vault {
        Vault { inner, identities, state: Arc::new(Mutex::new(State::Unknown(None))) }
    }

    /// Takes what was noted of a repository whose descriptor was read before, so that nothing need be asked.
    pub fn suppose(&self, known: Known) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Unknown(Some(known));
    }

    fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key, once it is needed; `None` for a repository in the clear, or none.
    pub async fn key(&self) -> Result<Option<Key>> {
        let known = match self.state() {
            State::Clear => return Ok(None),
            State::Open { key, .. } => return Ok(Some(key)),
            State::Unknown(known) => known,
        };
        let known = match known {
            Some(known) => known,
            None => match read_small(&*self.inner, layout::DESCRIPTOR, DOCUMENT_MAX).await? {
                Some(bytes) => {
                    let descriptor = Descriptor::parse(&bytes, &self.inner.url(layout::DESCRIPTOR))?;
                    Known { encryption: descriptor.encryption, wrapped: None }
                }
                None => return Ok(None),
            },
        };
        let state = match known.encryption {
            None => self.in_the_clear()?,
            Some(encryption) => self.unlock(&encryption, known.wrapped).await?,
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state.clone();
        match state {
            State::Open { key, .. } => Ok(Some(key)),
            _ => Ok(None),
        }
    }

    /// Whoever reads the descriptor spares us reading it again.
    fn learn(&self, name: &str, chunk: Option<&Chunk>) {
        let Some(chunk) = chunk.filter(|_| name == layout::DESCRIPTOR) else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(descriptor) = Descriptor::parse(&chunk.bytes, name) else { return };
        let key_id = |encryption: &Option<Encryption>| encryption.as_ref().map(|encryption| encryption.key_id);
        let agrees = match &*state {
            State::Unknown(known) => {
                known.as_ref().is_some_and(|known| key_id(&known.encryption) == key_id(&descriptor.encryption))
            }
            State::Clear => descriptor.encryption.is_none(),
            State::Open { key, .. } => key.id().ok() == key_id(&descriptor.encryption),
        };
        // What was thought of it may have been of another repository at this address.
        if !agrees {
            *state = State::Unknown(Some(Known { encryption: descriptor.encryption, wrapped: None }));
        }
    }

    /// The wrapped key with which the repository was opened; `None` for one in the clear.
    pub fn wrapped(&self) -> Option<Arc<Vec<u8>>> {
        match self.state() {
            State::Open { wrapped, .. } => Some(wrapped),
            _ => None,
        }
    }

    /// Whoever names an identity expects to be alone with the repository: one in the clear may have been put in its place.
    fn in_the_clear(&self) -> Result<State> {
        if (self.identities)()?.is_some() {
            return Err(Error::refused(format!("{} is not encrypted, though an identity is named", self.inner.url("")))
                .hint("a new one is with --encrypt; if one in the clear is meant, name no identity (--identity, PERENNIAL_IDENTITY…); otherwise somebody has replaced the repository"));
        }
        Ok(State::Clear)
    }

    async fn unlock(&self, encryption: &Encryption, noted: Option<Vec<u8>>) -> Result<State> {
        if encryption.cipher != Encryption::CIPHER {
            return Err(Error::refused(format!("{} is encrypted with {}", self.inner.url(""), encryption.cipher))
                .hint("use a newer version of perennial"));
        }
        let address = self.inner.url("");
        let address = address.trim_end_matches('/');
        let identities = (self.identities)()?.ok_or_else(|| keys::no_identity(address))?;
        // A note may be older than the identity.
        if let Some(wrapped) = noted
            && let Some(key) = keys::unwrap(&wrapped, &identities).ok().flatten()
            && key.id()? == encryption.key_id
        {
            return Ok(State::Open { key, wrapped: Arc::new(wrapped) });
        }
        let (name, wrapped) = self.newest_wrapped(encryption.key_id).await?;
        let url = self.inner.url(&name);
        let key = keys::unwrap(&wrapped, &identities).map_err(|e| e.context(&url))?.ok_or_else(|| {
            Error::new(Kind::Denied, format!("{url} is not wrapped for this identity: {address} stays closed"))
                .hint("name the identity of one of its recipients (`perennial key rotate` changes who they are)")
        })?;
        if key.id()? != encryption.key_id {
            return Err(Error::damaged(format!("{url} holds another key than the one {address} is encrypted with"))
                .hint("bring the object back from a copy or an older version of the bucket"));
        }
        Ok(State::Open { key, wrapped: Arc::new(wrapped) })
    }

    /// The last wrapping of a key. Without any the repository is lost.
    async fn newest_wrapped(&self, id: KeyId) -> Result<(String, Vec<u8>)> {
        // Between the look and the reading a rotation may take the older ones away.
        for _ in 0..3 {
            let Some(number) = self.wrappings(id).await?.last().copied() else { break };
            let name = layout::wrapped_key(id, number);
            if let Some(bytes) = read_small(&*self.inner, &name, DOCUMENT_MAX).await? {
                return Ok((name, bytes.to_vec()));
            }
        }
        Err(Error::damaged(format!("{} has no wrapped key: without it nothing can be read", self.inner.url(&layout::wrapped_keys(id))))
            .hint("bring the object back from a copy or an older version of the bucket, or store the key that was exported (`perennial key rotate --key-file`)"))
    }

    async fn wrappings(&self, id: KeyId) -> Result<Vec<u32>> {
        let level = self.inner.list_level(&layout::wrapped_keys(id)).await?;
        let mut numbers: Vec<u32> =
            level.entries.iter().filter_map(|entry| layout::parse_wrapped_key(&entry.key)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Wraps the key for other recipients; the older wrappings go. The key and what is encrypted with it stay.
    pub async fn rotate(&self, key: &Key, recipients: &[Recipient]) -> Result<String> {
        let (id, wrapped) = (key.id()?, Body::from(key.wrap(recipients)?));
        let older = self.wrappings(id).await?;
        let number = older.last().map_or(1, |last| last + 1);
        let name = layout::wrapped_key(id, number);
        if self.inner.create(&name, &wrapped).await? == Created::AlreadyThere {
            return Err(Error::refused(format!("{} is there already: somebody else rotates", self.inner.url(&name)))
                .hint("look who it was, and run the command again"));
        }
        // A number that was deleted meanwhile can be made again: only the highest one counts.
        if self.wrappings(id).await?.last() != Some(&number) {
            self.inner.delete(&name).await?;
            return Err(Error::refused("somebody else has rotated the key at the same moment")
                .hint("look who it was, and run the command again"));
        }
        for number in older {
            self.inner.delete(&layout::wrapped_key(id, number)).await?;
        }
        Ok(name)
    }

    /// What encrypts the object, if it is encrypted.
    async fn sealed(&self, name: &str) -> Result<Option<Sealed>> {
        if layout::is_in_the_clear(name) {
            return Ok(None);
        }
        self.key().await?.map(|key| Sealed::of(&key, name)).transpose()
    }

    fn altered(&self, name: &str) -> Error {
        Error::damaged(format!(
            "{} does not prove right with the repository's key: it was altered, cut, or moved here from another place",
            self.inner.url(name)
        ))
        .hint("bring the object back from a copy or an older version of the bucket, or choose another backup (`perennial list`)")
    }

    /// Sizes are told as those of the content.
    fn plain(entry: Entry, encrypted: bool) -> Entry {
        if !encrypted || layout::is_in_the_clear(&entry.key) {
            return entry;
        }
        // One of an impossible length shows when it is read.
        Entry { size: plain_size(entry.size).unwrap_or(entry.size), ..entry }
    }
}

#[async_trait]
impl Store for Vault {
    fn url(&self, key: &str) -> String {
        self.inner.url(key)
    }

    async fn create(&self, key: &str, body: &Body) -> Result<Created> {
        if key == layout::DESCRIPTOR && Descriptor::parse(&body.head(usize::MAX), key)?.encryption.is_none() {
            // Before there is a repository that would be refused from then on.
            self.in_the_clear()?;
        }
        match self.sealed(key).await? {
            None => self.inner.create(key, body).await,
            Some(sealed) => self.inner.create(key, &sealed.seal(body)?).await,
        }
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        let Some(sealed) = self.sealed(key).await? else {
            let chunk = self.inner.read(key, range).await?;
            self.learn(key, chunk.as_ref());
            return Ok(chunk);
        };
        let (stored, begin) = stored_range(&range);
        let Some(chunk) = self.inner.read(key, stored).await? else { return Ok(None) };
        let object_size = plain_size(chunk.object_size).ok_or_else(|| self.altered(key))?;
        let plain = match begin < object_size.max(1) {
            true => sealed.open(begin / CHUNK, &chunk.bytes, chunk.object_size).ok_or_else(|| self.altered(key))?,
            false => Vec::new(),
        };
        let plain = Bytes::from(plain);
        let within = |at: u64| (at.saturating_sub(begin) as usize).min(plain.len());
        let bytes = plain.slice(within(range.start)..within(range.end).max(within(range.start)));
        Ok(Some(Chunk { bytes, object_size }))
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        let (this, listing) = (self.clone(), self.inner.list(prefix, after));
        let opened = async move {
            let encrypted = this.key().await?.is_some();
            Ok::<_, Error>(listing.map_ok(move |entry| Vault::plain(entry, encrypted)))
        };
        futures::stream::once(opened).try_flatten().boxed()
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        let encrypted = self.key().await?.is_some();
        let level = self.inner.list_level(prefix).await?;
        let entries = level.entries.into_iter().map(|entry| Vault::plain(entry, encrypted)).collect();
        Ok(Level { entries, ..level })
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key).await
    }

    fn locks(&self) -> Option<std::time::Duration> {
        self.inner.locks()
    }

    async fn is_locked(&self, key: &str) -> Result<bool> {
        self.inner.is_locked(key).await
    }

    async fn renew(&self, key: &str) -> Result<()> {
        self.inner.renew(key).await
    }
}
