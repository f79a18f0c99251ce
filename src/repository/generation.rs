//! Generations: one per start of a writer. A claim is a create-only PUT of the next number, so of two claimants exactly
//! one wins. Claims are never changed or deleted; each names its parent, and the chain of parents is a lineage.

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::{DOCUMENT_MAX, Repository, document, layout};
use crate::error::{Error, Result};
use crate::model::{Generation, SystemId, Timestamp, WriteId};
use crate::storage::{Body, Created, read_small};
use crate::wal::SegmentSize;

/// `generation.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Always `perennial/generation`.
    pub kind: String,
    pub format: u32,
    pub writer_id: WriteId,
    pub generation: Generation,
    pub parent: Option<Generation>,
    pub system_id: SystemId,
    pub pg_major: u32,
    pub segment_size: SegmentSize,
    pub claimed_at: Timestamp,
    /// The machine's name, for people.
    pub host: String,
}

/// A generation and its ancestors, newest first. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage(Vec<Claim>);

impl Lineage {
    /// The chain of parents from `tip`, as far as `claims` go; `None` when `tip` itself is not among them.
    pub fn of(claims: &[Claim], tip: Generation) -> Option<Lineage> {
        let find = |generation| claims.iter().find(|claim| claim.generation == generation);
        let chain: Vec<Claim> =
            std::iter::successors(find(tip), |claim| claim.parent.and_then(find)).cloned().collect();
        (!chain.is_empty()).then_some(Lineage(chain))
    }

    pub fn tip(&self) -> &Claim {
        &self.0[0]
    }

    pub fn claims(&self) -> &[Claim] {
        &self.0
    }

    pub fn contains(&self, generation: Generation) -> bool {
        self.0.iter().any(|claim| claim.generation == generation)
    }
}

/// How many claims are read at once.
const PARALLEL: usize = 16;

impl Repository {
    /// The numbers of all generations, lowest first. They are dense; a hole means that a claim was deleted.
    pub async fn generations(&self) -> Result<Vec<Generation>> {
        let level = self.store.list_level(layout::GENERATIONS).await?;
        let mut all: Vec<Generation> =
            level.directories.iter().filter_map(|directory| layout::parse_generation_dir(directory)).collect();
        // On a disk, a claim that was cut off leaves its directory behind, empty: nobody has the number.
        while let Some(last) = all.last() {
            let within = self.store.list_level(&layout::generation_dir(*last)).await?;
            if !(within.directories.is_empty() && within.entries.is_empty()) {
                break;
            }
            all.pop();
        }
        Ok(all)
    }

    pub async fn newest_generation(&self) -> Result<Option<Generation>> {
        Ok(self.generations().await?.into_iter().max())
    }

    /// A claim that something names.
    pub async fn claim(&self, generation: Generation) -> Result<Claim> {
        let key = layout::claim(generation);
        let bytes = read_small(self.store(), &key, DOCUMENT_MAX).await?.ok_or_else(|| self.missing(&key))?;
        let claim: Claim = document::read(&bytes).map_err(|why| self.corrupt(&key, why))?;
        let parent_before = claim.parent.is_none_or(|parent| parent < generation);
        if claim.kind != "perennial/generation" || claim.generation != generation || !parent_before {
            return Err(self.corrupt(&key, "it is not the claim of this generation"));
        }
        if claim.format > 1 {
            return Err(Error::refused(format!("{} is of format {}", self.url(&key), claim.format))
                .hint("use a newer version of perennial"));
        }
        Ok(claim)
    }

    /// The claims of `numbers`, read side by side.
    pub async fn claims(&self, numbers: impl IntoIterator<Item = Generation>) -> Result<Vec<Claim>> {
        let reads: Vec<_> = numbers.into_iter().map(|number| self.claim(number)).collect();
        futures::stream::iter(reads).buffered(PARALLEL).try_collect().await
    }

    /// The generation and its ancestors down to `oldest`, or to the first.
    pub async fn lineage(&self, tip: Generation, oldest: Option<Generation>) -> Result<Lineage> {
        let from = oldest.unwrap_or(Generation::FIRST).0;
        let claims = self.claims((from..=tip.0).map(Generation)).await?;
        Lineage::of(&claims, tip).ok_or_else(|| self.missing(&layout::claim(tip)))
    }

    /// Tries to claim the generation after `newest` (`None`: the first). `None` when another claimant was faster: look
    /// again at what is there before trying once more.
    pub async fn try_claim(
        &self,
        newest: Option<Generation>,
        parent: Option<Generation>,
        writer: &NewWriter,
    ) -> Result<Option<Claim>> {
        let generation = newest.map_or(Generation::FIRST, Generation::next);
        if parent.is_some_and(|parent| parent >= generation) {
            return Err(Error::internal(format!("generation {generation} cannot be a child of a later one")));
        }
        let claim = Claim {
            kind: "perennial/generation".to_owned(),
            format: 1,
            writer_id: writer.writer_id,
            generation,
            parent,
            system_id: writer.system_id,
            pg_major: writer.pg_major,
            segment_size: writer.segment_size,
            claimed_at: self.clock.now(),
            host: writer.host.clone(),
        };
        match self.store.create(&layout::claim(generation), &Body::from(document::write(&claim)?)).await? {
            Created::Now => Ok(Some(claim)),
            Created::AlreadyThere => Ok(None),
        }
    }
}

/// What a claimant says of itself.
#[derive(Debug, Clone)]
pub struct NewWriter {
    /// Made and noted before the claim is put, so that one whose answer was lost is recognised.
    pub writer_id: WriteId,
    pub system_id: SystemId,
    pub pg_major: u32,
    pub segment_size: SegmentSize,
    pub host: String,
}

/// The generations no other has as its parent, newest first: each ends a history of its own.
pub fn tips(claims: &[Claim]) -> Vec<Generation> {
    let is_parent = |generation: Generation| claims.iter().any(|claim| claim.parent == Some(generation));
    claims.iter().rev().map(|claim| claim.generation).filter(|generation| !is_parent(*generation)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SystemId, WriteId};
    use crate::wal::SegmentSize;

    #[test]
    fn each_history_is_shown_once_by_its_newest_generation() {
        let claim = |generation: u32, parent: Option<u32>| Claim {
            kind: String::new(),
            format: 1,
            writer_id: WriteId([0; 16]),
            generation: Generation(generation),
            parent: parent.map(Generation),
            system_id: SystemId(1),
            pg_major: 15,
            segment_size: SegmentSize::try_from(16 << 20).expect("16 MB"),
            claimed_at: Timestamp::from_unix_micros(0),
            host: String::new(),
        };
        let claims = [claim(1, None), claim(2, Some(1)), claim(3, Some(2)), claim(4, Some(1))];
        assert_eq!(tips(&claims), [Generation(4), Generation(3)]);
    }
}
