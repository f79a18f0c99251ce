//! The command line against repositories without any server: what it says, refuses and returns.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, and waits for real processes by a real clock"
)]

#[path = "../support/mod.rs"]
mod support;

mod credentials;
mod refusals;
mod stores;
