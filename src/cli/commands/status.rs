//! `perennial status`: how much would be lost if the machine vanished now.

use std::path::Path;

use serde_json::json;

use crate::cli::setup::Setup;
use crate::cli::{args, output};
use crate::error::{IoContext, Result};
use crate::model::{Lsn, Timestamp};
use crate::postgres::data_dir::OWN_DIR;
use crate::repository::manifest::BackupHead;
use crate::repository::{Claim, Repository, WalHead, Writer};
use crate::restore::Reachable;
use crate::wal::{SegmentName, WalFileName};

#[derive(Default)]
struct Report {
    newest: Option<Claim>,
    /// The newest segment, its end, and what its head says.
    durable: Option<(SegmentName, Lsn, WalHead)>,
    gap: Option<SegmentName>,
    backup: Option<BackupHead>,
    local: Option<Local>,
}

struct Local {
    writer: Option<Writer>,
    waiting: u64,
}

pub async fn run(setup: &Setup, args: args::Status) -> Result<i32> {
    let repository = setup.repository().await?;
    let mut report = look(&repository).await?;
    if let Some(data_dir) = args.data_dir.or_else(|| setup.config.data_dir.clone()) {
        report.local = Some(look_locally(&data_dir)?);
    }
    let now = setup.clock.now();
    if setup.global.json {
        tell_json(&repository, &report, now)?
    } else {
        tell(&repository, &report, now)
    }
    Ok(0)
}

async fn look(repository: &Repository) -> Result<Report> {
    let Some(newest) = repository.newest_generation().await? else { return Ok(Report::default()) };
    let claim = repository.claim(newest).await?;
    let mut report = Report { newest: Some(claim), ..Report::default() };
    let Some(reachable) = Reachable::find(repository, Some(newest), None).await? else { return Ok(report) };
    let view = reachable.view()?;
    let size = view.segment_size();
    let usable = view.usable(&reachable.backups);
    report.backup = usable.last().map(|(head, _)| (*head).clone());
    report.gap = usable.last().and_then(|(_, coverage)| coverage.gap.then_some(coverage.next));
    let newest_segment = view.history.spans().rev().find_map(|(timeline, ..)| {
        view.index
            .segments(timeline)
            .rev()
            .find(|(number, _)| view.is_on_the_way(timeline, *number))
            .map(|found| (timeline, found))
    });
    if let Some((timeline, (number, place))) = newest_segment {
        let name = SegmentName::new(timeline, number, size);
        let head = repository.wal_head(place.generation, WalFileName::Segment(name)).await?;
        report.durable = head.map(|head| (name, size.start_of(number + 1), head));
    }
    Ok(report)
}

fn look_locally(data_dir: &Path) -> Result<Local> {
    let writer = Writer::load(&data_dir.join(OWN_DIR))?;
    let status = data_dir.join("pg_wal/archive_status");
    let mut waiting = 0;
    for entry in std::fs::read_dir(&status).on("list directory", &status)? {
        let name = entry.on("list directory", &status)?.file_name();
        waiting += u64::from(name.to_string_lossy().ends_with(".ready"));
    }
    Ok(Local { writer, waiting })
}

fn age(at: Timestamp, now: Timestamp) -> String {
    let seconds = now.seconds_since(at).max(0.0);
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

fn tell(repository: &Repository, report: &Report, now: Timestamp) {
    output::line(format!("repository      {}", repository.address()));
    let Some(newest) = &report.newest else { return output::line("no server was ever started on it") };
    output::line(format!(
        "generation      {}, started by {} {} ago",
        newest.generation,
        newest.host,
        age(newest.claimed_at, now)
    ));
    match &report.durable {
        Some((name, end, head)) => {
            output::line(format!("durable WAL     through {end} ({name}), pushed {} ago", age(head.pushed_at, now)));
            if let Some(commit) = head.last_commit {
                output::line(format!("last commit     {commit} ({} ago)", age(commit, now)));
            }
        }
        None => output::line("durable WAL     none"),
    }
    match &report.backup {
        Some(backup) => {
            output::line(format!("newest backup   {}, taken {} ago", backup.backup_id, age(backup.stopped_at, now)))
        }
        None => output::line("newest backup   NONE: nothing can be restored yet"),
    }
    if let Some(missing) = report.gap {
        output::line(format!(
            "GAP             {missing} is missing: points after it cannot be reached from this backup"
        ));
    }
    if let Some(local) = &report.local {
        let generation = local.writer.as_ref().map_or("none".to_owned(), |writer| writer.claim.generation.to_string());
        output::line(format!(
            "this directory  generation {generation}, {} WAL files wait to be archived",
            local.waiting
        ));
    }
}

fn tell_json(repository: &Repository, report: &Report, now: Timestamp) -> Result<()> {
    let durable = report.durable.as_ref().map(|(name, end, head)| {
        json!({
            "through_lsn": end,
            "segment": name.to_string(),
            "pushed_at": head.pushed_at,
            "age_seconds": now.seconds_since(head.pushed_at).max(0.0),
            "last_commit": head.last_commit,
        })
    });
    output::json(&json!({
        "schema": "perennial/status/1",
        "repository": repository.address(),
        "repository_id": repository.descriptor().repository_id,
        "generation": report.newest,
        "durable": durable,
        "missing_segment": report.gap.map(|name| name.to_string()),
        "newest_backup": report.backup.as_ref().map(super::list::backup_json),
        "local": report.local.as_ref().map(|local| json!({
            "generation": local.writer.as_ref().map(|writer| writer.claim.generation),
            "wal_files_waiting": local.waiting,
        })),
    }))
}
