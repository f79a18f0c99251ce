//! A PostgreSQL server and its data directory. Knows nothing of repositories.

pub mod client;
pub mod conf;
pub mod control_file;
pub mod data_dir;
pub mod install;
pub mod page;
pub mod process;
pub mod replication;
pub mod summaries;
pub mod version;

use std::path::Path;

use crate::error::{Error, Result};

pub use client::{Client, ConnectOptions};
pub use control_file::ControlFile;
pub use install::Install;
pub use process::{Postmaster, PostmasterFile, ServerStatus};
pub use replication::Replication;
pub use version::Version;

/// The version of a data directory, from its `PG_VERSION`.
pub fn version_of(data_dir: &Path) -> Result<Version> {
    let path = data_dir.join("PG_VERSION");
    match crate::disk::read_if_there(&path)? {
        Some(text) => Version::of_file(&String::from_utf8_lossy(&text)).map_err(|e| e.context(path.display())),
        None => Err(Error::not_found(format!(
            "{} is not a PostgreSQL data directory: it has no PG_VERSION",
            data_dir.display()
        ))),
    }
}

/// Whether the directory is missing or has nothing in it. `lost+found` of a fresh filesystem does not count.
pub fn is_vacant(directory: &Path) -> Result<bool> {
    crate::disk::is_vacant_but(directory, |_| false)
}
