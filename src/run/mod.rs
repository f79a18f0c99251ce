//! `perennial run`: from an address and a directory to a running, protected database, and safely down again.

pub mod boot;
mod facts;
mod metadata;
mod schedule;
mod server;
mod supervisor;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::archive::claim::{forget_origin, push_history};
use crate::archive::push::Pusher;
use crate::clock::Clock;
use crate::disk;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::model::Generation;
use crate::postgres::data_dir::OWN_DIR;
use crate::postgres::{ConnectOptions, ControlFile, Install, version_of};
use crate::repository::{Claim, Codec, NewWriter, Repository, Writer};
use crate::restore::{self, Action, Target};
use crate::storage::Store;

use boot::Decision;

pub use metadata::address_from_metadata;

#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    /// Make a new cluster if the repository is proven new.
    pub init: bool,
    /// Go on from a directory that was restored by hand, or was never supervised.
    pub adopt: bool,
    pub codec: Codec,
    pub rpo: Duration,
    /// How long to wait for another machine's first backup.
    pub takeover_after: Duration,
    pub backup_every: Duration,
    pub postgres_options: Vec<String>,
    pub initdb_options: Vec<String>,
    pub pg_bindir: Option<PathBuf>,
    /// The search path in which installations are looked for.
    pub search_path: Option<std::ffi::OsString>,
    pub connect: ConnectOptions,
    /// This machine's name, noted in claims for people.
    pub host: String,
    /// Words of the commands PostgreSQL calls back: program, `wal push` or `wal fetch`, repository.
    pub push_command: Vec<String>,
    pub fetch_command: Vec<String>,
}

/// Decisions are taken anew this many times when another machine was faster.
const DECISIONS_MAX: u32 = 10;

/// How often a waiting machine looks again.
const WAIT_STEP: Duration = Duration::from_secs(2);

/// Runs until the server has ended; returns its exit code.
pub async fn run(store: Arc<dyn Store>, options: &Options, clock: &Clock, events: &Events) -> Result<i32> {
    let writer = take_over(Arc::clone(&store), options, clock, events).await?;
    let repository = writer.repository(store, clock);
    let pusher = Pusher { repository, writer, data_dir: options.data_dir.clone(), events: events.clone() };
    supervisor::supervise(options, &pusher, events).await
}

/// Decides, claims and prepares until the data directory is this machine's to start.
async fn take_over(store: Arc<dyn Store>, options: &Options, clock: &Clock, events: &Events) -> Result<Writer> {
    let began = clock.monotonic();
    let mut lost = 0;
    let mut told = false;
    while lost < DECISIONS_MAX {
        let (found, facts) = facts::gather(Arc::clone(&store), options, clock).await?;
        let decision = boot::decide(&facts);
        if !(told && matches!(decision, Decision::Wait { .. })) {
            events.emit(Event::Decided { decision: decision.to_string() });
        }
        let machine = Machine { store: Arc::clone(&store), options, clock, events };
        let writer = match decision {
            Decision::Refuse(refusal) => return Err(refusal.into()),
            Decision::Wait { holder } => {
                if clock.monotonic() - began > options.takeover_after {
                    return Err(boot::gave_up_waiting(&holder).into());
                }
                told = true;
                clock.sleep(WAIT_STEP).await;
                continue;
            }
            Decision::Init => machine.init().await?,
            Decision::Restore { newest } => machine.restore(found, newest).await?,
            Decision::Resume { newest } => {
                machine.go_on(found, Some(newest.generation), Some(newest.generation)).await?
            }
            Decision::Adopt { newest, parent } => {
                machine.go_on(found, newest.map(|claim| claim.generation), parent).await?
            }
        };
        match writer {
            Some(writer) => return Ok(writer),
            None => lost += 1,
        }
    }
    Err(Error::refused("other machines claim generations of this repository all the time")
        .hint("make sure that only one machine is started on it"))
}

