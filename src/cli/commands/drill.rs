//! `perennial drill`.

use serde_json::json;

use crate::cli::setup::{Setup, callback};
use crate::cli::{args, environment, exit, identity, output};
use crate::drill::{self, Report};
use crate::error::Result;
use crate::model::human_bytes;
use crate::restore::Target;

use super::wide;

pub fn run(setup: &Setup, args: args::Drill) -> Result<i32> {
    let directory = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    identity::drop_root(&directory)?;
    wide(async {
        let location = setup.location(None)?;
        let options = drill::Options {
            directory,
            target: args.to_time.map_or(Target::Newest, Target::Time),
            amcheck: !args.no_amcheck,
            assertions: args.check,
            database: args.database,
            user: environment::connection().user,
            preload: args.preload,
            keep: args.keep,
            pg_bindir: args.pg_bindir.or_else(|| setup.config.pg_bindir.clone()),
            search_path: environment::search_path(),
            fetch_command: callback(&setup.global, &location, "fetch")?,
        };
        let repository = setup.repository().await?;
        let report = drill::run(&repository, &options, &setup.events).await?;
        if setup.global.json {
            output::json(&json!({
                "schema": "perennial/drill/1",
                "repository": repository.address(),
                "drill": report.record,
                "kept": report.kept,
            }))?;
        } else {
            tell(&report);
        }
        match drill::failure(&report.record) {
            None => Ok(exit::DONE),
            Some(error) => Err(error),
        }
    })
}

fn tell(report: &Report) {
    let record = &report.record;
    if let Some(backup) = record.backup {
        output::line(format!("backup {backup}, {}", record.target));
        output::line(format!(
            "{} restored in {:.1} s, recovered in {:.1} s: {:.1} s until it could be used",
            human_bytes(record.bytes),
            record.restore_seconds,
            record.recovery_seconds,
            record.restore_seconds + record.recovery_seconds
        ));
    }
    record.checked.iter().for_each(|what| output::line(format!("right:    {what}")));
    record.left_out.iter().for_each(|what| output::line(format!("left out: {what}")));
    record.failures.iter().for_each(|what| output::line(format!("WRONG:    {what}")));
    if let Some(kept) = &report.kept {
        output::line(format!("kept: {}", kept.display()));
    }
}
