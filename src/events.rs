//! What happens, as typed events: the library emits them, `cli` turns them into log lines and progress.
//!
//! An event is a fact worth a person's attention. Its text is written here once, so that a log, a metric and a notice
//! can never tell three stories.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{BackupId, Generation, Lsn, Timeline, human_bytes};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Worth knowing when looking for the cause of something.
    Detail,
    /// The ordinary course of things.
    Info,
    /// Something needs looking at; the promise still holds.
    Warning,
    /// A promise is broken or in danger now.
    Alarm,
}

#[derive(Debug, Clone)]
pub enum Event {
    /// A request to the store failed and is made again.
    StoreRetry {
        request: String,
        attempt: u32,
        wait: Duration,
        error: String,
    },
    BackupStarted {
        id: BackupId,
        start: Lsn,
        files: u64,
        bytes: u64,
    },
    /// Bytes read so far of the bytes planned.
    BackupProgress {
        done: u64,
        total: u64,
    },
    BackupWaitsForWal {
        through: Lsn,
        missing: u64,
    },
    BackupDone {
        id: BackupId,
        read: u64,
        /// Bytes that WAL summaries made it unnecessary to read.
        unread: u64,
        stored: u64,
        elapsed: Duration,
    },
    /// A restore was tried in a sandbox, and all is well.
    DrillDone {
        backup: String,
        elapsed: Duration,
    },
    DrillFailed {
        backup: String,
        problem: String,
        cure: String,
    },
    /// A part of the repository was read by schedule, and all is well.
    VerifyDone {
        part: u32,
        parts: u32,
        bytes: u64,
        elapsed: Duration,
    },
    /// A verification by schedule found damage: the first of it, and how much more.
    VerifyFailed {
        problem: String,
        consequence: String,
        cure: String,
        more: u64,
    },
    /// A backup was deleted; its objects go after the grace period.
    BackupDeleted {
        id: BackupId,
        grace: Duration,
    },
    Pruned {
        backups: u64,
        objects: u64,
        bytes: u64,
    },
    /// The store did not let objects go that nobody needs.
    DeletesRefused {
        objects: u64,
        bytes: u64,
        why: String,
    },
    BackupFailed {
        error: String,
        next_try: Duration,
    },
    PageDamaged {
        file: String,
        block: u32,
    },
    PagesDamaged {
        files: u64,
        pages: u64,
    },
    /// Blocks of a relation are not what they were at the last backup, and no page of them says that it was changed since.
    ChangedBehindWal {
        file: String,
        first_block: u32,
        last_block: u32,
    },
    StretchesBehindWal {
        stretches: u64,
        last_backup: BackupId,
    },
    SegmentPushed {
        name: String,
        stored: u64,
    },
    GenerationClaimed {
        generation: Generation,
        parent: Option<Generation>,
    },
    RestorePlanned {
        backup: BackupId,
        files: u64,
        bytes: u64,
        target: String,
    },
    RestoreProgress {
        done: u64,
        total: u64,
    },
    RestoreDone {
        backup: BackupId,
        bytes: u64,
        elapsed: Duration,
    },
    /// The boot decision, in words.
    Decided {
        decision: String,
    },
    ServerStarting {
        command: String,
    },
    RecoveryDone {
        timeline: Timeline,
        elapsed: Duration,
    },
    Ready {
        port: u16,
        generation: Generation,
    },
    Stopping {
        why: String,
    },
    ServerStopped {
        status: String,
    },
    /// WAL that could not be brought in before the process had to end.
    WalLeftBehind {
        durable: Lsn,
        error: String,
    },
    /// WAL waits longer than the RPO allows.
    LogLags {
        behind: Duration,
        durable: Lsn,
    },
    /// WAL was given up before it reached the repository.
    WalGap {
        durable: Lsn,
        why: String,
    },
    /// Commits are made to wait, or not any more, because too much WAL waits for the repository.
    HeldBack {
        behind: u64,
        held: bool,
    },
    /// At an RPO of zero: commits do not wait for the repository any more, or do again.
    Degraded {
        waited: Duration,
        degraded: bool,
    },
    /// A line of the server's own log.
    ServerSays {
        line: String,
    },
    /// A session that waited for its commit to become durable was cancelled, and was told that it has committed.
    WaitCancelled,
    /// The platform says that this machine will go away or should be left.
    Notice {
        what: String,
        leaves: bool,
    },
    /// Another machine has taken over.
    Fenced {
        local: Lsn,
        durable: Lsn,
    },
    Note {
        level: Level,
        text: String,
    },
}

