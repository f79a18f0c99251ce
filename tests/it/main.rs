//! The command line against repositories without any server: what it says, refuses and returns.

#[path = "../support/mod.rs"]
mod support;

mod refusals;
mod stores;
