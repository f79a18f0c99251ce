//! `perennial copy`.

use crate::cli::args;
use crate::cli::output;
use crate::cli::setup::Setup;
use crate::copy::Copy;
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
    let report = copy.run(&setup.clock, &setup.events).await?;
    if setup.global.json {
        output::json(&serde_json::json!({
            "schema": "perennial/copy/1",
            "from": from.to_string(),
            "to": args.to.to_string(),
            "report": report,
        }))?;
    } else {
        output::line(format!(
            "{} has what {from} had: {} objects ({}) were new, and {} backups",
            args.to,
            report.objects,
            human_bytes(report.bytes),
            report.backups
        ));
    }
    Ok(0)
}
