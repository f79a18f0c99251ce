//! `perennial verify`.

use serde_json::json;

use crate::cli::setup::Setup;
use crate::cli::{args, exit, output};
use crate::error::Result;
use crate::model::human_bytes;
use crate::restore::{Depth, Report, Sample, verify};

pub async fn run(setup: &Setup, args: args::Verify) -> Result<i32> {
    let repository = setup.repository().await?;
    let sample = args.sample.map(|share| Sample::of_day(share, setup.clock.now()));
    let (depth, name) = match (args.full, sample) {
        (true, _) => (Depth::Full, "full"),
        (_, Some(sample)) => (Depth::Sample(sample), "sample"),
        (false, None) => (Depth::Quick, "quick"),
    };
    let report = verify(&repository, depth, &setup.events).await?;
    if setup.global.json {
        output::json(&json!({
            "schema": "perennial/verify/1",
            "repository": repository.address(),
            "depth": name,
            "part": sample.map(|sample| sample.part + 1),
            "parts": sample.map(|sample| sample.parts),
            "report": report,
        }))?;
    } else {
        tell(&report, depth);
    }
    Ok(code(&report))
}

fn tell(report: &Report, depth: Depth) {
    for finding in &report.findings {
        output::line(format!("{}\n  so:   {}\n  cure: {}\n", finding.problem, finding.consequence, finding.cure));
    }
    let bytes = human_bytes(report.bytes);
    let read = match depth {
        Depth::Quick => String::new(),
        Depth::Sample(sample) => format!(", {bytes} read (part {} of {})", sample.part + 1, sample.parts),
        Depth::Full => format!(", {bytes} read"),
    };
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
