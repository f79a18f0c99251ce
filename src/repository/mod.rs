//! The bucket as a typed thing: its descriptor, generations, WAL, packs and backup manifests.
//!
//! Everything is written once. docs/format.md describes every byte; keys are built and parsed in [`layout`] only.
//! What a restore needs is answered in [`reach`] only, so that restore, retention and verify cannot disagree.

mod backup_wal;
mod beside;
pub mod codec;
mod crc;
mod descriptor;
mod document;
mod drill;
mod envelope;
mod generation;
pub mod layout;
mod lines;
mod locks;
pub mod log;
pub mod manifest;
pub mod origin;
pub mod pack;
pub mod patch;
pub mod piece_sums;
mod prune;
pub mod reach;
mod records;
mod region;
pub mod sums;
pub mod vault;
mod verification;
mod wal_content;
mod wal_index;
mod wal_object;
mod writer;

use std::sync::Arc;

use futures::TryStreamExt;

use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::storage::{Body, Created, Entry, Store, probe, read_small};

use vault::{Encryption, Key};

pub use backup_wal::BackupWal;
pub use beside::{BesideHead, SET_ASIDE, UNFINISHED};
pub use codec::Codec;
pub use descriptor::Descriptor;
pub use drill::DrillRecord;
pub use generation::{Claim, Lineage, NewWriter, tips};
pub use prune::PruneRecord;
pub use region::{Pages, Patch, Region};
pub use vault::Recipient;
pub use verification::Verification;
pub use wal_content::Known;
pub use wal_index::{WalIndex, WalListing, WalPlace, WalSource};
pub use wal_object::{FRAME, FRAMES_MAX, Frame, Plain, Put, WalHead, WalObject};
pub use writer::Writer;

/// An opened repository: a store and the descriptor that says what is in it.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    descriptor: Descriptor,
    clock: Clock,
}

/// What is known of the place a repository should be at.
#[derive(Debug)]
pub enum Found {
    Repository(Repository),
    /// Proven: the prefix holds nothing at all, but for the probe of an init that was cut off.
    Empty,
}

/// Documents (descriptor, claims, histories) are small; larger ones are not ours.
const DOCUMENT_MAX: u64 = 1 << 20;

impl Repository {
    /// Looks whether there is a repository. An error says nothing about it.
    pub async fn find(store: Arc<dyn Store>, clock: &Clock) -> Result<Found> {
        if let Some(bytes) = read_small(&*store, layout::DESCRIPTOR, DOCUMENT_MAX).await? {
            let descriptor = Descriptor::parse(&bytes, &store.url(layout::DESCRIPTOR))?;
            return Ok(Found::Repository(Repository { store, descriptor, clock: clock.clone() }));
        }
        let mut level = store.list_level("").await?;
        // What an init that was cut off leaves does not stand in the way of the next.
        level.directories.retain(|directory| directory != layout::PROBES);
        if level.directories.iter().any(|directory| directory == layout::KEYS) {
            let keys: Vec<Entry> = store.list(layout::KEYS, None).try_collect().await?;
            if keys.iter().all(|entry| layout::parse_wrapped_key(&entry.key).is_some()) {
                level.directories.retain(|directory| directory != layout::KEYS);
            }
        }
        level.entries.retain(|entry| entry.key != layout::PROBES);
        if level.directories.is_empty() && level.entries.is_empty() {
            return Ok(Found::Empty);
        }
        let example = level.directories.first().cloned().or(level.entries.first().map(|e| e.key.clone()));
        Err(Error::refused(format!(
            "{} is not a Perennial repository and not empty: it has '{}' but no {}",
            store.url(""),
            example.unwrap_or_default(),
            layout::DESCRIPTOR
        ))
        .hint("check the address, or choose a prefix of its own for the repository"))
    }

