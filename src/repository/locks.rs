//! Locks of what is written once and needed for ever: the descriptor, keys, claims, histories, bounds of logs. Backups and WAL
//! come anew and are locked then; these would lose theirs, so that each full backup has them renewed.

use futures::{StreamExt, TryStreamExt};

use super::{Repository, layout};
use crate::error::Result;
use crate::storage::Entry;
use crate::wal::WalFileName;

/// Requests made at once.
const PARALLEL: usize = 8;

impl Repository {
    /// Nothing where nothing is locked.
    pub async fn renew_locks(&self) -> Result<()> {
        if !self.store.locks() {
            return Ok(());
        }
        let mut keys = vec![layout::DESCRIPTOR.to_owned()];
        keys.extend(self.keys_below(layout::KEYS).await?);
        for generation in self.generations().await? {
            keys.push(layout::claim(generation));
            keys.extend(self.keys_below(&layout::collected_dir(generation)).await?);
            let is_history = |key: &String| {
                layout::parse_wal_file(key).is_some_and(|(_, name)| matches!(name, WalFileName::History(_)))
            };
            keys.extend(self.keys_below(&layout::wal_dir(generation)).await?.into_iter().filter(is_history));
        }
        let renewals: Vec<_> = keys.iter().map(|key| self.store.renew(key)).collect();
        futures::stream::iter(renewals).buffer_unordered(PARALLEL).try_collect().await
    }

    async fn keys_below(&self, directory: &str) -> Result<Vec<String>> {
        self.store.list(directory, None).map_ok(|entry: Entry| entry.key).try_collect().await
    }
}
