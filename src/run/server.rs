//! The command that starts the server.

use std::ffi::OsString;
use std::path::Path;

use super::{Options, WhenBehind};
use crate::error::{Error, Result};
use crate::postgres::data_dir::RECOVERY_SIGNAL;
use crate::postgres::process::ServerCommand;
use crate::postgres::replication::SLOT;
use crate::postgres::{ControlFile, Install};

/// Whom the server serves.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stage<'a> {
    /// Nobody but us, on a socket in this directory: it recovers, and its log is opened.
    Private(&'a Path),
    /// Everybody.
    Public,
}

/// The operator's options come first: those that protect the database are ours, and the last one counts.
pub(super) fn command(options: &Options, install: &Install, stage: Stage<'_>) -> Result<ServerCommand> {
    let data_dir = std::fs::canonicalize(&options.data_dir)
        .map_err(|e| Error::local(format!("could not resolve {}", options.data_dir.display()), e))?;
    let configured = |name: &str| install.configured(&data_dir, &options.postgres_options, name);
    if configured("wal_level")? == "minimal" {
        return Err(Error::refused("wal_level is minimal: such WAL cannot be archived")
            .hint("set wal_level = replica (the default) in postgresql.conf"));
    }
    let mut settings: Vec<String> = Vec::new();
    match stage {
        Stage::Private(_) if options.rpo.is_zero() => settings.push("synchronous_standby_names=".to_owned()),
        // What is said here cannot be taken back while the server runs.
        Stage::Public if options.rpo.is_zero() && !super::hold::can_degrade(options) => {
            settings.push(format!("synchronous_standby_names={SLOT}"));
        }
        _ => (),
    }
    if let (Some(most), WhenBehind::Drop) = (options.max_wal_behind, options.when_behind) {
        // The server itself gives the slot up, at a checkpoint, and frees its WAL.
        settings.push(format!("max_slot_wal_keep_size={}MB", (most.0 >> 20).max(1)));
    }
    if let Stage::Private(directory) = stage {
        settings.extend(["listen_addresses=".to_owned(), format!("unix_socket_directories={}", directory.display())]);
        if is_recovering(&data_dir) {
            // Nobody may read a state that is not the newest yet; and the state file then tells the end of recovery.
            // A directory that was restored to be looked at (`--action pause`) becomes the database now.
            settings.extend(["hot_standby=off".to_owned(), "recovery_target_action=promote".to_owned()]);
            let control = ControlFile::read(&data_dir, install.version)?;
            settings.extend(raised(&control, configured)?);
            // The stream begins where the segment in which recovery ends does. If the checkpoint that follows lies in
            // the next one already, this one must not go before our slot is there to keep it.
            settings.push(format!("wal_keep_size={}MB", (2 * control.segment_size.bytes()) >> 20));
        }
    }
    let mut arguments: Vec<OsString> = vec!["-D".into(), data_dir.clone().into()];
    arguments.extend(options.postgres_options.iter().map(OsString::from));
    for setting in settings {
        arguments.extend(["-c".into(), setting.into()]);
    }
    Ok(ServerCommand { program: install.program("postgres"), arguments, directory: data_dir })
}

/// Parameters that recovery needs as high as they were on the machine that wrote the WAL (manual section 27.4.3); this
/// machine may be smaller, and need not be as large once it is out of recovery.
fn raised(control: &ControlFile, configured: impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut raised = Vec::new();
    for (name, least) in control.least {
        if configured(name)?.parse().is_ok_and(|here: u32| here < least) {
            raised.push(format!("{name}={least}"));
        }
    }
    Ok(raised)
}

/// Whether the next start begins with archive recovery.
pub(super) fn is_recovering(data_dir: &Path) -> bool {
    data_dir.join(RECOVERY_SIGNAL).is_file()
}
