//! The command line, defined once: parser, help, man pages, completions and reference come from here.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::model::{BackupId, Beside, ByteSize, Generation, Lsn, Share, Timeline, Timestamp, parse_duration};
use crate::repository::Recipient;
use crate::storage::Location;

/// PostgreSQL on machines that can vanish: backup, WAL archive, restore and supervision on an object store.
#[derive(Debug, Parser)]
#[command(name = "perennial", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Global {
    /// Address of the repository: s3://bucket/prefix, gs://…, az://… or file:///directory
    #[arg(long, global = true, value_name = "URL", env = "PERENNIAL_REPO", hide_env_values = true)]
    pub repo: Option<String>,
    /// Configuration file (TOML) [default: /etc/perennial.toml if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "PERENNIAL_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// File with the age identity that opens an encrypted repository; PERENNIAL_IDENTITY may hold the identity itself, and
    /// PERENNIAL_IDENTITY_COMMAND a command for /bin/sh that prints it
    #[arg(long, global = true, value_name = "FILE", env = "PERENNIAL_IDENTITY_FILE", hide_env_values = true)]
    pub identity: Option<PathBuf>,
    /// Have the store keep what is written for so long (S3 Object Lock, which the bucket must have)
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_S3_LOCK", hide_env_values = true)]
    pub lock: Option<std::time::Duration>,
    /// Print results as JSON (docs/reference/json.md)
    #[arg(long, global = true)]
    pub json: bool,
    /// Tell details too
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Tell only warnings and alarms
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a repository in an empty place, after checking that the store keeps its promises
    Init(Init),
    /// Bring the database back (or make it), start it, and keep the repository current
    Run(Run),
    /// Keep the repository current for a server that something else runs
    Agent(Agent),
    /// Take a base backup of a running server, a primary or a standby
    Backup(Backup),
    /// Restore into a new directory: the newest state, or a point in the past
    Restore(Restore),
    /// Commands for archive_command and restore_command
    #[command(subcommand)]
    Wal(Wal),
    /// Show backups, generations and what can be restored to
    List,
    /// Show how old the newest durable WAL is
    Status(Status),
    /// Check that everything a restore could need is there and sound
    Verify(Verify),
    /// Delete old backups, and WAL nobody needs
    Prune(Prune),
    /// Prove that the newest state can be restored: in a sandbox, with PostgreSQL's own checks
    Drill(Drill),
    /// Keep a backup whatever the rules of `prune` say
    Pin(Pin),
    /// Let the rules of `prune` decide on a backup again
    Unpin(Unpin),
    /// Copy the repository to a second place, or what is new of it since the last copy
    Copy(Copy),
    /// Restore into a repository of its own: a second database that goes its own way from there
    Clone(Clone),
    /// The key of an encrypted repository
    #[command(subcommand)]
    Key(Key),
    /// Watch a database survive its machine, in a temporary directory
    Demo(Demo),
    /// Print a shell's completions
    #[command(hide = true)]
    Completions { shell: clap_complete::Shell },
    /// Write man pages into a directory
    #[command(hide = true)]
    Man { directory: PathBuf },
}

#[derive(Debug, ClapArgs)]
pub struct Init {
    /// Address of the repository; the same as --repo
    pub url: Option<String>,
    #[command(flatten)]
    pub codec: CodecArgs,
}

/// What becomes of everything written to a new repository.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct CodecArgs {
    /// Encrypt it, with a key that the named recipients can unwrap, or else whoever has the identity
    #[arg(long)]
    pub encrypt: bool,
    /// An age recipient (age1…) who can open the new repository; may be given several times
    #[arg(long, value_name = "RECIPIENT")]
    pub recipient: Vec<Recipient>,
    /// zstd level (1 to 19) [default: 3]
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<i32>,
}

