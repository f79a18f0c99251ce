//! `perennial run`: from an address and a directory to a running, protected database, and safely down again.

pub mod agent;
pub mod boot;
mod claimant;
mod ending;
mod facts;
mod hold;
mod metadata;
mod notices;
#[cfg(test)]
mod prune_beside_backup;
mod schedule;
mod server;
mod signals;
mod streaming;
mod summaries;
mod supervisor;
mod telling;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::archive::push::Pusher;
use crate::archive::resume;
use crate::clock::Clock;
use crate::copy::Copy;
use crate::disk;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::{Beside, ByteSize, Generation, Share, WriteId};
use crate::postgres::data_dir::RECOVERY_SIGNAL;
use crate::postgres::{ConnectOptions, ControlFile, Install, version_of};
use crate::repository::log::Position;
use crate::repository::{Claim, Codec, NewWriter, Recipient, Repository, Writer};
use crate::restore::{self, Action, Overwrite, Target, standby};
use crate::retention::Keep;
use crate::storage::{Created, Store};

use boot::Decision;
use claimant::Claimant;

pub use metadata::address_from_metadata;
pub use telling::{ready_path, socket_path};

#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    /// Make a new cluster if the repository is proven new.
    pub init: bool,
    /// Go on from a directory that was restored by hand, or was never supervised.
    pub adopt: bool,
    /// Set a directory aside whose WAL the repository does not continue.
    pub discard_diverged: bool,
    pub codec: Codec,
    /// Who can open a new repository; without any it is in the clear.
    pub recipients: Vec<Recipient>,
    /// How the server's WAL is streamed.
    pub rpo: Duration,
    pub linger: Duration,
    pub in_flight: usize,
    pub heartbeat: Duration,
    /// How long another machine must be silent before it is replaced, and how long to wait for its first backup.
    pub takeover_after: Duration,
    /// How much WAL may wait for the repository, and what happens then.
    pub max_wal_behind: Option<ByteSize>,
    pub when_behind: WhenBehind,
    /// At an RPO of zero, what happens once a commit has waited for the repository this long.
    pub on_bucket_loss: OnBucketLoss,
    pub bucket_loss_after: Duration,
    /// How long a stop may take.
    pub grace: Duration,
    pub backup_every: Duration,
    /// How old the last full backup may be when the next one that is due becomes a full one; zero: none does for its age.
    pub full_every: Duration,
    /// Bytes a second that a base backup reads at most.
    pub max_rate: Option<ByteSize>,
    /// Proofs that the newest state can be restored.
    pub drill: Option<Drills>,
    /// Looks at the repository, a part of it each time.
    pub verify: Option<Verifications>,
    /// A second place that is kept current.
    pub also: Option<Also>,
    /// What is kept of old backups; no rule: everything.
    pub keep: Keep,
    pub prune_grace: Duration,
    /// Directories beside the database.
    pub beside: Vec<Beside>,
    /// Address and port on which readiness, status and metrics are told.
    pub http: Option<String>,
    /// Where to ask for notices that the machine will go away.
    pub notices: Option<String>,
    pub postgres_options: Vec<String>,
    pub initdb_options: Vec<String>,
    pub pg_bindir: Option<PathBuf>,
    /// The search path in which installations are looked for.
    pub search_path: Option<std::ffi::OsString>,
    pub connect: ConnectOptions,
    /// This machine's name, noted in claims for people.
    pub host: String,
    /// Words of the command with which PostgreSQL calls back: program, `wal fetch`, repository.
    pub fetch_command: Vec<String>,
}

/// Opens the two places of a copy: a disk that is not mounted is no reason to have no database.
pub type OpenCopy = Arc<dyn Fn() -> Result<Copy> + Send + Sync>;

/// Copies by schedule.
#[derive(Clone)]
pub struct Also {
    pub open: OpenCopy,
    /// From the end of one to the next.
    pub every: Duration,
}

impl std::fmt::Debug for Also {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Also(every {:?})", self.every)
    }
}

