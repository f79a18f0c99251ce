//! Deleting many objects where a lock, a hold or a policy may keep some: what one is refused does not keep the others.

use futures::StreamExt;

use super::Store;
use crate::error::{Error, Kind, Result};

/// Objects deleted at once.
const PARALLEL: usize = 16;

/// What became of objects that nobody needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deleted {
    pub objects: u64,
    pub bytes: u64,
    pub refused: Refused,
}

/// Objects that the store keeps, their bytes, and what it said of the first.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Refused {
    pub objects: u64,
    pub bytes: u64,
    pub why: Option<String>,
}

impl Deleted {
    /// Deletes objects, given with their sizes, some at a time and in any order.
    pub async fn all(&mut self, store: &dyn Store, objects: impl IntoIterator<Item = (String, u64)>) -> Result<()> {
        let deletes = objects.into_iter().map(|(key, size)| async move { (size, store.delete(&key).await) });
        let deletes: Vec<_> = deletes.collect();
        let mut deletes = futures::stream::iter(deletes).buffer_unordered(PARALLEL);
        while let Some((size, outcome)) = deletes.next().await {
            self.note(size, outcome)?;
        }
        Ok(())
    }

    /// Deletes one object; whether it has gone.
    pub async fn one(&mut self, store: &dyn Store, key: &str, size: u64) -> Result<bool> {
        let outcome = store.delete(key).await;
        self.note(size, outcome)
    }

    /// Counts one that was not even tried, because it must not go before another.
    pub fn keep(&mut self, size: u64) {
        self.refused.objects += 1;
        self.refused.bytes += size;
    }

    fn note(&mut self, size: u64, outcome: Result<()>) -> Result<bool> {
        match outcome {
            Ok(()) => {
                self.objects += 1;
                self.bytes += size;
                Ok(true)
            }
            Err(error) if is_refusal(&error) => {
                self.keep(size);
                self.refused.why.get_or_insert_with(|| error.to_string());
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether the store has answered, and will answer the same again: that this object stays.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), Kind::Denied | Kind::Refused) && !error.is_retryable()
}

/// Deletes what may as well stay: whether it goes is all the same.
pub async fn delete_if_allowed(store: &dyn Store, key: &str) -> Result<()> {
    Deleted::default().one(store, key, 0).await.map(drop)
}