/// How a server's history is kept, whoever runs the server.
#[derive(Debug, ClapArgs)]
pub struct Keep {
    /// Address of the repository; the same as --repo. Without any, EC2's instance metadata is asked
    pub url: Option<String>,
    /// Data directory
    #[arg(short = 'D', long = "pgdata", value_name = "DIR", env = "PGDATA", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Go on from a directory that was restored by hand or never supervised
    #[arg(long)]
    pub adopt: bool,
    /// What may be lost when the machine vanishes: the greatest age of WAL that is not in the repository. At 0 a commit is
    /// acknowledged only once it is there [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_RPO", hide_env_values = true)]
    pub rpo: Option<Duration>,
    /// How long another machine must be silent before this one takes over (and how long to wait for its first backup)
    /// [default: 60s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_TAKEOVER_AFTER", hide_env_values = true)]
    pub takeover_after: Option<Duration>,
    /// At --rpo 0, how long a commit waits for company while others are on their way [default: 3ms]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_LINGER", hide_env_values = true)]
    pub linger: Option<Duration>,
    /// How many requests with WAL may be on their way at once, 1 to 16 [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16), env = "PERENNIAL_IN_FLIGHT", hide_env_values = true)]
    pub in_flight: Option<u8>,
    /// How often an idle writer shows that it lives; 0 for never [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_HEARTBEAT", hide_env_values = true)]
    pub heartbeat: Option<Duration>,
    /// How much WAL may wait on the local disk for a repository that cannot be reached [default: no bound]
    #[arg(long, value_name = "SIZE", env = "PERENNIAL_MAX_WAL_BEHIND", hide_env_values = true)]
    pub max_wal_behind: Option<ByteSize>,
    /// At --rpo 0, what happens once a commit has waited too long for a repository that cannot be reached [default: block]
    #[arg(long, value_enum, env = "PERENNIAL_ON_BUCKET_LOSS", hide_env_values = true)]
    pub on_bucket_loss: Option<OnBucketLossArg>,
    /// How long is too long [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_BUCKET_LOSS_AFTER", hide_env_values = true)]
    pub bucket_loss_after: Option<Duration>,
    /// How long a stop may take before the server is stopped at once and what is left is given up [default: 25s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_GRACE", hide_env_values = true)]
    pub grace: Option<Duration>,
    /// Tell readiness (/ready), status (/status) and metrics (/metrics) on this address and port
    #[arg(long, value_name = "ADDRESS:PORT", env = "PERENNIAL_HTTP", hide_env_values = true)]
    pub http: Option<String>,
    /// Heed the notices of this platform that the machine will go away (spot interruption, auto scaling): stop in time
    #[arg(long, value_enum, value_name = "PLATFORM", env = "PERENNIAL_NOTICES", hide_env_values = true)]
    pub notices: Option<Platform>,
    /// How often to take a base backup
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_BACKUP_EVERY", hide_env_values = true)]
    pub backup_every: Option<Duration>,
    /// How old the last full backup may be before the next one stores everything anew instead of building on the last one; 0
    /// for never [default: 0]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_FULL_EVERY", hide_env_values = true)]
    pub full_every: Option<Duration>,
    /// How many bytes a second a base backup reads at most: 50MB; what it sends is less of it [default: no bound]
    #[arg(long, value_name = "SIZE", env = "PERENNIAL_MAX_RATE", hide_env_values = true)]
    pub max_rate: Option<ByteSize>,
    /// Keep a second repository current: a copy in another region, another cloud, on a disk (see `perennial copy`)
    #[arg(long, value_name = "URL", env = "PERENNIAL_ALSO_TO", hide_env_values = true)]
    pub also_to: Option<Location>,
    /// How long after a copy the next one begins [default: 5m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_ALSO_EVERY", hide_env_values = true)]
    pub also_every: Option<Duration>,
    /// How often to prove with a drill that the newest state can be restored; 0 for never [default: 0]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_DRILL_EVERY", hide_env_values = true)]
    pub drill_every: Option<Duration>,
    /// Directory for drills, on a disk with room for the whole database
    #[arg(long, value_name = "DIR", env = "PERENNIAL_DRILL_IN", hide_env_values = true)]
    pub drill_in: Option<PathBuf>,
    /// A statement that must say true in the restored database; may be given several times
    #[arg(long, value_name = "SQL")]
    pub drill_check: Vec<String>,
    /// How often to verify the repository: that everything is there, and of a share of it that it is sound; 0 for never
    /// [default: 0]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_VERIFY_EVERY", hide_env_values = true)]
    pub verify_every: Option<Duration>,
    /// How much is read each time, another part than the last times [default: 5%]
    #[arg(long, value_name = "PERCENT", env = "PERENNIAL_VERIFY_SAMPLE", hide_env_values = true)]
    pub verify_sample: Option<Share>,
    /// A directory to keep beside the database (an application's index, its uploads): a snapshot goes with each backup and
    /// each clean stop, and is put back when the database is restored; may be given several times
    #[arg(long = "with", value_name = "NAME=DIR")]
    pub beside: Vec<Beside>,
    /// What is kept of old backups; without any rule nothing is ever deleted
    #[command(flatten)]
    pub retention: Retention,
}