impl Event {
    pub fn level(&self) -> Level {
        use Event::*;
        match self {
            BackupProgress { .. } | RestoreProgress { .. } | SegmentPushed { .. } => Level::Detail,
            StoreRetry { attempt, .. } if *attempt < 3 => Level::Detail,
            StoreRetry { .. } | BackupFailed { .. } | DeletesRefused { .. } | Notice { .. } => Level::Warning,
            PageDamaged { .. }
            | PagesDamaged { .. }
            | ChangedBehindWal { .. }
            | StretchesBehindWal { .. }
            | WalLeftBehind { .. }
            | LogLags { .. }
            | WaitCancelled
            | WalGap { .. }
            | HeldBack { held: true, .. }
            | Degraded { degraded: true, .. }
            | DrillFailed { .. }
            | VerifyFailed { .. }
            | Fenced { .. } => Level::Alarm,
            Note { level, .. } => *level,
            _ => Level::Info,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Event::*;
        match self {
            StoreRetry { request, attempt, wait, error } => {
                write!(f, "{request} failed (attempt {attempt}), next try in {:.1} s: {error}", wait.as_secs_f64())
            }
            BackupStarted { id, start, files, bytes } => {
                write!(f, "backup {id} started at {start}: {files} files, {}", human_bytes(*bytes))
            }
            BackupProgress { done, total } => {
                write!(f, "backup: {} of {} read", human_bytes(*done), human_bytes(*total))
            }
            BackupWaitsForWal { through, missing } => {
                write!(
                    f,
                    "backup: waiting for WAL through {through} to reach the repository ({missing} segments missing)"
                )
            }
            BackupDone { id, read, unread, stored, elapsed } => {
                let (read, stored) = (human_bytes(*read), human_bytes(*stored));
                let unread = match unread {
                    0 => String::new(),
                    unread => format!(", {} untouched and not read", human_bytes(*unread)),
                };
                let seconds = elapsed.as_secs_f64();
                write!(f, "backup {id} is restorable: {read} read{unread}, {stored} stored, {seconds:.1} s")
            }
            DrillDone { backup, elapsed } => {
                write!(f, "drill: {backup} restores, recovers and is sound ({:.1} s)", elapsed.as_secs_f64())
            }
            DrillFailed { backup, problem, cure } => {
                write!(f, "the drill failed: {backup} cannot be relied on: {problem}; what helps: {cure}")
            }
            VerifyDone { part, parts, bytes, elapsed } => write!(
                f,
                "verified part {} of {parts}: {} read in {:.1} s, all sound",
                part + 1,
                human_bytes(*bytes),
                elapsed.as_secs_f64()
            ),
            VerifyFailed { problem, consequence, cure, more } => {
                write!(f, "the repository is damaged: {problem}; so {consequence}; what helps: {cure}")?;
                if *more > 0 { write!(f, " (and {more} findings more: `perennial verify`)") } else { Ok(()) }
            }
            BackupDeleted { id, grace } => {
                write!(f, "backup {id} deleted; what only it needs goes in {} h", grace.as_secs() / 3600)
            }
            Pruned { backups, objects, bytes } => {
                write!(f, "pruned: {backups} backups deleted, {objects} objects gone ({})", human_bytes(*bytes))
            }
            DeletesRefused { objects, bytes, why } => write!(
                f,
                "the store does not let {objects} objects go ({}), they stay longer than the rules ask; the next prune tries again: {why}",
                human_bytes(*bytes)
            ),
            BackupFailed { error, next_try } => {
                write!(f, "backup failed, next try in {} s: {error}", next_try.as_secs())
            }
            PageDamaged { file, block } => write!(f, "page checksum does not hold: {file}, block {block}"),
            PagesDamaged { files, pages } => write!(
                f,
                "{pages} damaged pages in {files} files were backed up as they are; `pg_amcheck` tells what they hold"
            ),
            ChangedBehindWal { file, first_block, last_block } => write!(
                f,
                "{file}, in blocks {first_block} to {last_block}: other content than in the last backup, though no page says that it was changed since: the disk has lost a write, something wrote past PostgreSQL, or an extension changes pages without WAL"
            ),
            StretchesBehindWal { stretches, last_backup } => write!(
                f,
                "{stretches} stretches of files that have changed behind WAL's back were backed up as they are; backup {last_backup} has them as they were: keep it (`perennial pin {last_backup} --reason …`), restore it elsewhere and compare"
            ),
            SegmentPushed { name, stored } => write!(f, "pushed {name} ({})", human_bytes(*stored)),
            GenerationClaimed { generation, parent: Some(parent) } => {
                write!(f, "claimed generation {generation}, child of generation {parent}")
            }
            GenerationClaimed { generation, parent: None } => write!(f, "claimed generation {generation}"),
            RestorePlanned { backup, files, bytes, target } => {
                write!(f, "restoring backup {backup} to {target}: {files} files, {}", human_bytes(*bytes))
            }
            RestoreProgress { done, total } => {
                write!(f, "restore: {} of {} written", human_bytes(*done), human_bytes(*total))
            }
            RestoreDone { backup, bytes, elapsed } => {
                write!(f, "backup {backup} restored: {} in {:.1} s", human_bytes(*bytes), elapsed.as_secs_f64())
            }
            Decided { decision } => f.write_str(decision),
            ServerStarting { command } => write!(f, "starting {command}"),
            RecoveryDone { timeline, elapsed } => {
                write!(f, "recovery done in {:.1} s, now on timeline {timeline}", elapsed.as_secs_f64())
            }
            Ready { port, generation } => write!(f, "ready: port {port}, generation {generation}"),
            Stopping { why } => write!(f, "stopping: {why}"),
            ServerStopped { status } => write!(f, "PostgreSQL ended: {status}"),
            WalLeftBehind { durable, error } => {
                write!(f, "not all WAL reached the repository, only up to {durable}: {error}")
            }
            LogLags { behind, durable } => {
                write!(f, "WAL has waited for {:.1} s to become durable; it is up to {durable}", behind.as_secs_f64())
            }
            WalGap { durable, why } => write!(
                f,
                "WAL after {durable} was given up before it reached the repository ({why}): points after it cannot be \
                 restored until the base backup that begins now"
            ),
            Degraded { waited, degraded: true } => write!(
                f,
                "the repository has not answered for {:.0} s: commits are acknowledged WITHOUT being in it (--on-bucket-loss degrade)",
                waited.as_secs_f64()
            ),
            Degraded { degraded: false, .. } => {
                write!(f, "the repository has everything again: commits wait for it as before")
            }
            HeldBack { behind, held: true } => {
                write!(f, "{} of WAL wait for the repository: commits wait from now on", human_bytes(*behind))
            }
            HeldBack { behind, held: false } => {
                write!(f, "commits do not wait any more: {} of WAL are left", human_bytes(*behind))
            }
            ServerSays { line } => f.write_str(line),
            WaitCancelled => f.write_str(
                "a client was told that its transaction has committed before that was durable: its wait was cancelled",
            ),
            Notice { what, leaves: true } => write!(f, "the platform takes this machine away: {what}"),
            Notice { what, leaves: false } => write!(f, "the platform advises to leave this machine: {what}"),
            Fenced { local, durable } => write!(
                f,
                "another machine has taken over: WAL of this machine goes to {local}, up to {durable} it is in the \
                 repository for certain; what lies behind may be in this directory only"
            ),
            Note { text, .. } => f.write_str(text),
        }
    }
}

/// Where events go; clones share it.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(&Event) + Send + Sync>);

impl Events {
    pub fn new(sink: impl Fn(&Event) + Send + Sync + 'static) -> Events {
        Events(Arc::new(sink))
    }

    pub fn silent() -> Events {
        Events::new(|_| ())
    }

    pub fn emit(&self, event: Event) {
        (self.0)(&event);
    }

    pub fn info(&self, text: impl Into<String>) {
        self.emit(Event::Note { level: Level::Info, text: text.into() });
    }

    pub fn alarm(&self, text: impl Into<String>) {
        self.emit(Event::Note { level: Level::Alarm, text: text.into() });
    }

    pub fn warning(&self, text: impl Into<String>) {
        self.emit(Event::Note { level: Level::Warning, text: text.into() });
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}