    /// Opens a repository that must be there.
    pub async fn open(store: Arc<dyn Store>, clock: &Clock) -> Result<Repository> {
        let url = store.url("");
        match Repository::find(store, clock).await? {
            Found::Repository(repository) => Ok(repository),
            Found::Empty => Err(Error::not_found(format!("{url}: there is no repository, the place is empty"))
                .hint(format!("check the address; `perennial init {}` makes a new one", url.trim_end_matches('/')))),
        }
    }

    /// Takes a descriptor known from before, so that nothing need be asked.
    pub fn assume(store: Arc<dyn Store>, descriptor: Descriptor, clock: &Clock) -> Repository {
        Repository { store, descriptor, clock: clock.clone() }
    }

    /// Makes a new repository in an empty place, after a probe of the store. One that is there already is opened.
    pub async fn init(store: Arc<dyn Store>, codec: Codec, clock: &Clock) -> Result<(Repository, Created)> {
        Repository::make(store, codec, &[], clock).await
    }

    /// The same for one that is encrypted with a new key, wrapped for `recipients`; without any it is in the clear. One that
    /// is there already is opened if it is encrypted as asked.
    pub async fn make(
        store: Arc<dyn Store>,
        codec: Codec,
        recipients: &[Recipient],
        clock: &Clock,
    ) -> Result<(Repository, Created)> {
        let encrypted = !recipients.is_empty();
        if let Found::Repository(repository) = Repository::find(Arc::clone(&store), clock).await? {
            repository.check_encrypted(recipients)?;
            return Ok((repository, Created::AlreadyThere));
        }
        probe(&*store, layout::PROBES, clock).await?;
        let encryption = match encrypted {
            true => {
                let key = Key::random()?;
                // Under the key's own id: of two machines that make the repository at once one's is forgotten.
                let name = layout::wrapped_key(key.id()?, 1);
                store.create(&name, &Body::from(key.wrap(recipients)?)).await?;
                Some(Encryption::with(&key)?)
            }
            false => None,
        };
        let descriptor = Descriptor::new(codec, encryption, clock);
        let created = store.create(layout::DESCRIPTOR, &Body::from(descriptor.to_bytes()?)).await?;
        match created {
            Created::Now => Ok((Repository { store, descriptor, clock: clock.clone() }, created)),
            Created::AlreadyThere => {
                let repository = Repository::open(store, clock).await?;
                repository.check_encrypted(recipients)?;
                Ok((repository, created))
            }
        }
    }

    /// Whoever asks for an encrypted repository must not get another.
    pub fn check_encrypted(&self, recipients: &[Recipient]) -> Result<()> {
        if recipients.is_empty() || self.descriptor.encryption.is_some() {
            return Ok(());
        }
        Err(Error::refused(format!("{} is there already, and not encrypted", self.address()))
            .hint("choose another prefix for an encrypted repository; what is stored in the clear stays so"))
    }

    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn url(&self, key: &str) -> String {
        self.store.url(key)
    }

    /// The address of the whole repository, without a slash at its end.
    pub fn address(&self) -> String {
        self.store.url("").trim_end_matches('/').to_owned()
    }

    /// Puts an object whose name nobody else can have given.
    async fn put_new(&self, key: &str, body: &Body) -> Result<()> {
        match self.store.create(key, body).await? {
            Created::Now => Ok(()),
            Created::AlreadyThere => {
                Err(Error::internal(format!("{} is there already, though its name is random", self.url(key))))
            }
        }
    }

    /// An object that something else in the repository names, so that its absence is damage.
    async fn must_read(&self, key: &str, range: std::ops::Range<u64>) -> Result<crate::storage::Chunk> {
        self.store.read(key, range).await?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        Error::damaged(format!("{} is missing", self.url(key)))
            .hint("bring the object back from a copy or an older version of the bucket, or choose another backup (`perennial list`)")
    }

    pub(crate) fn corrupt(&self, key: &str, why: impl std::fmt::Display) -> Error {
        Error::damaged(format!("{} is damaged: {why}", self.url(key)))
            .hint("bring the object back from a copy or an older version of the bucket, or choose another backup (`perennial list`)")
    }
}
