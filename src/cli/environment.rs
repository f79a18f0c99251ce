//! The only place that reads environment variables beyond those of the argument parser.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::postgres::ConnectOptions;

#[allow(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Every variable whose name starts with `prefix`, empty ones left out.
#[allow(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
pub fn with_prefix(prefix: &str) -> BTreeMap<String, String> {
    let set =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    set.filter(|(name, value)| name.starts_with(prefix) && !value.is_empty()).collect()
}

/// Whether PostgreSQL calls us as its `restore_command`, whatever else the words say.
pub fn is_restore_command() -> bool {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    words.windows(2).any(|pair| pair[0] == "wal" && pair[1] == "fetch")
}

pub fn home() -> Option<PathBuf> {
    variable("HOME").map(PathBuf::from)
}

#[allow(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
pub fn search_path() -> Option<OsString> {
    std::env::var_os("PATH")
}

/// The age identity itself, and a command that prints it.
pub fn identity() -> Option<String> {
    variable("PERENNIAL_IDENTITY")
}

pub fn identity_command() -> Option<String> {
    variable("PERENNIAL_IDENTITY_COMMAND")
}

pub fn storage_class() -> Option<String> {
    variable("PERENNIAL_S3_STORAGE_CLASS")
}

/// The mode of the lock on what is written.
pub fn lock_mode() -> Option<String> {
    variable("PERENNIAL_S3_LOCK_MODE")
}

pub fn patience() -> Option<String> {
    variable("PERENNIAL_PATIENCE")
}

/// The endpoint of EC2's metadata service; the variable is that of the AWS tools.
pub fn metadata_endpoint() -> String {
    variable("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| "http://169.254.169.254".to_owned())
}

/// libpq's variables (manual section 34.15), with libpq's defaults for user and password file.
pub fn connection() -> ConnectOptions {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
    let user = variable("PGUSER").or(user);
    ConnectOptions {
        host: variable("PGHOST"),
        port: variable("PGPORT").and_then(|port| port.parse().ok()),
        database: variable("PGDATABASE"),
        user,
        password: variable("PGPASSWORD"),
        passfile: variable("PGPASSFILE").map(PathBuf::from).or_else(|| home().map(|home| home.join(".pgpass"))),
        sslmode: variable("PGSSLMODE"),
        sslrootcert: variable("PGSSLROOTCERT").map(PathBuf::from),
    }
}

/// The machine's name, for people.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
