//! `perennial clone`: a restore into a repository of its own.

use std::sync::Arc;

use crate::cli::args;
use crate::cli::setup::{Setup, codec};
use crate::cli::{identity, output};
use crate::error::{Error, Result};
use crate::repository::{Found, Repository};
use crate::restore;
use crate::storage::{Policy, ReadOnly, Scheme, Store};

use super::wide;

pub fn run(setup: &Setup, args: args::Clone) -> Result<i32> {
    if args.restore.keep_archiving {
        return Err(Error::usage(
            "--keep-archiving is not for clones: a clone never writes to the repository it comes from",
        ));
    }
    if args.restore.standby {
        return Err(Error::usage("--standby is not for clones: a clone goes its own way")
            .hint("`perennial restore --standby` makes a standby"));
    }
    if !args.restore.database.is_empty() {
        return Err(Error::usage("--database is not for clones: a clone is a whole cluster")
            .hint("restore the database by itself, and bring it into a cluster of its own with pg_dump"));
    }
    let data_dir = setup.data_dir(args.restore.data_dir.clone())?;
    if !args.restore.dry_run {
        identity::drop_root(&data_dir)?;
    }
    wide(async {
        let from = setup.location(None)?;
        setup.apart_from(&from, &args.to)?;
        let options = super::restore::options(setup, &args.restore, data_dir)?;
        let source: Arc<dyn Store> = Arc::new(ReadOnly::new(setup.store(&from, Policy::default())?));
        let source = Repository::open(source, &setup.clock).await?;
        if let Scheme::File { directory } = &args.to.scheme
            && !args.restore.dry_run
        {
            crate::disk::create_dir(directory, 0o700)?;
        }
        let place: Arc<dyn Store> = Arc::new(setup.second_vault(&args.to)?);
        must_be_unused(Arc::clone(&place), setup, &args).await?;
        restore::check(&source, &options).await?;
        let choice = match args.restore.dry_run {
            true => restore::choose(&source, &options).await?,
            false => {
                let recipients = setup.recipients(&args.codec, &args.to)?;
                let _lock = restore::lock(&options.data_dir)?;
                let choice = restore::run(&source, &options, &setup.events).await?.choice;
                // Last: a clone that did not come about leaves an empty place.
                Repository::make(place, codec(&args.codec)?, &recipients, &setup.clock).await?;
                choice
            }
        };
        if setup.global.json {
            output::json(&serde_json::json!({
                "schema": "perennial/clone/1",
                "dry_run": args.restore.dry_run,
                "from": from.to_string(),
                "to": args.to.to_string(),
                "directory": options.data_dir,
                "backup": choice.backup.backup_id,
                "target": choice.located.target.to_string(),
            }))?;
            return Ok(0);
        }
        let verb = if args.restore.dry_run { "would clone" } else { "cloned" };
        output::line(format!("{verb} {from}, backup {} to {}", choice.backup.backup_id, choice.describe()));
        if !args.restore.dry_run {
            output::line(format!("start it: perennial run {} -D '{}' --adopt", args.to, options.data_dir.display()));
        }
        Ok(0)
    })
}

/// A clone begins a history: it must not come into one that is there.
async fn must_be_unused(place: Arc<dyn Store>, setup: &Setup, args: &args::Clone) -> Result<()> {
    let Found::Repository(repository) = Repository::find(place, &setup.clock).await? else { return Ok(()) };
    match repository.newest_generation().await? {
        None => Ok(()),
        Some(newest) => {
            Err(Error::refused(format!("{} is the repository of a database already (generation {newest})", args.to))
                .hint("choose an empty place for the clone"))
        }
    }
}