#[derive(Debug, ClapArgs)]
pub struct Run {
    #[command(flatten)]
    pub keep: Keep,
    /// Make a new cluster if the repository is proven new; restore otherwise
    #[arg(long)]
    pub init: bool,
    /// Set a directory aside that has WAL the repository does not continue, and restore the newest state
    #[arg(long)]
    pub discard_diverged: bool,
    /// What happens past --max-wal-behind [default: block]
    #[arg(long, value_enum, env = "PERENNIAL_WHEN_BEHIND", hide_env_values = true)]
    pub when_behind: Option<WhenBehindArg>,
    /// Directory of PostgreSQL's programs [default: found by the data directory's major version]
    #[arg(long, value_name = "DIR", env = "PERENNIAL_PG_BINDIR", hide_env_values = true)]
    pub pg_bindir: Option<PathBuf>,
    /// Options for initdb, with --init
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub initdb_option: Vec<String>,
    #[command(flatten)]
    pub codec: CodecArgs,
    /// Options for postgres
    #[arg(last = true, value_name = "POSTGRES OPTIONS")]
    pub postgres_options: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Agent {
    #[command(flatten)]
    pub keep: Keep,
    /// Command for /bin/sh, run once another machine has taken over (PGDATA and PERENNIAL_FENCED, the reason, are set);
    /// without one the server is left running, and nothing of it is archived any more
    #[arg(long, value_name = "COMMAND", env = "PERENNIAL_ON_FENCED", hide_env_values = true)]
    pub on_fenced: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBucketLossArg {
    /// Commits wait until the repository is there again
    Block,
    /// Commits are acknowledged without it, loudly, until it has everything again
    Degrade,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBehindArg {
    /// Commits wait until the repository is there again
    Block,
    /// WAL is given up: a gap that no restore crosses, and a new base backup at once
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Platform {
    /// Amazon EC2, by its instance metadata service (IMDSv2)
    Ec2,
}

#[derive(Debug, ClapArgs)]
pub struct Backup {
    /// Data directory of the running server; the connection comes from PGHOST, PGPORT, PGUSER … or is found there
    #[arg(short = 'D', long = "pgdata", value_name = "DIR", env = "PGDATA", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Store everything anew, instead of only what has changed since the last backup
    #[arg(long)]
    pub full: bool,
    /// Take a snapshot of a directory beside the database too; may be given several times
    #[arg(long = "with", value_name = "NAME=DIR")]
    pub beside: Vec<Beside>,
    /// Spread the first checkpoint instead of hurrying it
    #[arg(long)]
    pub spread_checkpoint: bool,
    /// How many bytes a second to read at most: 50MB; what is sent is less of it [default: no bound]
    #[arg(long, value_name = "SIZE", env = "PERENNIAL_MAX_RATE", hide_env_values = true)]
    pub max_rate: Option<ByteSize>,
    /// Fail when a page's checksum does not hold, or it has changed without saying so, instead of reporting it
    #[arg(long)]
    pub fail_on_damage: bool,
    /// How long to wait for the backup's WAL to reach the repository
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "1h")]
    pub wal_timeout: Duration,
}

#[derive(Debug, ClapArgs)]
pub struct Restore {
    /// New or empty directory to restore into
    #[arg(short = 'D', long = "pgdata", value_name = "DIR", env = "PGDATA", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Start from this backup [default: the newest that leads to the target]
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
    /// Make a standby: it follows the repository until `perennial run` makes it the database
    #[arg(long, conflicts_with_all = ["to_time", "to_lsn", "to_xid", "to_name", "immediate", "before_gap", "exclusive", "action", "generation", "timeline", "keep_archiving", "database"])]
    pub standby: bool,
    #[command(flatten)]
    pub target: TargetArgs,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    pub exclusive: bool,
    /// What the server does once it has reached the target
    #[arg(long, value_enum, default_value_t = ActionArg::Promote)]
    pub action: ActionArg,
    /// Newest generation of the history to follow [default: the repository's newest]
    #[arg(long, value_name = "N")]
    pub generation: Option<Generation>,
    /// Timeline to follow [default: the history's newest]
    #[arg(long, value_name = "N")]
    pub timeline: Option<Timeline>,
    /// Restore this database only, by name (or oid), with those of the system (postgres, template0, template1); may be given
    /// several times. Of the others nothing is fetched: they can be dropped, and not be read
    #[arg(long, value_name = "NAME", conflicts_with = "keep_archiving")]
    pub database: Vec<String>,
    /// Put a tablespace, named by its oid or former location, into another directory
    #[arg(long, value_name = "OID|DIR=DIR")]
    pub tablespace: Vec<String>,
    /// Put back a directory beside the database, from the newest snapshot that is not ahead of the target; may be given
    /// several times
    #[arg(long = "with", value_name = "NAME=DIR")]
    pub beside: Vec<Beside>,
    /// Delete what is in the directory (and in those of tablespaces)
    #[arg(long)]
    pub force: bool,
    /// Fetch only what differs in a directory that has a copy of this cluster in it; what is not of the backup goes
    #[arg(long, conflicts_with = "force")]
    pub delta: bool,
    /// Leave archive_mode as it was; the copy then takes over the repository when it is started
    #[arg(long)]
    pub keep_archiving: bool,
    /// Say what would be restored, and write nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Default, ClapArgs)]
#[group(multiple = false)]
pub struct TargetArgs {
    /// Stop at a time, zone included: '2026-11-22 18:30:00+00'
    #[arg(long, value_name = "TIME")]
    pub to_time: Option<Timestamp>,
    /// Stop at a position in WAL: A/4000028
    #[arg(long, value_name = "LSN")]
    pub to_lsn: Option<Lsn>,
    /// Stop at the end of a transaction
    #[arg(long, value_name = "XID")]
    pub to_xid: Option<u32>,
    /// Stop at a restore point made with pg_create_restore_point
    #[arg(long, value_name = "NAME")]
    pub to_name: Option<String>,
    /// Stop as soon as the backup is consistent
    #[arg(long)]
    pub immediate: bool,
    /// Go to the end of the WAL before a gap
    #[arg(long)]
    pub before_gap: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActionArg {
    Pause,
    Promote,
    Shutdown,
}

#[derive(Debug, Subcommand)]
pub enum Wal {
    /// Store one WAL file: archive_command = 'perennial wal push "%p"'
    Push(WalPush),
    /// Fetch one WAL file: restore_command = 'perennial wal fetch "%f" "%p"'
    Fetch(WalFetch),
    /// The process that fetches ahead for a recovering server; started by `wal fetch`
    #[command(hide = true)]
    Helper(WalHelper),
}

#[derive(Debug, ClapArgs)]
pub struct WalPush {
    /// Path of the file, %p of archive_command
    pub path: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub struct WalFetch {
    /// Name of the file, %f of restore_command
    pub name: String,
    /// Where to put it, %p of restore_command
    pub path: PathBuf,
    #[command(flatten)]
    pub history: HistoryArgs,
    /// Fetch only this file, nothing ahead
    #[arg(long)]
    pub no_prefetch: bool,
    /// Refuse WAL in which a tablespace is made: replaying it would go to a directory outside the sandbox of a drill
    #[arg(long, hide = true)]
    pub no_new_tablespaces: bool,
}

#[derive(Debug, Clone, Copy, ClapArgs)]
pub struct HistoryArgs {
    /// Newest generation of the history [default: the repository's newest]
    #[arg(long, value_name = "N")]
    pub generation: Option<Generation>,
    /// Oldest generation that can have anything needed
    #[arg(long, value_name = "N")]
    pub oldest: Option<Generation>,
    /// Timeline to follow [default: the history's newest]
    #[arg(long, value_name = "N")]
    pub timeline: Option<Timeline>,
    /// Take this position for the end of the history
    #[arg(long, value_name = "LSN")]
    pub through: Option<Lsn>,
    /// Serve a standby: follow the newest history as it grows, and wait for what is not there yet
    #[arg(long, conflicts_with_all = ["generation", "timeline", "through"])]
    pub follow: bool,
}

#[derive(Debug, ClapArgs)]
pub struct WalHelper {
    #[arg(long)]
    pub postmaster: i32,
    #[command(flatten)]
    pub history: HistoryArgs,
}

#[derive(Debug, ClapArgs)]
pub struct Status {
    /// Data directory: show what waits there too
    #[arg(short = 'D', long = "pgdata", value_name = "DIR", env = "PGDATA", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct Verify {
    /// Read all of it: every frame's hash, every record of WAL [default: presence and sizes; manifests are read]
    #[arg(long)]
    pub full: bool,
    /// Read a share of it, such as 5%: another part each day (UTC), so that in 20 days all of it is read
    #[arg(long, value_name = "PERCENT", conflicts_with = "full")]
    pub sample: Option<Share>,
}

/// What is kept; the rules add up. Backups that no rule names are deleted.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Retention {
    /// Keep the last N backups
    #[arg(long, value_name = "N", env = "PERENNIAL_KEEP_LAST", hide_env_values = true)]
    pub keep_last: Option<u32>,
    /// Keep the backups of this time
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_KEEP_WITHIN", hide_env_values = true)]
    pub keep_within: Option<Duration>,
    /// Keep the last backup of each of N days (UTC)
    #[arg(long, value_name = "N", env = "PERENNIAL_KEEP_DAILY", hide_env_values = true)]
    pub keep_daily: Option<u32>,
    /// Keep the last backup of each of N weeks
    #[arg(long, value_name = "N", env = "PERENNIAL_KEEP_WEEKLY", hide_env_values = true)]
    pub keep_weekly: Option<u32>,
    /// Keep the last backup of each of N months
    #[arg(long, value_name = "N", env = "PERENNIAL_KEEP_MONTHLY", hide_env_values = true)]
    pub keep_monthly: Option<u32>,
    /// Keep the last backup of each of N years
    #[arg(long, value_name = "N", env = "PERENNIAL_KEEP_YEARLY", hide_env_values = true)]
    pub keep_yearly: Option<u32>,
    /// Keep every point of this time reachable, and of older WAL only what kept backups need for themselves [default: all
    /// WAL since the oldest backup that is kept]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_KEEP_POINTS", hide_env_values = true)]
    pub keep_points: Option<Duration>,
    /// How long what was deleted stays in the store, for whoever is reading it [default: 1d]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "PERENNIAL_PRUNE_GRACE", hide_env_values = true)]
    pub prune_grace: Option<Duration>,
}

#[derive(Debug, ClapArgs)]
pub struct Prune {
    #[command(flatten)]
    pub retention: Retention,
    /// Show what would go, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Drill {
    /// Directory on a disk with room for the whole database; the sandbox is made in it and removed afterwards [default: the
    /// directory for temporary files]
    #[arg(long = "in", value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// Restore a time of the past instead of the newest state
    #[arg(long, value_name = "TIME")]
    pub to_time: Option<Timestamp>,
    /// A statement that must say true in the restored database; may be given several times
    #[arg(long, value_name = "SQL")]
    pub check: Vec<String>,
    /// The database for --check [default: postgres]
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// Do not look at every table and index with amcheck
    #[arg(long)]
    pub no_amcheck: bool,
    /// Load the libraries that the cluster preloads (shared_preload_libraries); without this their workers do not run
    #[arg(long)]
    pub preload: bool,
    /// Leave the sandbox there
    #[arg(long)]
    pub keep: bool,
    /// Directory of PostgreSQL's programs [default: found by the backup's major version]
    #[arg(long, value_name = "DIR", env = "PERENNIAL_PG_BINDIR", hide_env_values = true)]
    pub pg_bindir: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct Pin {
    /// The backup, as `perennial list` names it
    pub backup: BackupId,
    /// Why, for people
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

#[derive(Debug, ClapArgs)]
pub struct Unpin {
    /// The backup
    pub backup: BackupId,
}

#[derive(Debug, ClapArgs)]
pub struct Copy {
    /// Address of the second place: empty, or an earlier copy. Settings of its store that differ are named PERENNIAL_TO_…, such as
    /// PERENNIAL_TO_AWS_ENDPOINT_URL
    #[arg(long, value_name = "URL")]
    pub to: Location,
    /// Copy this backup alone, with the WAL that it needs itself: it can be restored to its own end there. An encrypted
    /// repository must be opened for that
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
}

#[derive(Debug, ClapArgs)]
pub struct Clone {
    /// Address of the clone's repository: an empty place. Settings of its store that differ are named PERENNIAL_TO_…
    #[arg(long, value_name = "URL")]
    pub to: Location,
    #[command(flatten)]
    pub codec: CodecArgs,
    #[command(flatten)]
    pub restore: Restore,
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// Wrap the key for other recipients; nothing is encrypted anew
    Rotate(KeyRotate),
    /// Print the key itself, to be kept in a safe: whoever has it can read everything
    Export,
}

#[derive(Debug, ClapArgs)]
pub struct KeyRotate {
    /// An age recipient (age1…) who can open the repository from now on; may be given several times
    #[arg(long, value_name = "RECIPIENT", required = true)]
    pub recipient: Vec<Recipient>,
    /// File with the exported key, when no identity opens the repository any more
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct Demo {
    /// Directory of PostgreSQL's programs [default: the newest installed]
    #[arg(long, value_name = "DIR", env = "PERENNIAL_PG_BINDIR", hide_env_values = true)]
    pub pg_bindir: Option<PathBuf>,
    /// Keep the temporary directory, to look at the repository
    #[arg(long)]
    pub keep: bool,
}
