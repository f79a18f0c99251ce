//! `perennial prune`, `pin` and `unpin`.

use std::time::Duration;

use serde_json::json;

use crate::cli::setup::Setup;
use crate::cli::{args, exit, output};
use crate::error::{Error, Kind, Result};
use crate::model::{BackupId, Timestamp, human_bytes};
use crate::repository::Repository;
use crate::retention::{self, Keep, Report};

const GRACE: Duration = Duration::from_secs(86_400);

/// The rules, of flags and the configuration file; and the grace period.
pub(super) fn rules(setup: &Setup, args: &args::Retention) -> Result<(Keep, Duration)> {
    let config = &setup.config;
    let keep = Keep {
        last: args.keep_last.or(config.keep_last).unwrap_or(0),
        within: args.keep_within.or(setup.configured(config.keep_within.as_ref())?),
        daily: args.keep_daily.or(config.keep_daily).unwrap_or(0),
        weekly: args.keep_weekly.or(config.keep_weekly).unwrap_or(0),
        monthly: args.keep_monthly.or(config.keep_monthly).unwrap_or(0),
        yearly: args.keep_yearly.or(config.keep_yearly).unwrap_or(0),
        points: args.keep_points.or(setup.configured(config.keep_points.as_ref())?),
    };
    let grace = args.prune_grace.or(setup.configured(config.prune_grace.as_ref())?).unwrap_or(GRACE);
    Ok((keep, grace))
}

pub async fn run(setup: &Setup, args: args::Prune) -> Result<i32> {
    let (keep, grace) = rules(setup, &args.retention)?;
    let repository = setup.repository().await?;
    let options = retention::Options { keep, grace, dry_run: args.dry_run, generation: None };
    let report = retention::prune(&repository, &options, &setup.events).await?;
    if setup.global.json {
        output::json(&json!({
            "schema": "perennial/prune/1",
            "repository": repository.address(),
            "dry_run": args.dry_run,
            "report": report,
        }))?;
    } else {
        tell(&report, args.dry_run, grace);
    }
    Ok(if report.refused.objects > 0 { exit::code(Kind::Denied) } else { exit::DONE })
}

fn tell(report: &Report, dry_run: bool, grace: Duration) {
    let rows: Vec<Vec<String>> = report
        .backups
        .iter()
        .map(|backup| {
            let answer = match (backup.reasons.is_empty(), dry_run) {
                (true, true) => "GOES".to_owned(),
                (true, false) => "DELETED".to_owned(),
                (false, _) => backup.reasons.join(", "),
            };
            vec![backup.id.to_string(), backup.stopped_at.short(), human_bytes(backup.stored), answer]
        })
        .collect();
    output::table(&["BACKUP", "TAKEN", "STORED", ""], &rows);
    let since = report.points_from_time.map_or("now".to_owned(), Timestamp::short);
    output::line(format!("\nevery point since {since} stays reachable, and each older backup that is kept for itself"));
    let verb = if dry_run { "would be deleted" } else { "deleted" };
    output::line(format!("{} objects {verb} ({})", report.objects, human_bytes(report.bytes)));
    if report.refused.objects > 0 {
        let (objects, bytes) = (report.refused.objects, human_bytes(report.refused.bytes));
        output::line(format!(
            "{objects} objects ({bytes}) stay because the store keeps them; the next prune tries again"
        ));
    }
    if report.bytes_later > 0 {
        let hours = grace.as_secs_f64() / 3600.0;
        output::line(format!("{} more once {hours:.1} h have passed", human_bytes(report.bytes_later)));
    }
}

pub async fn pin(setup: &Setup, args: args::Pin) -> Result<i32> {
    let repository = setup.repository().await?;
    must_exist(&repository, args.backup).await?;
    repository.pin(args.backup, &args.reason).await?;
    // A prune may have deleted it at the same moment.
    must_exist(&repository, args.backup).await?;
    Ok(0)
}

pub async fn unpin(setup: &Setup, args: args::Unpin) -> Result<i32> {
    let repository = setup.repository().await?;
    must_exist(&repository, args.backup).await?;
    repository.unpin(args.backup).await?;
    Ok(0)
}

async fn must_exist(repository: &Repository, id: BackupId) -> Result<()> {
    match repository.backup_ids().await?.contains(&id) {
        true => Ok(()),
        false => Err(Error::not_found(format!("{} has no backup {id}", repository.address()))
            .hint("`perennial list` shows the backups")),
    }
}
