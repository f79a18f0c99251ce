//! Taking a log from its writer: a seal at its first free number.

use super::entry::{self, FORMAT};
use super::{Checks, Content, EntryHead, LogView};
use crate::error::{Error, Kind, Result};
use crate::model::{Generation, WriteId};
use crate::repository::{Repository, layout};
use crate::storage::Created;

/// Tries to win the first free number before the store is called broken. From the second on, a seal further ahead makes
/// sure that the writer runs into it.
const TRIES: u32 = 1000;

/// How far ahead of a writer that is faster than we are a seal is put. More than it can have on its way.
const AHEAD: u64 = 64;

/// A claimant that takes over.
#[derive(Debug, Clone, Copy)]
pub struct Sealer {
    /// The generation it has claimed.
    pub generation: Generation,
    pub checks: Checks,
}

impl Sealer {
    /// Seals every older generation that may have a living writer. Only after this may anything of them be read as final.
    ///
    /// A writer opens its log only after it did the same: what is older than one that has an open log was sealed then.
    pub async fn seal_older(&self, repository: &Repository) -> Result<Vec<LogView>> {
        let mut sealed = Vec::new();
        for older in (1..self.generation.0).rev().map(Generation) {
            let view = self.seal(repository, older).await?;
            let opened = view.end().is_some();
            sealed.push(view);
            if opened {
                break;
            }
        }
        Ok(sealed)
    }

    /// Ends the log of `older`; returns it as it will be for ever.
    pub async fn seal(&self, repository: &Repository, older: Generation) -> Result<LogView> {
        for attempt in 0..TRIES {
            let view = repository.log(older).await?;
            if view.seal.is_some() || !self.checks.seals {
                return Ok(view);
            }
            let won = self.put(repository, older, view.next).await?;
            if won && (!self.checks.bound_again || repository.log_bound_number(older).await? <= view.next) {
                return repository.log(older).await;
            }
            // Its writer was faster (or has collected past our seal, which is void then).
            if !won && attempt == 1 {
                self.put(repository, older, view.next + AHEAD).await?;
            }
        }
        Err(Error::new(
            Kind::Unreachable,
            format!("the log of generation {older} could not be sealed in {TRIES} attempts: its writer is faster than we are"),
        )
        .hint("stop the other machine, or try again"))
    }

    /// Whether our seal now has the number. A lost answer leaves a seal of ours that the next look will find.
    async fn put(&self, repository: &Repository, older: Generation, number: u64) -> Result<bool> {
        let clock = repository.clock();
        let head = EntryHead {
            format: FORMAT.to_owned(),
            write_id: WriteId(clock.random()),
            generation: older,
            number,
            at: clock.now(),
            previous: None,
            content: Content::Seal { by: self.generation, released: false },
        };
        let (body, _) = entry::encode(&head, None)?;
        Ok(repository.store.create(&layout::log_entry(older, number), &body).await? == Created::Now)
    }
}
