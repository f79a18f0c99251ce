//! What makes PostgreSQL recover from a restored directory: labels, signal file and recovery settings (manual section
//! 20.5.5). The same since version 12, so for every supported major.

use std::path::Path;

use super::Options;
use super::layout::Tablespaces;
use super::plan::Choice;
use super::target::Target;
use crate::disk;
use crate::error::Result;
use crate::postgres::conf;
use crate::postgres::replication::SLOT;
use crate::postgres::summaries;
use crate::repository::manifest::BackupHead;

/// Settings of `postgresql.auto.conf`; `None` takes a former one away.
pub type RecoverySettings = Vec<(&'static str, Option<String>)>;

pub fn settings(choice: &Choice, options: &Options) -> RecoverySettings {
    let target = &choice.located.target;
    let value = |wanted: bool, value: String| wanted.then_some(value);
    let (mut time, mut lsn, mut xid, mut name, mut immediate) = (None, None, None, None, None);
    match target {
        Target::Newest | Target::BeforeGap => (),
        Target::Immediate => immediate = Some("immediate".to_owned()),
        Target::Time(at) => time = Some(at.for_postgres()),
        Target::Lsn(at) => lsn = Some(at.to_string()),
        Target::Xid(at) => xid = Some(at.to_string()),
        Target::Name(at) => name = Some(at.clone()),
    }
    // Without a target, all are set to nothing rather than taken away: one that was left in postgresql.conf would count
    // again. With one, PostgreSQL refuses even an empty second, and tells of another itself.
    let untargeted = matches!(target, Target::Newest | Target::BeforeGap);
    let or_none = |value: Option<String>| value.or_else(|| untargeted.then(String::new));
    let inclusive = matches!(target, Target::Time(_) | Target::Lsn(_) | Target::Xid(_));
    let mut settings: RecoverySettings = vec![
        ("restore_command", Some(fetch_command(choice, options))),
        ("recovery_target", or_none(immediate)),
        ("recovery_target_time", or_none(time)),
        ("recovery_target_lsn", or_none(lsn)),
        ("recovery_target_xid", or_none(xid)),
        ("recovery_target_name", or_none(name)),
        ("recovery_target_inclusive", value(inclusive, choice.located.inclusive.to_string())),
        ("recovery_target_timeline", Some(choice.timeline.to_string())),
        ("recovery_target_action", Some(options.action.setting().to_owned())),
        ("recovery_end_command", None),
        ("archive_cleanup_command", None),
        ("primary_conninfo", None),
        ("primary_slot_name", None),
    ];
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

/// The command says which history it serves, so that no later generation can slip in.
fn fetch_command(choice: &Choice, options: &Options) -> String {
    let mut words = options.fetch_command.clone();
    words.extend([
        format!("--generation={}", choice.generation),
        format!("--oldest={}", choice.oldest),
        format!("--timeline={}", choice.timeline),
    ]);
    // Recovery reads ahead of its target (`recovery_prefetch`), and must not run into the hole.
    let to_the_hole = choice.gap && choice.located.target == Target::Immediate;
    if choice.located.target == Target::BeforeGap || to_the_hole {
        words.push(format!("--through={}", choice.through));
    }
    conf::wal_command(&words, &["%f", "%p"])
}

pub fn write(
    data_dir: &Path,
    backup: &BackupHead,
    tablespaces: &Tablespaces,
    settings: &RecoverySettings,
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
    disk::durable_write(&data_dir.join("recovery.signal"), b"", 0o600)
}
