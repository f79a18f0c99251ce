//! `perennial verify`.

use serde_json::json;

use crate::cli::setup::Setup;
use crate::cli::{args, exit, output};
use crate::error::Result;
use crate::model::human_bytes;
use crate::restore::{Depth, Report, verify};

pub async fn run(setup: &Setup, args: args::Verify) -> Result<i32> {
    let repository = setup.repository().await?;
    let depth = if args.full { Depth::Full } else { Depth::Quick };
    let report = verify(&repository, depth, &setup.events).await?;
    if setup.global.json {
        output::json(&json!({
            "schema": "perennial/verify/1",
            "repository": repository.address(),
            "depth": if args.full { "full" } else { "quick" },
            "report": report,
        }))?;
    } else {
        tell(&report, args.full);
    }
    Ok(code(&report))
}

fn tell(report: &Report, full: bool) {
    for finding in &report.findings {
        output::line(format!("{}\n  so:   {}\n  cure: {}\n", finding.problem, finding.consequence, finding.cure));
    }
    let read = if full { format!(", {} read", human_bytes(report.bytes)) } else { String::new() };
    let looked = format!("{} backups, {} packs, {} segments{read}", report.backups, report.packs, report.segments);
    match report.findings.len() {
        0 => {
            output::line(format!("verified: {looked}: everything that is listed can be restored, as far as was looked"))
        }
        count => output::line(format!("{looked}: {count} findings")),
    }
}

/// By the worst finding.
fn code(report: &Report) -> i32 {
    let kind = match report.findings.iter().any(|finding| finding.damaged) {
        true => crate::error::Kind::Damaged,
        false if report.findings.is_empty() => return exit::DONE,
        false => crate::error::Kind::NotFound,
    };
    exit::code(kind)
}
