//! Every key of a repository, built and parsed here and nowhere else. Relative to the repository's prefix.

use crate::model::{BackupId, DirectoryName, Generation, PackId, Timeline, Timestamp, WriteId};
use crate::wal::{SegmentName, WalFileName};

use super::vault::KeyId;

pub const DESCRIPTOR: &str = "perennial.json";
pub const PROBES: &str = "perennial.probe";
pub const GENERATIONS: &str = "generations";
pub const PACKS: &str = "packs";
pub const BACKUPS: &str = "backups";
pub const PRUNES: &str = "prunes";
pub const DRILLS: &str = "drills";
pub const VERIFICATIONS: &str = "verifications";
pub const KEYS: &str = "keys";

pub fn generation_dir(generation: Generation) -> String {
    format!("{GENERATIONS}/{}", generation.padded())
}

pub fn claim(generation: Generation) -> String {
    format!("{}/generation.json", generation_dir(generation))
}

/// The wrappings of a key are under this.
pub fn wrapped_keys(id: KeyId) -> String {
    format!("{KEYS}/{id}")
}

pub fn wrapped_key(id: KeyId, number: u32) -> String {
    format!("{}/{number:08}", wrapped_keys(id))
}

/// The number of a wrapping.
pub fn parse_wrapped_key(key: &str) -> Option<u32> {
    let (id, number) = key.strip_prefix(KEYS)?.strip_prefix('/')?.split_once('/')?;
    let (id, number) = (id.parse().ok()?, number.parse().ok()?);
    (wrapped_key(id, number) == key).then_some(number)
}

/// What is never encrypted: it must be read to know how.
pub fn is_in_the_clear(key: &str) -> bool {
    key == DESCRIPTOR || is_below(key, KEYS) || is_below(key, PROBES)
}

fn is_below(key: &str, directory: &str) -> bool {
    key.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// What is of use for a short time only: entries of a log, once segments have taken their place; marks and records. A log's seal
/// is one of its entries, by its key.
pub fn is_passing(key: &str) -> bool {
    let is_record = [PROBES, PRUNES, DRILLS, VERIFICATIONS].into_iter().any(|directory| is_below(key, directory));
    let of_backup = parse_backup(key).is_some_and(|(_, what)| !matches!(what, OfBackup::Manifest | OfBackup::Beside));
    parse_log_entry(key).is_some() || of_backup || is_record
}

/// All WAL of a generation is under this.
pub fn wal_dir(generation: Generation) -> String {
    format!("{}/wal", generation_dir(generation))
}

/// The live log of a generation is under this.
pub fn log_dir(generation: Generation) -> String {
    format!("{}/log", generation_dir(generation))
}

pub fn log_entry(generation: Generation, number: u64) -> String {
    format!("{}/{number:012}", log_dir(generation))
}

/// Collection bounds of a log are under this.
pub fn collected_dir(generation: Generation) -> String {
    format!("{}/collected", generation_dir(generation))
}

pub fn collected(generation: Generation, number: u64) -> String {
    format!("{}/{number:012}", collected_dir(generation))
}

/// The key of an archived file: segments and what belongs to them in a folder per timeline and xlogid.
pub fn wal_file(generation: Generation, name: WalFileName) -> String {
    let wal = wal_dir(generation);
    match name {
        WalFileName::History(_) => format!("{wal}/{name}.zst"),
        WalFileName::Segment(segment) | WalFileName::Partial(segment) | WalFileName::Backup(segment, _) => {
            format!("{wal}/{}/{name}.zst", folder(segment))
        }
    }
}

fn folder(segment: SegmentName) -> String {
    format!("{}/{:08X}", segment.timeline.hex(), segment.log)
}

pub fn manifest(backup: BackupId) -> String {
    format!("{BACKUPS}/{backup}/manifest")
}

/// Says that a backup has begun; what it has uploaded must not be taken for rubbish.
pub fn begun(backup: BackupId) -> String {
    format!("{BACKUPS}/{backup}/begun")
}

/// Says that a backup was deleted: it does not exist any more, and its objects go later.
pub fn tombstone(backup: BackupId) -> String {
    format!("{BACKUPS}/{backup}/deleted")
}

/// Keeps a backup whatever the policy says.
pub fn pin(backup: BackupId, pin: WriteId) -> String {
    format!("{BACKUPS}/{backup}/pins/{pin}")
}

/// A snapshot of a directory beside the database. It hangs on a backup.
pub fn beside(backup: BackupId, name: &DirectoryName, id: WriteId) -> String {
    format!("{BACKUPS}/{backup}/beside/{name}/{id}")
}

/// The snapshot of a key.
pub fn parse_beside(key: &str) -> Option<(BackupId, DirectoryName, WriteId)> {
    let (backup, rest) = key.strip_prefix(BACKUPS)?.strip_prefix('/')?.split_once("/beside/")?;
    let (name, id) = rest.split_once('/')?;
    Some((backup.parse().ok()?, name.parse().ok()?, id.parse().ok()?))
}

pub fn pack(pack: PackId) -> String {
    format!("{PACKS}/{pack}")
}

fn record(directory: &str, at: Timestamp, id: WriteId) -> String {
    format!("{directory}/{:016x}-{id}", at.unix_micros().max(0))
}

/// The record of one prune. Names sort by time.
pub fn prune(at: Timestamp, id: WriteId) -> String {
    record(PRUNES, at, id)
}

/// The record of one drill. Names sort by time.
pub fn drill(at: Timestamp, id: WriteId) -> String {
    record(DRILLS, at, id)
}

/// The record of one verification by schedule. Names sort by time.
pub fn verification(at: Timestamp, id: WriteId) -> String {
    record(VERIFICATIONS, at, id)
}

/// The generation of a `generations/…` directory.
pub fn parse_generation_dir(directory: &str) -> Option<Generation> {
    Generation::from_padded(directory.strip_prefix(GENERATIONS)?.strip_prefix('/')?)
}

/// The entry of a key under [`log_dir`].
pub fn parse_log_entry(key: &str) -> Option<(Generation, u64)> {
    parse_numbered(key, log_entry)
}

/// The bound of a key under [`collected_dir`].
pub fn parse_collected(key: &str) -> Option<(Generation, u64)> {
    parse_numbered(key, collected)
}

/// Only the one spelling that `build` gives.
fn parse_numbered(key: &str, build: impl Fn(Generation, u64) -> String) -> Option<(Generation, u64)> {
    let (generation, rest) = key.strip_prefix(GENERATIONS)?.strip_prefix('/')?.split_once('/')?;
    let generation = Generation::from_padded(generation)?;
    let number = rest.rsplit('/').next()?.parse().ok()?;
    (build(generation, number) == key).then_some((generation, number))
}

/// What an object under `backups/` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfBackup {
    Manifest,
    Begun,
    Tombstone,
    Pin,
    Beside,
}

