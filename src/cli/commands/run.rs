//! `perennial run`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::setup::{Setup, callback, codec};
use crate::cli::{args, environment, identity, memory};
use crate::copy::Copy;
use crate::error::{Error, Result};
use crate::model::Share;
use crate::postgres::ConnectOptions;
use crate::repository::Codec;
use crate::run::{self, OnBucketLoss, WhenBehind};
use crate::storage::{Location, Policy, Scheme};

use super::wide;

/// Defaults; each is documented at its flag in docs/reference/configuration.md.
const RPO: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_millis(3);
const IN_FLIGHT: u8 = 4;
const HEARTBEAT: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(25);
const TAKEOVER_AFTER: Duration = Duration::from_secs(60);
const BUCKET_LOSS: Duration = Duration::from_secs(10);
const ALSO_EVERY: Duration = Duration::from_secs(300);
const BACKUP_EVERY: Duration = Duration::from_secs(86_400);
const VERIFY_SAMPLE: &str = "5%";

pub fn run(setup: &Setup, mut args: args::Run) -> Result<i32> {
    let data_dir = setup.data_dir(args.keep.data_dir.take())?;
    identity::drop_root(&data_dir)?;
    memory::hand_back();
    wide(async {
        let location = location(setup, args.keep.url.as_deref()).await?;
        if let (Scheme::File { directory }, true) = (&location.scheme, args.init) {
            crate::disk::create_dir(directory, 0o700)?;
        }
        let store = setup.store(&location, Policy::default())?;
        let options = run::Options {
            init: args.init,
            codec: codec(&args.codec)?,
            recipients: setup.recipients(&args.codec, &location)?,
            discard_diverged: args.discard_diverged,
            when_behind: match args.when_behind.or(setup.config.when_behind) {
                Some(args::WhenBehindArg::Drop) => WhenBehind::Drop,
                Some(args::WhenBehindArg::Block) | None => WhenBehind::Block,
            },
            postgres_options: args.postgres_options,
            initdb_options: args.initdb_option,
            pg_bindir: args.pg_bindir.or_else(|| setup.config.pg_bindir.clone()),
            // Always the server we started, wherever its sockets are.
            connect: ConnectOptions { host: None, port: None, ..environment::connection() },
            fetch_command: callback(&setup.global, &location, "fetch")?,
            ..options(setup, args.keep, data_dir, &location)?
        };
        run::run(store, &options, &setup.clock, &setup.events).await
    })
}

