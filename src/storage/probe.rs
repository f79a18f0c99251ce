//! Does the store keep its side of the bargain? Asked once, by `init`.

use super::{Body, Created, Store, delete_if_allowed};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::model::WriteId;

/// Creates one key twice and reads it back: the second create must be refused, or two machines could both believe that
/// they write alone. The key is deleted again; `directory` must be one that nothing else uses.
pub async fn probe(store: &dyn Store, directory: &str, clock: &Clock) -> Result<()> {
    // A key of its own each time: one that was left behind, or arrives late, is in nobody's way.
    let key = &format!("{directory}/{}", WriteId(clock.random()));
    let body = |id: WriteId| Body::from(format!("perennial probe {id}\n").into_bytes());
    let first = body(WriteId(clock.random()));
    let second = body(WriteId(clock.random()));
    let outcome = try_twice(store, key, &first, &second).await;
    // Where nothing can be deleted the key stays, and means nothing.
    let gone = delete_if_allowed(store, key).await;
    outcome.and(gone)
}

async fn try_twice(store: &dyn Store, key: &str, first: &Body, second: &Body) -> Result<()> {
    if store.create(key, first).await? == Created::AlreadyThere {
        return Err(Error::refused(format!("{} is there already, though nobody can have written it", store.url(key)))
            .hint("check whether something between this machine and the store repeats requests"));
    }
    let again = store.create(key, second).await?;
    let there = store.read(key, 0..first.len()).await?;
    match (again, there) {
        (Created::AlreadyThere, Some(chunk)) if chunk.bytes == first.head(usize::MAX) => Ok(()),
        (Created::AlreadyThere, _) => {
            Err(Error::refused(format!("{}: the store does not give back what was written to it", store.url(""))))
        }
        (Created::Now, _) => Err(Error::refused(format!(
            "{}: the store accepts a conditional write (If-None-Match: *) and ignores the condition",
            store.url("")
        ))
        .hint("use a store that honours it: AWS S3, GCS, Azure, R2, MinIO, Ceph or SeaweedFS in a recent version")),
    }
}
