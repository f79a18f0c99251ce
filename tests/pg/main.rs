//! Stories with real servers: each is named after what a user would fear.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, and waits for real processes by a real clock"
)]

#[path = "../support/mod.rs"]
mod support;

mod agent;
mod beside;
mod boots;
mod clones;
mod copies;
mod damage;
mod delta;
mod drills;
mod encrypted;
mod live_backup;
mod outages;
mod retention;
mod selected;
mod shapes;
mod standby_backups;
mod standbys;
mod summaries;
mod survive;
mod targets;
mod wal_files;
mod zero_loss;
