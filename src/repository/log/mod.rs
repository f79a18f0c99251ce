//! The live log of a generation: WAL as it comes, in small entries, and the fence that keeps two writers apart.
//!
//! Entries are numbered from 1 without holes, each created only where nothing is. So the next key is always known, and
//! whoever wants to end a log puts a *seal* at its first free number: from then on its writer cannot go on. An entry is
//! *durable* once it and every entry before it are there; what lies behind a seal never was.
//!
//! The rules, each of which the simulation shows to be needed (`tests/sim`):
//! 1. The bytes of a number are frozen at the first attempt. "Already there" is settled by reading the write id back.
//! 2. A writer acknowledges the contiguous prefix only.
//! 3. A deleted key can be created again. So the *collection bound* is advanced before entries below it go, and a sealer
//!    looks at it again after its seal, and everybody after any seal that was found: one that the bound has passed is void.
//! 4. Claims and seals are never deleted.
//!
//! A log belongs to one timeline and starts at the start of a segment, so that every segment can be put together from
//! the log of one generation.

mod append;
mod collect;
mod entry;
#[cfg(test)]
mod late_seals;
mod read;
mod seal;
mod tail;

use serde::{Deserialize, Serialize};

use crate::model::{Lsn, Timeline};

pub use append::{Appender, Durable};
pub use collect::Bound;
pub use entry::{Content, EntryHead};
pub use read::{LogRun, LogView};
pub use seal::Sealer;
pub use tail::{Grown, Tail};

/// Entries a writer may have on their way at once. A promise of the format: at most this many entries less one can lie
/// behind a hole or a seal.
pub const IN_FLIGHT_MAX: usize = 16;

/// Most bytes of WAL in one entry. An entry never crosses the edge of a segment.
pub const ENTRY_MAX: usize = 4 << 20;

/// A place in the history of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub timeline: Timeline,
    pub lsn: Lsn,
}

/// The protocol's checks: always all of them, but for the simulation, which leaves one out to see that the loss is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Older logs are sealed before they are read.
    pub seals: bool,
    /// The collection bound is looked at again after a seal.
    pub bound_again: bool,
    /// "Already there" is settled by the write id.
    pub write_id: bool,
}

impl Checks {
    pub const ALL: Checks = Checks { seals: true, bound_again: true, write_id: true };
}
