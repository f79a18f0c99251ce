//! WAL in and out of the repository: `archive_command` and `restore_command`.

pub mod claim;
pub mod fetch;
pub mod helper;
pub mod push;
mod pushed;

pub use claim::ensure_writer;
pub use fetch::{FetchOptions, Fetched, Source};