/// One attempt to act on a decision; each way yields `None` when another machine claimed first.
struct Machine<'a> {
    store: Arc<dyn Store>,
    options: &'a Options,
    clock: &'a Clock,
    events: &'a Events,
}

impl Machine<'_> {
    async fn init(&self) -> Result<Option<Writer>> {
        let (repository, _) = Repository::init(Arc::clone(&self.store), self.options.codec, self.clock).await?;
        let data_dir = &self.options.data_dir;
        let install = self.install(None)?;
        disk::create_dir(data_dir, 0o700)?;
        install.initdb(data_dir, &self.options.initdb_options)?;
        match self.claim_directory(&repository, None, None).await? {
            Some(writer) => Ok(Some(writer)),
            // Another machine's cluster is the database now; ours holds nothing yet.
            None => {
                restore::discard(data_dir)?;
                Ok(None)
            }
        }
    }

    async fn restore(&self, repository: Option<Repository>, newest: Claim) -> Result<Option<Writer>> {
        let repository = known(repository)?;
        let new = NewWriter {
            system_id: newest.system_id,
            pg_major: newest.pg_major,
            segment_size: newest.segment_size,
            host: self.options.host.clone(),
        };
        // Found before the claim: a machine that cannot run the server must not take it from one that can.
        self.install(Some(newest.pg_major))?;
        let Some(claim) = repository.try_claim(Some(newest.generation), Some(newest.generation), &new).await? else {
            return Ok(None);
        };
        self.tell(&claim);
        let writer = Writer::new(&repository, claim);
        let restore = restore::Options {
            data_dir: self.options.data_dir.clone(),
            backup: None,
            target: Target::Newest,
            inclusive: true,
            action: Action::Promote,
            generation: Some(writer.claim.generation),
            timeline: None,
            tablespace_map: std::collections::BTreeMap::new(),
            force: false,
            keep_archiving: true,
            fetch_command: self.options.fetch_command.clone(),
            writer: Some(writer.clone()),
        };
        restore::run(&repository, &restore, self.events).await?;
        Ok(Some(writer))
    }

    /// Claims for the directory as it is.
    async fn go_on(
        &self,
        repository: Option<Repository>,
        newest: Option<Generation>,
        parent: Option<Generation>,
    ) -> Result<Option<Writer>> {
        let repository = match repository {
            Some(repository) => repository,
            None => Repository::init(Arc::clone(&self.store), self.options.codec, self.clock).await?.0,
        };
        self.install(Some(version_of(&self.options.data_dir)?.major))?;
        self.claim_directory(&repository, newest, parent).await
    }

    async fn claim_directory(
        &self,
        repository: &Repository,
        newest: Option<Generation>,
        parent: Option<Generation>,
    ) -> Result<Option<Writer>> {
        let version = version_of(&self.options.data_dir)?;
        let control = ControlFile::read(&self.options.data_dir, version)?;
        let new = NewWriter {
            system_id: control.system_id,
            pg_major: version.major,
            segment_size: control.segment_size,
            host: self.options.host.clone(),
        };
        let Some(claim) = repository.try_claim(newest, parent, &new).await? else { return Ok(None) };
        self.tell(&claim);
        let writer = Writer::new(repository, claim);
        push_history(repository, &writer, &self.options.data_dir, self.events).await?;
        let own_dir = self.options.data_dir.join(OWN_DIR);
        writer.save(&own_dir)?;
        forget_origin(&own_dir)?;
        Ok(Some(writer))
    }

    fn install(&self, major: Option<u32>) -> Result<Install> {
        Install::find(self.options.pg_bindir.as_deref(), self.options.search_path.as_deref(), major)
    }

    fn tell(&self, claim: &Claim) {
        self.events.emit(Event::GenerationClaimed { generation: claim.generation, parent: claim.parent });
    }
}

fn known(repository: Option<Repository>) -> Result<Repository> {
    repository.ok_or_else(|| Error::internal("a decision to restore without a repository"))
}
