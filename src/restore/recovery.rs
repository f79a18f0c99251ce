//! What makes PostgreSQL recover from a restored directory: labels, signal file and recovery settings (manual section
//! 20.5.5). The same since version 12, so for every supported major.

use std::path::Path;

use super::Options;
use super::layout::Tablespaces;
use super::plan::Choice;
use super::target::{Action, Target};
use crate::disk;
use crate::error::Result;
use crate::model::{Generation, Timeline};
use crate::postgres::conf;
use crate::postgres::replication::SLOT;
use crate::postgres::summaries;
use crate::repository::manifest::BackupHead;

/// Settings of `postgresql.auto.conf`; `None` takes a former one away.
pub type RecoverySettings = Vec<(&'static str, Option<String>)>;

/// How soon a standby asks again at the earliest. `wal fetch --follow` answers when there is something new, or later than
/// this: so the server says in its log only now and again that it waits (`WaitForWALToBecomeAvailable`).
const RETRY: &str = "500ms";

/// One of these at most may be set (`recovery_target` and its like).
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_time", "recovery_target_lsn", "recovery_target_xid", "recovery_target_name"];

pub fn settings(choice: &Choice, options: &Options) -> RecoverySettings {
    let target = match &choice.located.target {
        Target::Newest | Target::BeforeGap => None,
        Target::Immediate => Some(("recovery_target", "immediate".to_owned())),
        Target::Time(at) => Some(("recovery_target_time", at.for_postgres())),
        Target::Lsn(at) => Some(("recovery_target_lsn", at.to_string())),
        Target::Xid(at) => Some(("recovery_target_xid", at.to_string())),
        Target::Name(at) => Some(("recovery_target_name", at.clone())),
    };
    let follows = options.action == Action::Follow;
    let command = if follows { follow_command(choice, options) } else { fetch_command(choice, options) };
    let mut settings: RecoverySettings = targets(target);
    let inclusive = matches!(choice.located.target, Target::Time(_) | Target::Lsn(_) | Target::Xid(_));
    settings.extend([
        ("restore_command", Some(command)),
        ("recovery_target_inclusive", inclusive.then(|| choice.located.inclusive.to_string())),
        ("recovery_target_timeline", Some(if follows { "latest".to_owned() } else { choice.timeline.to_string() })),
        ("recovery_target_action", options.action.setting().map(str::to_owned)),
        // What postgresql.conf has of a life as a standby: a copy must not clean an archive, tell a load balancer that it is the
        // database, or wait with each commit.
        ("recovery_end_command", Some(String::new())),
        ("archive_cleanup_command", Some(String::new())),
        ("recovery_min_apply_delay", (!follows).then(|| "0".to_owned())),
        // A standby must not stream from where the cluster of the backup did.
        ("primary_conninfo", follows.then(String::new)),
        ("primary_slot_name", follows.then(String::new)),
    ]);
    if follows {
        settings.push(("wal_retrieve_retry_interval", Some(RETRY.to_owned())));
    }
    if choice.backup.tablespaces.iter().any(|tablespace| tablespace.location.is_none()) {
        // Without it recovery ends at a directory where it expects a link.
        settings.push(("allow_in_place_tablespaces", Some("on".to_owned())));
    }
    if !options.keep_archiving {
        // A copy that archives would open a generation and be taken for the database by the next machine.
        settings.push(("archive_mode", Some("off".to_owned())));
    }
    settings
}

/// What turns a standby of ours into the database of a generation: recovery to the end of its history.
pub fn promotion(words: &[String], generation: Generation, oldest: Generation, timeline: Timeline) -> RecoverySettings {
    let mut settings = targets(None);
    let words = with_history(words, generation, oldest, timeline);
    settings.extend([
        ("restore_command", Some(conf::wal_command(&words, &["%f", "%p"]))),
        ("recovery_target_timeline", Some(timeline.to_string())),
        ("recovery_target_action", Action::Promote.setting().map(str::to_owned)),
        ("recovery_target_inclusive", None),
        ("recovery_end_command", None),
        ("recovery_min_apply_delay", Some("0".to_owned())),
        ("primary_conninfo", None),
        ("primary_slot_name", None),
        ("wal_retrieve_retry_interval", None),
        ("archive_mode", None),
    ]);
    settings
}

/// Without a target, all are set to nothing rather than taken away: one that was left in postgresql.conf would count
/// again. With one, PostgreSQL refuses even an empty second, and tells of another itself.
fn targets(target: Option<(&'static str, String)>) -> RecoverySettings {
    let value = |name: &str| match &target {
        Some((of, value)) => (*of == name).then(|| value.clone()),
        None => Some(String::new()),
    };
    TARGETS.map(|name| (name, value(name))).to_vec()
}

/// The command says which history it serves, so that no later generation can slip in.
fn fetch_command(choice: &Choice, options: &Options) -> String {
    let mut words = with_history(&options.fetch_command, choice.generation, choice.oldest, choice.timeline);
    // Recovery reads ahead of its target (`recovery_prefetch`), and must not run into the hole.
    let to_the_hole = choice.gap && choice.located.target == Target::Immediate;
    if choice.located.target == Target::BeforeGap || to_the_hole {
        words.push(format!("--through={}", choice.through));
    }
    conf::wal_command(&words, &["%f", "%p"])
}

fn with_history(words: &[String], generation: Generation, oldest: Generation, timeline: Timeline) -> Vec<String> {
    let history =
        [format!("--generation={generation}"), format!("--oldest={oldest}"), format!("--timeline={timeline}")];
    words.iter().cloned().chain(history).collect()
}

/// Later generations are what a standby is for.
fn follow_command(choice: &Choice, options: &Options) -> String {
    let more = ["--follow".to_owned(), format!("--oldest={}", choice.oldest)];
    let words: Vec<String> = options.fetch_command.iter().cloned().chain(more).collect();
    conf::wal_command(&words, &["%f", "%p"])
}

/// `signal`: the name of the file that makes the server recover.
pub fn write(
    data_dir: &Path,
    backup: &BackupHead,
    tablespaces: &Tablespaces,
    settings: &RecoverySettings,
    signal: &str,
) -> Result<()> {
    disk::durable_write(&data_dir.join("backup_label"), backup.backup_label.as_bytes(), 0o600)?;
    if let Some(map) = tablespaces.map_file() {
        disk::durable_write(&data_dir.join("tablespace_map"), map.as_bytes(), 0o600)?;
    }
    conf::apply(data_dir, settings)?;
    // Left by a supervisor that held commits back: the copy has nobody to wait for.
    conf::forget(data_dir, "synchronous_standby_names", SLOT)?;
    // And one that had WAL summarized: the summarizer must not be in the way of recovery.
    conf::forget(data_dir, summaries::SETTING, summaries::OURS)?;
    disk::durable_write(&data_dir.join(signal), b"", 0o600)
}
