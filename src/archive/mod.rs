//! WAL in and out of the repository: the live stream, `archive_command` and `restore_command`.

pub mod claim;
mod compact;
pub mod fetch;
pub mod follow;
pub mod helper;
mod pace;
pub mod push;
mod pushed;
pub mod resume;
pub mod stream;

pub use claim::ensure_writer;
pub use fetch::{FetchOptions, Fetched, Source};
pub use stream::Stream;
