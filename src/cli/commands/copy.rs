//! `perennial copy`.

use std::sync::Arc;

use crate::cli::args;
use crate::cli::output;
use crate::cli::setup::Setup;
use crate::copy::{Copy, CopyOne};
use crate::error::{IoContext, Result};
use crate::model::human_bytes;
use crate::storage::Scheme;

pub async fn run(setup: &Setup, args: args::Copy) -> Result<i32> {
    let from = setup.location(None)?;
    setup.apart_from(&from, &args.to)?;
    if let Scheme::File { directory } = &args.to.scheme
        && let Err(e) = std::fs::create_dir(directory)
        && e.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(e).on("create directory", directory);
    }
    let copy = Copy { from: setup.bare_store(&from)?, to: setup.second_store(&args.to)? };
    let report = match args.backup {
        None => copy.run(&setup.clock, &setup.events).await?,
        Some(backup) => {
            let source = setup.repository().await?;
            let target = Arc::new(setup.second_vault(&args.to)?);
            CopyOne { copy, source, target, backup }.run(&setup.clock, &setup.events).await?
        }
    };
    if setup.global.json {
        output::json(&serde_json::json!({
            "schema": "perennial/copy/1",
            "from": from.to_string(),
            "to": args.to.to_string(),
            "backup": args.backup,
            "report": report,
        }))?;
        return Ok(0);
    }
    let (objects, bytes) = (report.objects, human_bytes(report.bytes));
    match args.backup {
        None => output::line(format!(
            "{} has what {from} had: {objects} objects ({bytes}) were new, and {} backups",
            args.to, report.backups
        )),
        Some(id) => {
            output::line(format!("{} has backup {id}: {objects} objects ({bytes}) were new", args.to));
            output::line(format!(
                "restore it: perennial restore --repo {} --backup {id} --generation {} --immediate -D DIR",
                args.to, id.generation
            ));
        }
    }
    Ok(0)
}
