//! Locks of what is written once and needed for ever: the descriptor, keys, claims, histories, bounds of logs. Backups and WAL
//! come anew and are locked then; these would lose theirs, so that each backup has them renewed.

use futures::{StreamExt, TryStreamExt};

use super::{Repository, layout};
use crate::error::{Error, Result};

/// Requests made at once.
const PARALLEL: usize = 8;

impl Repository {
    /// Nothing where nothing is locked. `locked` was written with a lock: a store that does not say that it has one is not asked for
    /// more.
    pub async fn renew_locks(&self, locked: &str) -> Result<()> {
        if self.store.locks().is_none() {
            return Ok(());
        }
        if !self.store.is_locked(locked).await? {
            let why =
                format!("{} was written with a lock, and the store does not say that it has one", self.url(locked));
            return Err(Error::refused(why)
                .hint("the bucket must have Object Lock, and you s3:GetObjectRetention; or leave --lock away"));
        }
        let mut keys = vec![layout::DESCRIPTOR.to_owned()];
        keys.extend(self.store.list(layout::KEYS, None).map_ok(|entry| entry.key).try_collect::<Vec<_>>().await?);
        for generation in self.generations().await? {
            keys.push(layout::claim(generation));
            for directory in [layout::wal_dir(generation), layout::collected_dir(generation)] {
                // Of WAL's directory the histories are directly there, segments further below.
                keys.extend(self.store.list_level(&directory).await?.entries.into_iter().map(|entry| entry.key));
            }
        }
        let renewals: Vec<_> = keys.iter().map(|key| self.store.renew(key)).collect();
        // One that fails does not keep the others.
        let renewed: Vec<Result<()>> = futures::stream::iter(renewals).buffer_unordered(PARALLEL).collect().await;
        renewed.into_iter().collect()
    }
}
