//! Stories with real servers: each is named after what a user would fear.

#[path = "../support/mod.rs"]
mod support;

mod survive;
