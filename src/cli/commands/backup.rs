//! `perennial backup`.

use std::path::Path;
use std::sync::Arc;

use crate::archive::ensure_writer;
use crate::backup;
use crate::cli::setup::Setup;
use crate::cli::{args, environment, identity, output};
use crate::error::{Error, Result};
use crate::model::{Generation, human_bytes};
use crate::postgres::{ControlFile, version_of};
use crate::repository::Repository;
use crate::restore::standby;
use crate::storage::{Policy, Store};

use super::wide;

pub fn run(setup: &Setup, args: args::Backup) -> Result<i32> {
    let data_dir = setup.data_dir(args.data_dir.clone())?;
    if !backup::is_data_dir(&data_dir)? {
        return Err(Error::not_found(format!(
            "{} is not a PostgreSQL data directory: it has no PG_VERSION",
            data_dir.display()
        )));
    }
    identity::drop_root(&data_dir)?;
    wide(async {
        let store = setup.store(&setup.location(None)?, Policy::default())?;
        let of_standby = standby::is_standby(&data_dir)?;
        let (repository, generation) = match of_standby {
            true => of_primary(Repository::open(store, &setup.clock).await?, &data_dir).await?,
            false => own(setup, store, &data_dir).await?,
        };
        let options = backup::Options {
            beside: setup.besides(args.beside, &data_dir)?,
            data_dir,
            connect: environment::connection(),
            generation,
            fast: !args.spread_checkpoint,
            of_standby,
            fail_on_damage: args.fail_on_damage,
            full: args.full,
            max_rate: setup.size(args.max_rate, setup.config.max_rate.as_ref())?,
            wal_timeout: args.wal_timeout,
        };
        let done = backup::run(&repository, &options, &setup.events).await?;
        if setup.global.json {
            output::json(&serde_json::json!({
                "schema": "perennial/backup/1",
                "backup": super::list::backup_json(&done.head),
                "seconds": done.elapsed.as_secs_f64(),
                "read_bytes": done.head.bytes.saturating_sub(done.unread),
                "unread_bytes": done.unread,
                "changes_from": if done.every_page.is_none() { "wal_summaries" } else { "pages" },
                "why_pages": done.every_page,
                "behind_wal": behind_wal(&done.behind_wal.0),
                "stretches_behind_wal": done.behind_wal.1,
            }))?;
        } else {
            let unread = match done.unread {
                0 => String::new(),
                unread => format!(", {} of it not read", human_bytes(unread)),
            };
            output::line(format!(
                "{} {} stored as {}{unread}",
                done.head.backup_id,
                human_bytes(done.head.bytes),
                human_bytes(done.head.stored)
            ));
        }
        // The backup is there; what was asked for besides is not.
        done.failed.into_iter().next().map_or(Ok(0), Err)
    })
}

/// The repository, and the generation under which the directory archives to it.
async fn own(setup: &Setup, store: Arc<dyn Store>, data_dir: &Path) -> Result<(Repository, Generation)> {
    let host = environment::host_name();
    let writer = ensure_writer(store.clone(), data_dir, None, &host, &setup.clock, &setup.events).await?;
    let repository = Repository::open(store, &setup.clock).await?;
    if repository.descriptor().repository_id != writer.descriptor.repository_id {
        return Err(Error::refused(format!(
            "{} is another repository than the one this directory archives to ({})",
            repository.address(),
            writer.descriptor.repository_id
        ))
        .hint("the bucket was emptied or replaced: bring it back, or remove pgsql_tmp_perennial from the data directory to begin anew there"));
    }
    Ok((repository, writer.claim.generation))
}

/// The generation under which a standby's primary archives: the newest, if it is of the same cluster. A standby claims nothing.
async fn of_primary(repository: Repository, data_dir: &Path) -> Result<(Repository, Generation)> {
    let system_id = ControlFile::read(data_dir, version_of(data_dir)?)?.system_id;
    let nobody = || {
        Error::refused(format!(
            "{} is a standby's, and nobody archives to {}",
            data_dir.display(),
            repository.address()
        ))
        .hint("archive the primary's WAL there first: perennial run, agent or wal push")
    };
    let generation = repository.newest_generation().await?.ok_or_else(nobody)?;
    let claim = repository.claim(generation).await?;
    if claim.system_id != system_id {
        return Err(Error::refused(format!(
            "{} is a standby of system {system_id}, {} is of {}",
            data_dir.display(),
            repository.address(),
            claim.system_id
        ))
        .hint("name the repository of its primary with --repo"));
    }
    Ok((repository, generation))
}

fn behind_wal(stretches: &[backup::Stretch]) -> serde_json::Value {
    let one = |stretch: &backup::Stretch| {
        serde_json::json!({
            "file": stretch.file,
            "first_block": stretch.first_block,
            "last_block": stretch.last_block,
        })
    };
    stretches.iter().map(one).collect()
}
