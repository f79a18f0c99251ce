//! `perennial run`.

use std::time::Duration;

use crate::cli::setup::{Setup, callback, codec};
use crate::cli::{args, environment, identity};
use crate::error::{Error, Result};
use crate::postgres::ConnectOptions;
use crate::run::{self, WhenBehind};
use crate::storage::{Location, Policy, Scheme};

use super::wide;

/// Defaults; each is documented at its flag in docs/reference/configuration.md.
const RPO: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_millis(3);
const IN_FLIGHT: u8 = 4;
const HEARTBEAT: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(25);
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
            discard_diverged: args.discard_diverged,
            rpo: duration(setup, args.rpo, setup.config.rpo.as_ref(), RPO)?,
            linger: duration(setup, args.linger, setup.config.linger.as_ref(), LINGER)?,
            in_flight: in_flight(setup, args.in_flight)?,
            heartbeat: duration(setup, args.heartbeat, setup.config.heartbeat.as_ref(), HEARTBEAT)?,
            grace: duration(setup, args.grace, setup.config.grace.as_ref(), GRACE)?,
            takeover_after: duration(setup, args.takeover_after, setup.config.takeover_after.as_ref(), TAKEOVER_AFTER)?,
            backup_every: duration(setup, args.backup_every, setup.config.backup_every.as_ref(), BACKUP_EVERY)?,
            max_wal_behind: match (args.max_wal_behind, &setup.config.max_wal_behind) {
                (None, Some(text)) => Some(text.parse()?),
                (given, _) => given,
            },
            when_behind: match args.when_behind.or(setup.config.when_behind) {
                Some(args::WhenBehindArg::Drop) => WhenBehind::Drop,
                Some(args::WhenBehindArg::Block) | None => WhenBehind::Block,
            },
            http: args.http.or_else(|| setup.config.http.clone()),
            notices: args.notices.or(setup.config.notices).map(|args::Platform::Ec2| environment::metadata_endpoint()),
            postgres_options: args.postgres_options,
            initdb_options: args.initdb_option,
            pg_bindir: args.pg_bindir.or_else(|| setup.config.pg_bindir.clone()),
            search_path: environment::search_path(),
            // Always the server we started, wherever its sockets are.
            connect: ConnectOptions { host: None, port: None, ..environment::connection() },
            host: environment::host_name(),
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

fn in_flight(setup: &Setup, given: Option<u8>) -> Result<usize> {
    match given.or(setup.config.in_flight).unwrap_or(IN_FLIGHT) {
        number @ 1..=16 => Ok(number.into()),
        other => Err(Error::usage(format!("in_flight = {other}: expected 1 to 16"))),
    }
}
