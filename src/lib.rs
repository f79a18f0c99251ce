//! Perennial keeps a PostgreSQL cluster alive in an object-store bucket while the machines it runs on come and go.
//!
//! The modules in layer order; each imports only from layers below it (docs/ARCHITECTURE.md, held by `tests/tidy.rs`).

// Unit tests may write files and read clocks as they like; the lint still sees the code itself without tests.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

// L0: nouns, time, events, errors
pub mod clock;
pub mod copy;
pub mod drill;
pub mod error;
pub mod events;
pub mod model;

// L1: bytes and places
pub mod disk;
pub mod storage;
pub mod wal;

// L2: the bucket and the server, typed; they do not know each other
pub mod postgres;
pub mod repository;

// L3: operations, each a plan and its execution; they do not know each other
pub mod archive;
pub mod backup;
pub mod restore;
pub mod retention;
pub mod status;

// L4: a machine's life
pub mod run;

// L5: the command line
pub mod cli;

#[cfg(test)]
#[path = "../tests/support/chance.rs"]
mod chance;
