//! `perennial restore`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cli::args::{self, ActionArg, TargetArgs};
use crate::cli::setup::{Setup, apart, callback};
use crate::cli::{identity, output};
use crate::error::{Error, Result};
use crate::restore::{self, Action, Overwrite, Target};

use super::wide;

pub fn run(setup: &Setup, args: args::Restore) -> Result<i32> {
    let data_dir = setup.data_dir(args.data_dir.clone())?;
    if !args.dry_run {
        identity::drop_root(&data_dir)?;
    }
    wide(async {
        let location = setup.location(None)?;
        let options = restore::Options {
            backup: args.backup,
            target: target(args.target),
            inclusive: !args.exclusive,
            action: match args.action {
                _ if args.standby => Action::Follow,
                ActionArg::Pause => Action::Pause,
                ActionArg::Promote => Action::Promote,
                ActionArg::Shutdown => Action::Shutdown,
            },
            generation: args.generation,
            timeline: args.timeline,
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
            beside: apart(args.beside, &data_dir)?,
            data_dir,
        };
        let repository = setup.repository().await?;
        let choice = match args.dry_run {
            true => restore::choose(&repository, &options).await?,
            false => {
                // Whatever is wrong is told before a directory is made.
                restore::check(&repository, &options).await?;
                let _lock = restore::lock(&options.data_dir)?;
                restore::run(&repository, &options, &setup.events).await?.choice
            }
        };
        if setup.global.json {
            return tell_json(&options, &choice, args.dry_run).map(|()| 0);
        }
        let verb = if args.dry_run { "would restore" } else { "restored" };
        output::line(format!("{verb} backup {} to {}", choice.backup.backup_id, choice.describe()));
        if !args.dry_run {
            output::line(format!("start it: pg_ctl -D '{}' start", options.data_dir.display()));
            match options.action {
                Action::Follow => output::line(
                    "it follows the repository, and writes nothing there; to make it the database, stop it, then: perennial run URL -D DIR",
                ),
                _ if options.keep_archiving => (),
                _ => output::line(
                    "archiving is off in this copy; to make it the database from now on: perennial run URL -D DIR --adopt",
                ),
            }
        }
        Ok(0)
    })
}

fn target(args: TargetArgs) -> Target {
    match args {
        TargetArgs { to_time: Some(time), .. } => Target::Time(time),
        TargetArgs { to_lsn: Some(lsn), .. } => Target::Lsn(lsn),
        TargetArgs { to_xid: Some(xid), .. } => Target::Xid(xid),
        TargetArgs { to_name: Some(name), .. } => Target::Name(name),
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

fn tell_json(options: &restore::Options, choice: &restore::Choice, dry_run: bool) -> Result<()> {
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
    }))
}