/// The backup of an object under `backups/`, and what the object is.
pub fn parse_backup(key: &str) -> Option<(BackupId, OfBackup)> {
    let (id, name) = key.strip_prefix(BACKUPS)?.strip_prefix('/')?.split_once('/')?;
    let what = match name {
        "manifest" => OfBackup::Manifest,
        "begun" => OfBackup::Begun,
        "deleted" => OfBackup::Tombstone,
        pin if pin.strip_prefix("pins/").is_some_and(|id| id.parse::<WriteId>().is_ok()) => OfBackup::Pin,
        _ if parse_beside(key).is_some() => OfBackup::Beside,
        _ => return None,
    };
    Some((id.parse().ok()?, what))
}

/// The pack of a key under `packs/`.
pub fn parse_pack(key: &str) -> Option<PackId> {
    key.strip_prefix(PACKS)?.strip_prefix('/')?.parse().ok()
}

/// The archived file of a key under [`wal_dir`].
pub fn parse_wal_file(key: &str) -> Option<(Generation, WalFileName)> {
    let (generation, rest) = key.strip_prefix(GENERATIONS)?.strip_prefix('/')?.split_once('/')?;
    let generation = Generation::from_padded(generation)?;
    let name: WalFileName = rest.rsplit('/').next()?.strip_suffix(".zst")?.parse().ok()?;
    // Only the one spelling: a file in the wrong folder is not found by its key, so it must not be listed either.
    (wal_file(generation, name) == key).then_some((generation, name))
}

/// The timeline of a directory directly under [`wal_dir`].
pub fn parse_timeline_dir(directory: &str) -> Option<Timeline> {
    Timeline::from_hex(directory.rsplit('/').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Lsn;

    #[test]
    fn every_key_reads_back_as_what_it_was_built_from() {
        let generation = Generation(12);
        for name in [
            "000000010000000A000000FE",
            "000000010000000A000000FE.partial",
            "000000010000000A000000FE.00000028.backup",
            "0000000B.history",
        ] {
            let name: WalFileName = name.parse().expect(name);
            assert_eq!(parse_wal_file(&wal_file(generation, name)), Some((generation, name)));
        }
        assert_eq!(parse_generation_dir(&generation_dir(generation)), Some(generation));
        assert_eq!(parse_log_entry(&log_entry(generation, 42)), Some((generation, 42)));
        assert_eq!(parse_collected(&collected(generation, 42)), Some((generation, 42)));
        assert_eq!(parse_log_entry("generations/00000012/log/42"), None);
        let id: KeyId = "0123456789abcdef".parse().expect("an id");
        assert_eq!(parse_wrapped_key(&wrapped_key(id, 7)), Some(7));
        let backup = BackupId { generation, start: Lsn(40), nonce: 7 };
        for (key, what) in [
            (manifest(backup), OfBackup::Manifest),
            (begun(backup), OfBackup::Begun),
            (tombstone(backup), OfBackup::Tombstone),
            (pin(backup, WriteId([7; 16])), OfBackup::Pin),
            (beside(backup, &"index".parse().expect("a name"), WriteId([7; 16])), OfBackup::Beside),
        ] {
            assert_eq!(parse_backup(&key), Some((backup, what)));
        }
        assert_eq!(parse_pack(&pack(PackId([3; 16]))), Some(PackId([3; 16])));
    }

    #[test]
    fn the_keys_are_those_of_the_format() {
        let segment = "000000010000000A000000FE".parse().expect("a name");
        assert_eq!(
            wal_file(Generation(1), segment),
            "generations/00000001/wal/00000001/0000000A/000000010000000A000000FE.zst"
        );
        assert_eq!(
            wal_file(Generation(1), WalFileName::History(Timeline(2))),
            "generations/00000001/wal/00000002.history.zst"
        );
        assert_eq!(claim(Generation(1)), "generations/00000001/generation.json");
    }

    #[test]
    fn foreign_keys_are_not_ours() {
        for key in [
            "generations/1/wal/00000002.history.zst",
            "generations/00000001/wal/00000002.history",
            "generations/00000001/wal/00000002/0000000A/000000010000000A000000FE.zst",
            "generations/00000001/wal/000000010000000A000000FE.zst",
            "generations/00000001/generation.json",
            "backups/x/manifest",
        ] {
            assert_eq!(parse_wal_file(key), None, "{key}");
        }
    }
}
