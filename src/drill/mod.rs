//! Drills: a restore that is done before it is needed, in a sandbox, checked by PostgreSQL itself, and recorded.
//!
//! The sandbox has nothing in common with the living cluster: its own directory (tablespaces too), a socket in a directory
//! of its own and no port, no archiving, no replication in or out, none of the cluster's preloaded libraries.

mod checks;
mod sandbox;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::postgres::Install;
use crate::repository::{DrillRecord, Repository};
use crate::restore::{self, Action, Overwrite, Target};

use checks::Checks;
use sandbox::Sandbox;

#[derive(Debug, Clone)]
pub struct Options {
    /// A directory on a disk with room for the whole database. The sandbox is made in it, and removed afterwards.
    pub directory: PathBuf,
    pub target: Target,
    /// Look at every table and index with amcheck.
    pub amcheck: bool,
    /// Statements that must say true.
    pub assertions: Vec<String>,
    /// In which database; `postgres` when `None`.
    pub database: Option<String>,
    /// Who to be in the sandbox: a superuser of the cluster.
    pub user: Option<String>,
    /// Load the libraries the cluster preloads too (`shared_preload_libraries`).
    pub preload: bool,
    /// Leave the sandbox there.
    pub keep: bool,
    pub pg_bindir: Option<PathBuf>,
    pub search_path: Option<OsString>,
    /// Words of the command that fetches WAL.
    pub fetch_command: Vec<String>,
}

/// How a drill went.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    pub record: DrillRecord,
    /// Where the sandbox is, if it was kept.
    pub kept: Option<PathBuf>,
}

/// Restores into a sandbox, starts PostgreSQL, checks, and records what came of it. An error says that there was no drill;
/// that one was failed is in the report.
pub async fn run(repository: &Repository, options: &Options, events: &Events) -> Result<Report> {
    let began = repository.clock().now();
    let sandbox = Sandbox::new(&options.directory, options.keep, repository.clock())?;
    let mut record = DrillRecord::begun(repository, began);
    let outcome = drill(repository, options, &sandbox, &mut record, events).await;
    if let Err(error) = outcome {
        // What could not be looked at says nothing of the backup.
        if matches!(error.kind(), Kind::Unreachable | Kind::Denied | Kind::Local | Kind::Internal) {
            return Err(error);
        }
        let cure =
            error.hint_text().unwrap_or("`perennial verify --full` looks at everything a restore reads").to_owned();
        record.failures.push(error.to_string());
        record.cure = Some(cure);
    }
    let kept = options.keep.then(|| sandbox.directory().to_owned());
    if !options.keep
        && let Err(error) = sandbox.remove().await
    {
        events.warning(format!("a sandbox is left behind: {error}"));
    }
    record.seconds = repository.clock().now().seconds_since(began);
    repository.put_drill(&record).await?;
    let backup = record.backup.map_or_else(|| "no backup".to_owned(), |id| id.to_string());
    match record.failures.first() {
        None => events.emit(Event::DrillDone { backup, elapsed: Duration::from_secs_f64(record.seconds.max(0.0)) }),
        Some(problem) => events.emit(Event::DrillFailed {
            backup,
            problem: problem.clone(),
            cure: record.cure.clone().unwrap_or_default(),
        }),
    }
    Ok(Report { record, kept })
}

async fn drill(
    repository: &Repository,
    options: &Options,
    sandbox: &Sandbox,
    record: &mut DrillRecord,
    events: &Events,
) -> Result<()> {
    let clock = repository.clock();
    let mut fetch_command = options.fetch_command.clone();
    fetch_command.push("--no-new-tablespaces".to_owned());
    let mut restore = restore::Options {
        data_dir: sandbox.data_dir(),
        backup: None,
        target: options.target.clone(),
        inclusive: true,
        action: Action::Promote,
        generation: None,
        timeline: None,
        databases: Vec::new(),
        tablespace_map: BTreeMap::new(),
        overwrite: Overwrite::Never,
        keep_archiving: false,
        fetch_command,
        writer: None,
        beside: Vec::new(),
    };
    let choice = restore::choose(repository, &restore).await?;
    record.backup = Some(choice.backup.backup_id);
    record.target = choice.describe();
    record.bytes = choice.backup.bytes;
    restore.backup = Some(choice.backup.backup_id);
    for tablespace in choice.backup.tablespaces.iter().filter(|tablespace| tablespace.location.is_some()) {
        restore.tablespace_map.insert(tablespace.oid.to_string(), sandbox.tablespace(tablespace.oid));
    }
    let install =
        Install::find(options.pg_bindir.as_deref(), options.search_path.as_deref(), Some(choice.backup.pg_major))?;

    let began = clock.monotonic();
    restore::run(repository, &restore, events).await?;
    record.restore_seconds = (clock.monotonic() - began).as_secs_f64();
    let began = clock.monotonic();
    let mut server = sandbox.start(&install, options, events)?;
    let looked = async {
        server.until_up(clock).await?;
        record.recovery_seconds = (clock.monotonic() - began).as_secs_f64();
        let (size, recovered) = (choice.backup.segment_size, server.recovered_to(&install)?);
        let last = size.start_of(size.number_before(choice.through));
        if options.target == Target::Newest && recovered < last {
            record
                .failures
                .push(format!("recovery ended at {recovered}, though there is WAL up to {}", choice.through));
        }
        let checks = Checks { server: &server, options, events };
        checks.all(record).await
    }
    .await;
    server.stop().await;
    looked?;
    server.check_pages(&install, record).await
}

/// A failed drill as an error, for those who want an exit code.
pub fn failure(record: &DrillRecord) -> Option<Error> {
    let problem = record.failures.first()?;
    let more = match record.failures.len() {
        1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    };
    let error = Error::damaged(format!("the drill failed: {problem}{more}"));
    Some(match &record.cure {
        Some(cure) => error.hint(cure.clone()),
        None => error,
    })
}