/// What `run` and `agent` have in common; the rest is as for a server that something else runs.
pub(super) fn options(
    setup: &Setup,
    mut keep: args::Keep,
    data_dir: PathBuf,
    location: &Location,
) -> Result<run::Options> {
    let config = &setup.config;
    let backup_every = duration(setup, keep.backup_every, config.backup_every.as_ref(), BACKUP_EVERY)?;
    let full_every = duration(setup, keep.full_every, config.full_every.as_ref(), Duration::ZERO)?;
    let lock = setup.lock("")?.filter(|_| matches!(location.scheme, Scheme::S3 { .. }));
    if lock.is_some_and(|lock| !lock.outlasts(backup_every, full_every)) {
        setup.events.warning("the store's lock does not outlast what the last backup needs: what it shares with older ones was locked when it was written. Take full backups in time: --full-every of less than --lock, by twice --backup-every");
    }
    let (keep_backups, prune_grace) = super::prune::rules(setup, &keep.retention)?;
    Ok(run::Options {
        drill: drills(setup, &mut keep)?,
        verify: verifications(setup, &keep)?,
        also: also(setup, &mut keep, location)?,
        beside: setup.besides(std::mem::take(&mut keep.beside), &data_dir)?,
        keep: keep_backups,
        prune_grace,
        data_dir,
        init: false,
        adopt: keep.adopt,
        codec: Codec::default(),
        recipients: Vec::new(),
        discard_diverged: false,
        rpo: duration(setup, keep.rpo, config.rpo.as_ref(), RPO)?,
        linger: duration(setup, keep.linger, config.linger.as_ref(), LINGER)?,
        in_flight: in_flight(setup, keep.in_flight)?,
        heartbeat: duration(setup, keep.heartbeat, config.heartbeat.as_ref(), HEARTBEAT)?,
        grace: duration(setup, keep.grace, config.grace.as_ref(), GRACE)?,
        takeover_after: duration(setup, keep.takeover_after, config.takeover_after.as_ref(), TAKEOVER_AFTER)?,
        backup_every,
        full_every,
        max_rate: setup.size(keep.max_rate, config.max_rate.as_ref())?,
        max_wal_behind: setup.size(keep.max_wal_behind, config.max_wal_behind.as_ref())?,
        when_behind: WhenBehind::Block,
        on_bucket_loss: match keep.on_bucket_loss.or(config.on_bucket_loss) {
            Some(args::OnBucketLossArg::Degrade) => OnBucketLoss::Degrade,
            Some(args::OnBucketLossArg::Block) | None => OnBucketLoss::Block,
        },
        bucket_loss_after: duration(setup, keep.bucket_loss_after, config.bucket_loss_after.as_ref(), BUCKET_LOSS)?,
        http: keep.http.or_else(|| config.http.clone()),
        notices: keep.notices.or(config.notices).map(|args::Platform::Ec2| environment::metadata_endpoint()),
        postgres_options: Vec::new(),
        initdb_options: Vec::new(),
        pg_bindir: config.pg_bindir.clone(),
        search_path: environment::search_path(),
        connect: environment::connection(),
        host: environment::host_name(),
        fetch_command: Vec::new(),
    })
}

fn also(setup: &Setup, keep: &mut args::Keep, from: &Location) -> Result<Option<run::Also>> {
    let every = duration(setup, keep.also_every, setup.config.also_every.as_ref(), ALSO_EVERY)?;
    let to = match (keep.also_to.take(), &setup.config.also_to) {
        (Some(to), _) => to,
        (None, Some(text)) => text.parse()?,
        (None, None) => return Ok(None),
    };
    setup.apart_from(from, &to)?;
    let (setup, from) = (setup.clone(), from.clone());
    let open = move || Ok(Copy { from: setup.bare_store(&from)?, to: setup.second_store(&to)? });
    Ok(Some(run::Also { open: Arc::new(open), every }))
}

fn drills(setup: &Setup, keep: &mut args::Keep) -> Result<Option<run::Drills>> {
    let config = &setup.config;
    let every = duration(setup, keep.drill_every, config.drill_every.as_ref(), Duration::ZERO)?;
    if every.is_zero() {
        return Ok(None);
    }
    let directory = keep.drill_in.take().or_else(|| config.drill_in.clone());
    let directory = directory.ok_or_else(|| {
        Error::usage("drills need a directory")
            .hint("name one on a disk with room for the whole database: --drill-in DIR")
    })?;
    let given = std::mem::take(&mut keep.drill_check);
    let checks = if given.is_empty() { config.drill_check.clone() } else { given };
    Ok(Some(run::Drills { every, directory, checks }))
}

fn verifications(setup: &Setup, keep: &args::Keep) -> Result<Option<run::Verifications>> {
    let config = &setup.config;
    let every = duration(setup, keep.verify_every, config.verify_every.as_ref(), Duration::ZERO)?;
    let share: Share = match (keep.verify_sample, &config.verify_sample) {
        (Some(share), _) => share,
        (None, text) => text.as_deref().unwrap_or(VERIFY_SAMPLE).parse()?,
    };
    Ok((!every.is_zero()).then_some(run::Verifications { every, share }))
}

/// The address as given, or as the instance's metadata says.
pub(super) async fn location(setup: &Setup, argument: Option<&str>) -> Result<Location> {
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