/// Drills by schedule.
#[derive(Debug, Clone)]
pub struct Drills {
    pub every: Duration,
    pub directory: PathBuf,
    /// Statements that must say true.
    pub checks: Vec<String>,
}

/// Verifications by schedule.
#[derive(Debug, Clone, Copy)]
pub struct Verifications {
    pub every: Duration,
    /// How much is read each time.
    pub share: Share,
}

/// What happens once too much WAL waits for a repository that cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenBehind {
    /// Commits wait.
    Block,
    /// WAL is given up: a gap, and a new base backup after it.
    Drop,
}

/// What happens at an RPO of zero while the repository cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBucketLoss {
    /// Commits wait until it is there again.
    Block,
    /// After a while they are acknowledged without it, loudly.
    Degrade,
}

/// Decisions are taken anew this many times when another machine was faster.
const DECISIONS_MAX: u32 = 10;

/// How often a waiting machine looks again, at least and at most.
const LOOK_LEAST: Duration = Duration::from_millis(200);
const LOOK_MOST: Duration = Duration::from_secs(2);

/// Where the log of a new generation begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// With what the server writes from now on; a base backup comes next.
    Now,
    /// Where recovery left its ancestor.
    Fork,
    /// Where the log of the same disk's last life ended.
    Continue(Position),
}

/// A directory that is ours to start.
struct Taken {
    writer: Writer,
    start: Start,
}

/// Runs until the server has ended; returns its exit code.
pub async fn run(store: Arc<dyn Store>, options: &Options, clock: &Clock, events: &Events) -> Result<i32> {
    let _lock = restore::lock(&options.data_dir)?;
    // From the first moment on: as process 1 of a container a signal nobody listens to is lost.
    let mut signals = signals::Signals::new()?;
    let taken = tokio::select! {
        taken = take_over(Arc::clone(&store), options, clock, events) => taken?,
        name = signals.stop() => {
            events.emit(Event::Stopping { why: format!("{} received before the server was started", name.to_lowercase()) });
            return Ok(0);
        }
    };
    let Taken { writer, start } = taken;
    let repository = writer.repository(store, clock);
    let pusher = Pusher { repository, writer, data_dir: options.data_dir.clone(), events: events.clone() };
    supervisor::supervise(options, &pusher, start, signals, events).await
}

