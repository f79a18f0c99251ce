//! `perennial list`.

use serde_json::{Value, json};

use crate::cli::output;
use crate::cli::setup::Setup;
use crate::error::Result;
use crate::model::{Generation, Timestamp, human_bytes};
use crate::repository::manifest::{BackupHead, Backups};
use crate::repository::reach::Window;
use crate::repository::{BesideHead, Claim, Repository, tips};
use crate::restore::Reachable;

/// A window and what its last segment tells of time.
struct Stretch {
    window: Window,
    last_commit: Option<Timestamp>,
    last_push: Option<Timestamp>,
}

pub async fn run(setup: &Setup) -> Result<i32> {
    let repository = setup.repository().await?;
    let claims = repository.claims(repository.generations().await?).await?;
    let Backups { sound: backups, damaged } = repository.backups().await?;
    for damage in &damaged {
        setup.events.warning(format!("a backup cannot be used: {damage}"));
    }
    let (besides, damaged) = repository.besides(None).await?;
    for damage in &damaged {
        setup.events.warning(format!("a snapshot cannot be used: {damage}"));
    }
    let mut stretches = Vec::new();
    for tip in tips(&claims) {
        stretches.extend(stretches_of(&repository, tip).await?);
    }
    if setup.global.json {
        return tell_json(&repository, &claims, (&backups, &besides), &stretches).map(|()| 0);
    }
    output::line(format!("repository {} ({})\n", repository.address(), repository.descriptor().repository_id));
    tell_windows(&stretches);
    tell_backups(&backups);
    tell_besides(&besides);
    tell_generations(&claims);
    Ok(0)
}

async fn stretches_of(repository: &Repository, tip: Generation) -> Result<Vec<Stretch>> {
    let Some(reachable) = Reachable::find(repository, Some(tip), None).await? else { return Ok(Vec::new()) };
    let view = reachable.view()?;
    let mut stretches = Vec::new();
    for window in reachable.windows(repository.points_from().await?)? {
        let number = window.last.and_then(|name| name.number(view.segment_size()).map(|number| (name, number)));
        let place = number.and_then(|(name, number)| Some((name, view.locate(name.timeline, number)?)));
        let known = match place {
            Some((name, place)) => {
                Some(repository.segment_facts(&reachable.index, place, name, view.segment_size()).await?)
            }
            None => None,
        };
        stretches.push(Stretch {
            last_commit: known.as_ref().and_then(|known| known.facts.last_commit),
            last_push: known.map(|known| known.at),
            window,
        });
    }
    Ok(stretches)
}

fn tell_windows(stretches: &[Stretch]) {
    if stretches.is_empty() {
        return output::line("nothing can be restored yet: no backup has become restorable\n");
    }
    output::line("can be restored to any point");
    let rows: Vec<Vec<String>> = stretches
        .iter()
        .map(|stretch| {
            let window = &stretch.window;
            let end = stretch.last_commit.or(stretch.last_push).map_or(String::new(), Timestamp::short);
            let missing = match window.missing {
                Some(name) => format!("GAP: {name} is missing"),
                None if window.pruned => "WAL after it was pruned".to_owned(),
                None => String::new(),
            };
            vec![
                window.from_time.short(),
                end,
                window.from.to_string(),
                window.through.to_string(),
                window.generation.to_string(),
                window.timeline.to_string(),
                missing,
            ]
        })
        .collect();
    output::table(&["FROM", "TO", "LSN", "LSN", "GENERATION", "TIMELINE", ""], &rows);
    output::line("");
}

fn tell_backups(backups: &[BackupHead]) {
    let rows: Vec<Vec<String>> = backups
        .iter()
        .map(|head| {
            let damaged =
                if head.damaged_pages > 0 { format!("{} DAMAGED PAGES", head.damaged_pages) } else { String::new() };
            vec![
                head.backup_id.to_string(),
                head.stopped_at.short(),
                human_bytes(head.bytes),
                human_bytes(head.stored),
                format!("PostgreSQL {}", head.pg_version.split(' ').next().unwrap_or_default()),
                damaged,
            ]
        })
        .collect();
    output::table(&["BACKUP", "TAKEN", "SIZE", "STORED", "", ""], &rows);
    output::line("");
}

/// Directories beside the database.
fn tell_besides(besides: &[BesideHead]) {
    if besides.is_empty() {
        return;
    }
    let rows: Vec<Vec<String>> = besides
        .iter()
        .map(|head| {
            let changing =
                if head.changing > 0 { format!("{} FILES WERE CHANGING", head.changing) } else { String::new() };
            vec![
                head.name.to_string(),
                head.taken_at.short(),
                head.lsn.to_string(),
                human_bytes(head.bytes),
                human_bytes(head.stored),
                head.backup_id.to_string(),
                changing,
            ]
        })
        .collect();
    output::table(&["BESIDE", "TAKEN", "NOT AHEAD OF", "SIZE", "STORED", "WITH BACKUP", ""], &rows);
    output::line("");
}

fn tell_generations(claims: &[Claim]) {
    let rows: Vec<Vec<String>> = claims
        .iter()
        .map(|claim| {
            let parent = claim.parent.map_or("-".to_owned(), |parent| parent.to_string());
            vec![claim.generation.to_string(), parent, claim.claimed_at.short(), claim.host.clone()]
        })
        .collect();
    output::table(&["GENERATION", "PARENT", "STARTED", "BY"], &rows);
}

fn tell_json(
    repository: &Repository,
    claims: &[Claim],
    (backups, besides): (&[BackupHead], &[BesideHead]),
    stretches: &[Stretch],
) -> Result<()> {
    let windows: Vec<Value> = stretches
        .iter()
        .map(|stretch| {
            let window = &stretch.window;
            json!({
                "generation": window.generation,
                "timeline": window.timeline,
                "from_lsn": window.from,
                "from_time": window.from_time,
                "through_lsn": window.through,
                "last_commit": stretch.last_commit,
                "last_push": stretch.last_push,
                "oldest_backup": window.oldest_backup,
                "newest_backup": window.newest_backup,
                "missing_segment": window.missing.map(|name| name.to_string()),
                "pruned_after": window.pruned,
            })
        })
        .collect();
    output::json(&json!({
        "schema": "perennial/list/1",
        "repository": repository.address(),
        "repository_id": repository.descriptor().repository_id,
        "windows": windows,
        "backups": backups.iter().map(backup_json).collect::<Vec<_>>(),
        "beside": besides.iter().map(beside_json).collect::<Vec<_>>(),
        "generations": claims,
    }))
}

fn beside_json(head: &BesideHead) -> Value {
    json!({
        "name": head.name,
        "backup": head.backup_id,
        "path": head.path,
        "generation": head.generation,
        "timeline": head.timeline,
        "lsn": head.lsn,
        "taken_at": head.taken_at,
        "files": head.files,
        "bytes": head.bytes,
        "stored_bytes": head.stored,
        "changing_files": head.changing,
    })
}

/// A backup as JSON reports show it.
pub fn backup_json(head: &BackupHead) -> Value {
    json!({
        "id": head.backup_id,
        "generation": head.generation,
        "timeline": head.timeline,
        "start_lsn": head.start_lsn,
        "stop_lsn": head.stop_lsn,
        "started_at": head.started_at,
        "stopped_at": head.stopped_at,
        "pg_version": head.pg_version,
        "files": head.files,
        "bytes": head.bytes,
        "stored_bytes": head.stored,
        "packs": head.packs,
        "parent": head.parent,
        "full_at": head.full_at,
        "damaged_pages": head.damaged_pages,
        "damaged": head.damaged,
    })
}
