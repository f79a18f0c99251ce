//! `perennial status`: how much would be lost if the machine vanished now.

use std::path::Path;

use serde_json::json;

use crate::cli::setup::Setup;
use crate::cli::{args, output};
use crate::error::Result;
use crate::model::{Lsn, Timestamp};
use crate::postgres::data_dir::OWN_DIR;
use crate::repository::manifest::BackupHead;
use crate::repository::{Claim, Known, Repository, Writer};
use crate::restore::Reachable;
use crate::wal::SegmentName;

#[derive(Default)]
struct Report {
    newest: Option<Claim>,
    /// The newest segment, its end, and what its head says.
    durable: Option<(SegmentName, Lsn, Known)>,
    gap: Option<SegmentName>,
    backup: Option<BackupHead>,
    local: Option<Local>,
}

struct Local {
    writer: Option<Writer>,
    /// What the supervisor of the directory says, if one runs.
    supervisor: Option<serde_json::Value>,
}

pub async fn run(setup: &Setup, args: args::Status) -> Result<i32> {
    let repository = setup.repository().await?;
    let mut report = look(&repository).await?;
    if let Some(data_dir) = args.data_dir.or_else(|| setup.config.data_dir.clone()) {
        report.local = Some(look_locally(&data_dir).await?);
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
        let numbers = view.index.segments(timeline).rev().map(|(number, _)| number);
        numbers.into_iter().find_map(|number| Some((timeline, number, view.locate(timeline, number)?)))
    });
    if let Some((timeline, number, place)) = newest_segment {
        let name = SegmentName::new(timeline, number, size);
        let known = repository.segment_facts(&reachable.index, place, name, size).await?;
        report.durable = Some((name, place.through(size.start_of(number + 1)), known));
    }
    Ok(report)
}

async fn look_locally(data_dir: &Path) -> Result<Local> {
    let writer = Writer::load(&data_dir.join(OWN_DIR))?;
    Ok(Local { writer, supervisor: ask(data_dir).await })
}

/// Asks the supervisor; `None` when none answers.
async fn ask(data_dir: &Path) -> Option<serde_json::Value> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(crate::run::socket_path(data_dir)).await.ok()?;
    stream.write_all(b"GET /status HTTP/1.0\r\n\r\n").await.ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    let at = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    serde_json::from_slice(&answer[at + 4..]).ok()
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
        Some((name, end, known)) => {
            output::line(format!("durable WAL     through {end} ({name}), stored {} ago", age(known.at, now)));
            if let Some(commit) = known.facts.last_commit {
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
    let Some(local) = &report.local else { return };
    let generation = local.writer.as_ref().map_or("none".to_owned(), |writer| writer.claim.generation.to_string());
    output::line(format!("this directory  generation {generation}"));
    let Some(told) = &local.supervisor else { return output::line("this machine    no supervisor is running here") };
    output::line(format!(
        "this machine    {}, WAL durable up to {} of {}: {} bytes, {:.1} s behind",
        told["phase"].as_str().unwrap_or("?"),
        told["durable_lsn"].as_str().unwrap_or("?"),
        told["server_lsn"].as_str().unwrap_or("?"),
        told["bytes_behind"],
        told["seconds_behind"].as_f64().unwrap_or_default()
    ));
    if told["commits_wait"] == true {
        output::line("COMMITS WAIT    the repository cannot be reached, and --rpo 0 was asked for");
    }
    if told["degraded"] == true {
        output::line(
            "NOT SAFE        commits are acknowledged without being in the repository (--on-bucket-loss degrade)",
        );
    }
    output::line(format!("requests        {} with WAL in the last hour", told["entries_last_hour"]));
}

fn tell_json(repository: &Repository, report: &Report, now: Timestamp) -> Result<()> {
    let durable = report.durable.as_ref().map(|(name, end, known)| {
        json!({
            "through_lsn": end,
            "segment": name.to_string(),
            "stored_at": known.at,
            "age_seconds": now.seconds_since(known.at).max(0.0),
            "last_commit": known.facts.last_commit,
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
            "supervisor": local.supervisor,
        })),
    }))
}