/// Decides, claims and prepares until the data directory is this machine's to start.
async fn take_over(store: Arc<dyn Store>, options: &Options, clock: &Clock, events: &Events) -> Result<Taken> {
    let began = clock.monotonic();
    let (mut lost, mut told) = (0, None);
    let mut watched = facts::Watched::default();
    while lost < DECISIONS_MAX {
        let (found, facts) = facts::gather(Arc::clone(&store), options, clock, &mut watched).await?;
        if let Some(repository) = &found {
            repository.check_encrypted(&options.recipients)?;
        }
        let decision = boot::decide(&facts);
        if told.as_ref() != Some(&decision) {
            events.emit(Event::Decided { decision: decision.to_string() });
            told = Some(decision.clone());
        }
        let claimant = Claimant { options, clock, events };
        let machine = Machine { store: Arc::clone(&store), options, clock, events, facts: &facts, claimant };
        let taken = match decision {
            Decision::Refuse(refusal) => return Err(refusal.into()),
            Decision::Spare { .. } => {
                clock.sleep(patience_between_looks(options)).await;
                continue;
            }
            Decision::Wait { holder } => {
                if clock.monotonic() - began > options.takeover_after {
                    return Err(boot::gave_up_waiting(&holder).into());
                }
                clock.sleep(LOOK_LEAST * 5).await;
                continue;
            }
            Decision::SetAside { generation, .. } => {
                machine.set_aside(generation)?;
                continue;
            }
            Decision::Init => machine.init().await?,
            Decision::Restore { newest } => machine.restore(found, newest).await?,
            Decision::Resume { newest } => machine.resume(found, newest).await?,
            Decision::Promote { newest, origin } => machine.promote(found, newest, origin).await?,
            Decision::Adopt { newest, parent } => machine.adopt(found, newest, parent).await?,
        };
        match taken {
            Some(taken) => return Ok(taken),
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
    facts: &'a boot::Facts,
    claimant: Claimant<'a>,
}

impl Machine<'_> {
    async fn make_repository(&self) -> Result<(Repository, Created)> {
        let (codec, recipients) = (self.options.codec, &self.options.recipients);
        Repository::make(Arc::clone(&self.store), codec, recipients, self.clock).await
    }

    async fn init(&self) -> Result<Option<Taken>> {
        let (repository, _) = self.make_repository().await?;
        let data_dir = &self.options.data_dir;
        let install = self.install(None)?;
        install.initdb(data_dir, &self.options.initdb_options)?;
        match self.claimant.claim(&repository, None, None).await? {
            Some(writer) => Ok(Some(Taken { writer, start: Start::Now })),
            // Another machine's cluster is the database now; ours holds nothing yet.
            None => {
                restore::discard(data_dir)?;
                Ok(None)
            }
        }
    }

    async fn restore(&self, repository: Option<Repository>, newest: Claim) -> Result<Option<Taken>> {
        let repository = known(repository)?;
        let mut restore = restore::Options {
            data_dir: self.options.data_dir.clone(),
            backup: None,
            target: Target::Newest,
            inclusive: true,
            action: Action::Promote,
            generation: Some(newest.generation),
            timeline: None,
            databases: Vec::new(),
            tablespace_map: std::collections::BTreeMap::new(),
            overwrite: Overwrite::Never,
            keep_archiving: true,
            fetch_command: self.options.fetch_command.clone(),
            writer: None,
            beside: self.options.beside.clone(),
        };
        // Before the claim: a machine that cannot be the database must not take it from one that can.
        self.install(Some(newest.pg_major))?;
        restore::check(&repository, &restore).await?;
        let new = NewWriter {
            writer_id: WriteId(self.clock.random()),
            system_id: newest.system_id,
            pg_major: newest.pg_major,
            segment_size: newest.segment_size,
            host: self.options.host.clone(),
        };
        let Some(claim) = repository.try_claim(Some(newest.generation), Some(newest.generation), &new).await? else {
            return Ok(None);
        };
        self.claimant.tell(&claim);
        self.claimant.seal_older(&repository, claim.generation).await?;
        restore.generation = Some(claim.generation);
        let writer = Writer::new(&repository, claim);
        restore.writer = Some(writer.clone());
        restore::run(&repository, &restore, self.events).await?;
        Ok(Some(Taken { writer, start: Start::Fork }))
    }

    /// Goes on with this machine's own directory, if its WAL continues what is in the repository.
    async fn resume(&self, repository: Option<Repository>, newest: Claim) -> Result<Option<Taken>> {
        let repository = known(repository)?;
        let data_dir = &self.options.data_dir;
        self.install(Some(version_of(data_dir)?.major))?;
        let claimed = self.claimant.claim(&repository, Some(newest.generation), Some(newest.generation)).await?;
        let Some(writer) = claimed else { return Ok(None) };
        let sealed = self.claimant.seal_older(&repository, writer.claim.generation).await?;
        let control = ControlFile::read(data_dir, version_of(data_dir)?)?;
        if standby::has_followed(data_dir, &control)? {
            // A standby whose promotion was cut off behind its claim.
            return self.prepare(&repository, writer, None).await;
        }
        let Some(last) = sealed.into_iter().find(|view| view.end().is_some()) else {
            return Ok(Some(Taken { writer, start: Start::Now }));
        };
        let in_recovery = data_dir.join(RECOVERY_SIGNAL).is_file();
        if in_recovery {
            // It has not written yet: it still follows the repository.
            return Ok(Some(Taken { writer, start: Start::Fork }));
        }
        if let Some(why) = resume::diverges(&repository, &last, data_dir).await? {
            let why = format!("{} does not continue the repository: {why}", data_dir.display());
            return self.diverged(writer.claim.generation, why);
        }
        if let Some(end) = last.end() {
            let lost = restore::beside::lost(&self.options.beside)?;
            restore::beside::put_back_lost(&repository, &lost, writer.claim.generation, end, self.events).await?;
        }
        let start = last.end().map_or(Start::Now, Start::Continue);
        Ok(Some(Taken { writer, start }))
    }

    /// Brings a standby to the end of the history, which it has followed so far.
    async fn promote(
        &self,
        repository: Option<Repository>,
        newest: Claim,
        origin: Generation,
    ) -> Result<Option<Taken>> {
        let repository = known(repository)?;
        self.install(Some(version_of(&self.options.data_dir)?.major))?;
        let claimed = self.claimant.claim(&repository, Some(newest.generation), Some(newest.generation)).await?;
        let Some(writer) = claimed else { return Ok(None) };
        self.claimant.seal_older(&repository, writer.claim.generation).await?;
        self.prepare(&repository, writer, Some(origin)).await
    }

    async fn prepare(
        &self,
        repository: &Repository,
        writer: Writer,
        origin: Option<Generation>,
    ) -> Result<Option<Taken>> {
        let promotion = standby::Promotion {
            data_dir: &self.options.data_dir,
            generation: writer.claim.generation,
            origin,
            fetch_command: &self.options.fetch_command,
            beside: &self.options.beside,
        };
        match promotion.prepare(repository, self.events).await? {
            None => Ok(Some(Taken { writer, start: Start::Fork })),
            Some(why) => {
                let why = format!("{} is a standby that cannot go on: {why}", self.options.data_dir.display());
                self.diverged(writer.claim.generation, why)
            }
        }
    }

    /// What was found out only once the logs were sealed: refused, or set aside if that was asked for.
    fn diverged(&self, generation: Generation, why: String) -> Result<Option<Taken>> {
        match boot::diverged(self.facts, generation, Kind::Refused, why) {
            Decision::Refuse(refusal) => Err(refusal.into()),
            _ => self.set_aside(generation).map(|()| None),
        }
    }

    async fn adopt(
        &self,
        repository: Option<Repository>,
        newest: Option<Claim>,
        parent: Option<Generation>,
    ) -> Result<Option<Taken>> {
        let repository = match repository {
            Some(repository) => repository,
            None => self.make_repository().await?.0,
        };
        self.install(Some(version_of(&self.options.data_dir)?.major))?;
        let newest = newest.map(|claim| claim.generation);
        let Some(writer) = self.claimant.claim(&repository, newest, parent).await? else { return Ok(None) };
        self.claimant.seal_older(&repository, writer.claim.generation).await?;
        Ok(Some(Taken { writer, start: Start::Now }))
    }

    /// Moves the directory away, under a name that says what it was.
    fn set_aside(&self, generation: Generation) -> Result<()> {
        let data_dir = &self.options.data_dir;
        let mut name = data_dir.file_name().unwrap_or_default().to_os_string();
        let stamp = self.clock.now().unix_micros() / 1_000_000;
        name.push(format!(".diverged-{generation}-{stamp}"));
        let aside = data_dir.with_file_name(name);
        disk::durable_rename(data_dir, &aside)
            .map_err(|e| e.hint("a mount point cannot be renamed: move what is in it yourself"))?;
        self.events.warning(format!("{} is now {}", data_dir.display(), aside.display()));
        disk::create_dir(data_dir, 0o700)
    }

    fn install(&self, major: Option<u32>) -> Result<Install> {
        Install::find(self.options.pg_bindir.as_deref(), self.options.search_path.as_deref(), major)
    }
}

/// How long a spare waits before it looks again.
fn patience_between_looks(options: &Options) -> Duration {
    (options.takeover_after / 10).clamp(LOOK_LEAST, LOOK_MOST)
}

fn known(repository: Option<Repository>) -> Result<Repository> {
    repository.ok_or_else(|| Error::internal("a decision to restore without a repository"))
}
