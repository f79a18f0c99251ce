//! A store that is only read, whatever is asked of it.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;

use super::{Body, Chunk, Created, Entry, Level, Store};
use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub struct ReadOnly(Arc<dyn Store>);

impl ReadOnly {
    pub fn new(inner: Arc<dyn Store>) -> ReadOnly {
        ReadOnly(inner)
    }

    fn refused<T>(&self, key: &str) -> Result<T> {
        Err(Error::internal(format!("{} would have been written to, and this store is only to be read", self.url(key))))
    }
}

#[async_trait]
impl Store for ReadOnly {
    fn url(&self, key: &str) -> String {
        self.0.url(key)
    }

    async fn create(&self, key: &str, _: &Body) -> Result<Created> {
        self.refused(key)
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<Option<Chunk>> {
        self.0.read(key, range).await
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<Entry>> {
        self.0.list(prefix, after)
    }

    async fn list_level(&self, prefix: &str) -> Result<Level> {
        self.0.list_level(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.refused(key)
    }
}
