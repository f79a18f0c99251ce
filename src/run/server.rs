//! The command that starts the server, and watching it come up.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::Options;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::postgres::conf::wal_command;
use crate::postgres::process::ServerCommand;
use crate::postgres::{Install, Postmaster, PostmasterFile, ServerStatus};

/// How often the server's state is looked at while it starts. Its state file is a local read.
const LOOK: Duration = Duration::from_millis(50);

/// The operator's options come first: those that protect the database are ours, and the last one counts.
pub(super) fn command(options: &Options, install: &Install) -> Result<ServerCommand> {
    let data_dir = std::fs::canonicalize(&options.data_dir)
        .map_err(|e| Error::local(format!("could not resolve {}", options.data_dir.display()), e))?;
    let wal_level = install.configured(&data_dir, &options.postgres_options, "wal_level")?;
    if wal_level == "minimal" {
        return Err(Error::refused("wal_level is minimal: such WAL cannot be archived")
            .hint("set wal_level = replica (the default) in postgresql.conf"));
    }
    let mut arguments: Vec<OsString> = vec!["-D".into(), data_dir.clone().into()];
    arguments.extend(options.postgres_options.iter().map(OsString::from));
    let timeout = options.rpo.as_secs().max(1);
    let mut settings = vec![
        "archive_mode=on".to_owned(),
        format!("archive_command={}", wal_command(&options.push_command, &["%p"])),
        format!("archive_timeout={timeout}"),
    ];
    if is_recovering(&data_dir) {
        // Nobody may read a state that is not the newest yet; and the state file then tells the end of recovery.
        settings.push("hot_standby=off".to_owned());
    }
    for setting in settings {
        arguments.extend(["-c".into(), setting.into()]);
    }
    Ok(ServerCommand { program: install.program("postgres"), arguments, directory: data_dir })
}

/// Whether the next start begins with archive recovery.
pub(super) fn is_recovering(data_dir: &Path) -> bool {
    data_dir.join("recovery.signal").is_file()
}

/// Waits until the server has recovered and accepts connections; `None` when it ended instead.
pub(super) async fn wait_until_ready(
    server: &Postmaster,
    data_dir: &Path,
    clock: &Clock,
) -> Result<Option<PostmasterFile>> {
    loop {
        if server.has_ended().is_some() {
            return Ok(None);
        }
        let file = PostmasterFile::of_starting(data_dir)?.filter(|file| file.pid == server.pid());
        if let Some(file) = file.filter(|file| file.status == ServerStatus::Ready) {
            return Ok(Some(file));
        }
        clock.sleep(LOOK).await;
    }
}
