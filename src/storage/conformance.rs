//! What every store must do, as one suite: run over memory, files and a real S3 server alike.

use futures::TryStreamExt;

use super::{Body, Created, Store};
use crate::error::{Error, Result};

/// Rounds of the race. SeaweedFS takes seconds to settle each.
const RACES: u32 = 3;

fn check(holds: bool, rule: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(format!("the store breaks the rule: {rule}"))) }
}

/// Runs the suite under `under`, a prefix nothing else uses.
pub async fn run(store: &dyn Store, under: &str) -> Result<()> {
    creates_once(store, under).await?;
    reads_ranges(store, under).await?;
    lists_in_order(store, under).await?;
    deletes(store, under).await?;
    one_of_many_wins(store, under).await
}

async fn creates_once(store: &dyn Store, under: &str) -> Result<()> {
    let key = format!("{under}/once");
    check(store.read(&key, 0..10).await?.is_none(), "a free key is proven absent")?;
    check(store.create(&key, &Body::from(b"first".to_vec())).await? == Created::Now, "a free key can be created")?;
    let again = store.create(&key, &Body::from(b"second".to_vec())).await?;
    check(again == Created::AlreadyThere, "a taken key is refused")?;
    let there = store.read(&key, 0..10).await?;
    check(there.is_some_and(|c| &c.bytes[..] == b"first" && c.object_size == 5), "what was created first stays")
}

async fn reads_ranges(store: &dyn Store, under: &str) -> Result<()> {
    let key = format!("{under}/deep/er/range");
    let mut body = Body::default();
    for piece in [&b"0123"[..], b"", b"456", b"789"] {
        body.push(bytes::Bytes::from_static(piece));
    }
    store.create(&key, &body).await?;
    for (range, expected) in [(0..4, &b"0123"[..]), (3..7, b"3456"), (8..100, b"89"), (0..10, b"0123456789")] {
        let chunk = store.read(&key, range.clone()).await?;
        let holds = chunk.is_some_and(|c| c.bytes == expected && c.object_size == 10);
        check(holds, &format!("bytes {range:?} of a joined body are what was written"))?;
    }
    Ok(())
}

async fn lists_in_order(store: &dyn Store, under: &str) -> Result<()> {
    for name in ["b/2", "a", "b/1", "b/10", "c/x/y"] {
        store.create(&format!("{under}/list/{name}"), &Body::from(b"x".to_vec())).await?;
    }
    let prefix = format!("{under}/list");
    let keys = |entries: Vec<super::Entry>| -> Vec<String> {
        entries.into_iter().filter_map(|e| e.key.strip_prefix(&format!("{prefix}/")).map(str::to_owned)).collect()
    };
    let all: Vec<_> = store.list(&prefix, None).try_collect().await?;
    check(all.iter().all(|entry| entry.size == 1), "a listing knows sizes")?;
    let in_order = |a: &super::Entry, b: &super::Entry| a.modified <= b.modified;
    let age = |name: &str| all.iter().find(|entry| entry.key == format!("{under}/list/{name}"));
    let ordered = age("b/2").zip(age("c/x/y")).is_some_and(|(first, last)| in_order(first, last));
    check(ordered, "what was written later is not the older one")?;
    check(keys(all) == ["a", "b/1", "b/10", "b/2", "c/x/y"], "a listing is complete and in key order")?;
    let later: Vec<_> = store.list(&prefix, Some(&format!("{prefix}/b/10"))).try_collect().await?;
    check(keys(later) == ["b/2", "c/x/y"], "a listing can start after a key")?;
    let level = store.list_level(&prefix).await?;
    let expected = [format!("{prefix}/b"), format!("{prefix}/c")];
    check(level.directories == expected && keys(level.entries) == ["a"], "a level is its directories and objects")?;
    let none: Vec<_> = store.list(&format!("{under}/nothing"), None).try_collect().await?;
    check(none.is_empty(), "an empty prefix lists nothing")
}

async fn deletes(store: &dyn Store, under: &str) -> Result<()> {
    let key = format!("{under}/gone");
    store.create(&key, &Body::from(b"x".to_vec())).await?;
    store.delete(&key).await?;
    check(store.read(&key, 0..1).await?.is_none(), "a deleted key is absent")?;
    store.delete(&key).await
}

async fn one_of_many_wins(store: &dyn Store, under: &str) -> Result<()> {
    for round in 0..RACES {
        let key = format!("{under}/race/{round}");
        let writers = (0..8).map(|n| {
            let key = key.clone();
            async move { store.create(&key, &Body::from(format!("writer {n}").into_bytes())).await }
        });
        let outcomes = futures::future::try_join_all(writers).await?;
        let winners = outcomes.iter().filter(|outcome| **outcome == Created::Now).count();
        check(winners == 1, &format!("of eight concurrent creates exactly one wins ({winners} did)"))?;
    }
    Ok(())
}
