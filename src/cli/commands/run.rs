//! `perennial run`.

use std::time::Duration;

use crate::cli::setup::{Setup, callback, codec};
use crate::cli::{args, environment, identity};
use crate::error::{Error, Result};
use crate::run;
use crate::storage::{Location, Policy, Scheme};

use super::wide;

/// Defaults; each is documented at its flag in docs/reference/configuration.md.
const RPO: Duration = Duration::from_secs(60);
const TAKEOVER_AFTER: Duration = Duration::from_secs(60);
const BACKUP_EVERY: Duration = Duration::from_secs(86_400);

pub fn run(setup: &Setup, args: args::Run) -> Result<i32> {
    let data_dir = setup.data_dir(args.data_dir.clone())?;
    identity::drop_root(&data_dir)?;
    wide(async {
        let location = location(setup, args.url.as_deref()).await?;
        if let (Scheme::File { directory }, true) = (&location.scheme, args.init) {
            crate::disk::create_dir(directory, 0o700)?;
        }
        let store = setup.store(&location, Policy::default())?;
        let options = run::Options {
            data_dir,
            init: args.init,
            adopt: args.adopt,
            codec: codec(&args.codec)?,
            rpo: rpo(setup, args.rpo)?,
            takeover_after: duration(setup, args.takeover_after, setup.config.takeover_after.as_ref(), TAKEOVER_AFTER)?,
            backup_every: duration(setup, args.backup_every, setup.config.backup_every.as_ref(), BACKUP_EVERY)?,
            postgres_options: args.postgres_options,
            initdb_options: args.initdb_option,
            pg_bindir: args.pg_bindir.or_else(|| setup.config.pg_bindir.clone()),
            search_path: environment::search_path(),
            connect: environment::connection(),
            host: environment::host_name(),
            push_command: callback(&setup.global, &location, "push")?,
            fetch_command: callback(&setup.global, &location, "fetch")?,
        };
        run::run(store, &options, &setup.clock, &setup.events).await
    })
}

/// The address as given, or as the instance's metadata says.
async fn location(setup: &Setup, argument: Option<&str>) -> Result<Location> {
    if setup.address(argument).is_some() {
        return setup.location(argument);
    }
    let endpoint = environment::metadata_endpoint();
    let found = run::address_from_metadata(&endpoint).await.map_err(|e| e.context("no repository is named"))?;
    match found {
        Some(address) => {
            setup.events.info(format!("the instance's metadata names the repository: {address}"));
            address.parse()
        }
        None => Err(Error::usage("no repository is named, and the instance's metadata has neither the tag perennial-repo nor a line PERENNIAL_REPO=…")
            .hint("name it: perennial run URL -D DIR")),
    }
}

fn duration(
    setup: &Setup,
    given: Option<Duration>,
    configured: Option<&String>,
    default: Duration,
) -> Result<Duration> {
    Ok(given.or(setup.configured(configured)?).unwrap_or(default))
}

fn rpo(setup: &Setup, given: Option<Duration>) -> Result<Duration> {
    let rpo = duration(setup, given, setup.config.rpo.as_ref(), RPO)?;
    if rpo < Duration::from_secs(1) {
        return Err(Error::refused("an RPO of less than a second needs the live log, which this version does not have yet")
            .hint("the least this version can promise is --rpo 1s: a segment is archived every second in which something was written"));
    }
    Ok(rpo)
}
