//! `perennial restore`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cli::args::{self, ActionArg, TargetArgs};
use crate::cli::setup::{Setup, apart, callback};
use crate::cli::{identity, output};
use crate::error::{Error, Result};
use crate::repository::manifest::Database;
use crate::restore::{self, Action, Overwrite, Target};

use super::wide;

pub fn run(setup: &Setup, args: args::Restore) -> Result<i32> {
    let data_dir = setup.data_dir(args.data_dir.clone())?;
    if !args.dry_run {
        identity::drop_root(&data_dir)?;
    }
    wide(async {
        let options = options(setup, &args, data_dir)?;
        let repository = setup.repository().await?;
        let (choice, left_out) = match args.dry_run {
            true => {
                let choice = restore::choose(&repository, &options).await?;
                let left_out = restore::left_out(&repository, &options, &choice).await?;
                (choice, left_out)
            }
            false => {
                // Whatever is wrong is told before a directory is made.
                restore::check(&repository, &options).await?;
                let _lock = restore::lock(&options.data_dir)?;
                let restored = restore::run(&repository, &options, &setup.events).await?;
                (restored.choice, restored.left_out)
            }
        };
        if setup.global.json {
            return tell_json(&options, &choice, &left_out, args.dry_run).map(|()| 0);
        }
        let verb = if args.dry_run { "would restore" } else { "restored" };
        output::line(format!("{verb} backup {} to {}", choice.backup.backup_id, choice.describe()));
        tell_left_out(&left_out);
        if !args.dry_run {
            output::line(format!("start it: pg_ctl -D '{}' start", options.data_dir.display()));
            match options.action {
                Action::Follow => output::line(
                    "it follows the repository, and writes nothing there; to make it the database, stop it, then: perennial run URL -D DIR",
                ),
                _ if options.keep_archiving || !left_out.is_empty() => (),
                _ => output::line(
                    "archiving is off in this copy; to make it the database from now on: perennial run URL -D DIR --adopt",
                ),
            }
        }
        Ok(0)
    })
}

fn tell_left_out(left_out: &[Database]) {
    if left_out.is_empty() {
        return;
    }
    let names: Vec<&str> = left_out.iter().map(|database| database.name.as_str()).collect();
    output::line(format!("left out: {}", names.join(", ")));
    output::line(
        "nobody can connect to these, and DROP DATABASE works; this copy is not the whole cluster and cannot become the database",
    );
}

/// What `restore` is asked to do.
pub(super) fn options(setup: &Setup, args: &args::Restore, data_dir: PathBuf) -> Result<restore::Options> {
    let location = setup.location(None)?;
    Ok(restore::Options {
        backup: args.backup,
        target: target(&args.target),
        inclusive: !args.exclusive,
        action: match args.action {
            _ if args.standby => Action::Follow,
            ActionArg::Pause => Action::Pause,
            ActionArg::Promote => Action::Promote,
            ActionArg::Shutdown => Action::Shutdown,
        },
        generation: args.generation,
        timeline: args.timeline,
        databases: args.database.clone(),
        tablespace_map: tablespace_map(&args.tablespace)?,
        overwrite: match (args.force, args.delta) {
            (true, _) => Overwrite::Empty,
            (_, true) => Overwrite::Differences,
            _ => Overwrite::Never,
        },
        keep_archiving: args.keep_archiving,
        fetch_command: callback(&setup.global, &location, "fetch")?,
        writer: None,
        // Only what is asked for: the configuration file is for the machine that is the database.
        beside: apart(args.beside.clone(), &data_dir)?,
        data_dir,
    })
}

fn target(args: &TargetArgs) -> Target {
    match args {
        TargetArgs { to_time: Some(time), .. } => Target::Time(*time),
        TargetArgs { to_lsn: Some(lsn), .. } => Target::Lsn(*lsn),
        TargetArgs { to_xid: Some(xid), .. } => Target::Xid(*xid),
        TargetArgs { to_name: Some(name), .. } => Target::Name(name.clone()),
        TargetArgs { immediate: true, .. } => Target::Immediate,
        TargetArgs { before_gap: true, .. } => Target::BeforeGap,
        _ => Target::Newest,
    }
}

fn tablespace_map(pairs: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    pairs
        .iter()
        .map(|pair| match pair.rsplit_once('=') {
            Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.to_owned(), PathBuf::from(to))),
            _ => Err(Error::usage(format!("--tablespace '{pair}': expected OID=DIR or FORMER_DIR=DIR"))),
        })
        .collect()
}

fn tell_json(options: &restore::Options, choice: &restore::Choice, left_out: &[Database], dry_run: bool) -> Result<()> {
    output::json(&serde_json::json!({
        "schema": "perennial/restore/1",
        "dry_run": dry_run,
        "directory": options.data_dir,
        "standby": options.action == Action::Follow,
        "backup": super::list::backup_json(&choice.backup),
        "target": choice.located.target.to_string(),
        "generation": choice.generation,
        "timeline": choice.timeline,
        "wal_through": choice.through,
        "left_out": left_out,
    }))
}
