//! Records of what was done: documents in a directory of their own, whose names sort by time.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{DOCUMENT_MAX, Repository, document};
use crate::error::Result;
use crate::storage::{Body, delete_if_allowed, read_small};

/// Records that are kept of each kind that is for people.
const KEPT: usize = 100;

impl Repository {
    /// Puts a record; of the older ones of its directory the last hundred stay.
    pub(super) async fn put_record(&self, directory: &str, key: &str, record: &impl Serialize) -> Result<()> {
        self.store.create(key, &Body::from(document::write(record)?)).await?;
        let all = self.store.list_level(directory).await?.entries;
        for old in &all[..all.len().saturating_sub(KEPT)] {
            delete_if_allowed(self.store(), &old.key).await?;
        }
        Ok(())
    }

    /// The last of the records in a directory.
    pub(super) async fn last_record<T: DeserializeOwned>(&self, directory: &str) -> Result<Option<T>> {
        let Some(last) = self.store.list_level(directory).await?.entries.pop() else { return Ok(None) };
        match read_small(self.store(), &last.key, DOCUMENT_MAX).await? {
            Some(bytes) => document::read(&bytes).map(Some).map_err(|why| self.corrupt(&last.key, why)),
            // Only a later one makes it go.
            None => Ok(None),
        }
    }
}
