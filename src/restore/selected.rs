//! Some databases of a cluster only. The others keep their rows in the catalogs and their files, which are empty: nothing of
//! them is fetched, and recovery runs over them.
//!
//! Recovery reads no page of a relation that it has not been given whole before: the first change of a page after the backup's
//! checkpoint comes with all of it. There is one exception without data checksums (and without `wal_log_hints`): that a page
//! has become visible to all is noted without it (`log_heap_visible`, heapam.c), and recovery refuses to do that to a page of
//! zeros (`XLogReadBufferExtended`, xlogutils.c). So there the files are filled with empty pages instead of holes.
//!
//! What recovery makes of such a database is a mixture. It must not be read, so its `PG_VERSION` is one that no server opens
//! (`ValidatePgVersion`, miscinit.c); `DROP DATABASE` does not look at it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::fetch::Contents;
use super::layout::{inside, set_mode};
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::postgres::data_dir::{Fork, PARTIAL, PARTIAL_HINT, database_of, fork_of};
use crate::postgres::page;
use crate::repository::manifest::{BackupHead, Database, FileEntry};

/// What `initdb` makes has lower numbers (`FirstNormalObjectId`, access/transam.h).
const FIRST_OF_USERS: u32 = 16384;

/// Databases that a server cannot do without, or tools expect, whenever they were made.
const SYSTEM: &[&str] = &["template0", "template1", "postgres"];

/// The `PG_VERSION` of a database that was left out. The server shows it when it refuses a connection; it has no blanks because
/// only the first word is read, and begins with a number because that must be one.
const LEFT_OUT: &str = "0:left_out_by_perennial_restore,DROP_DATABASE_works\n";

/// Empty pages that are written at once.
const FILL: usize = 1 << 20;

/// What is left out of a restore.
#[derive(Debug, Default)]
pub struct Selection {
    pub left_out: Vec<Database>,
    /// Files of relations, and the `PG_VERSION` of each database.
    hollow: Vec<FileEntry>,
    versions: Vec<FileEntry>,
    /// Pages must not be zeros.
    filled: bool,
}

impl Selection {
    /// Takes out of `contents` what is not of the wanted databases (by name or number; none are named: all are wanted), the
    /// system's or the cluster's.
    pub fn of(contents: &mut Contents, wanted: &[String], backup: &BackupHead) -> Result<Selection> {
        let mut selection = Selection { filled: !backup.data_checksums, ..Selection::default() };
        if wanted.is_empty() {
            return Ok(selection);
        }
        let left_out = left_out(contents, wanted, backup)?;
        let is_out = |file: &FileEntry| database_of(&file.path).is_some_and(|oid| left_out.contains_key(&oid));
        let (out, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut contents.files).into_iter().partition(is_out);
        contents.files = rest;
        for file in out {
            match (fork_of(&file.path), file.path.ends_with("/PG_VERSION")) {
                (Some(_), _) => selection.hollow.push(file),
                (None, true) => selection.versions.push(file),
                // Which file a catalog is in: small, and of no relation.
                (None, false) => contents.files.push(file),
            }
        }
        selection.left_out = left_out.into_values().collect();
        Ok(selection)
    }

    pub fn is_partial(&self) -> bool {
        !self.left_out.is_empty()
    }

    /// Makes the files of what is left out; none of them is there. It may take long: pages may have to be written.
    pub fn make(&self, data_dir: &Path) -> Result<()> {
        for entry in &self.hollow {
            let path = inside(data_dir, &entry.path)?;
            let create = OpenOptions::new().write(true).create_new(true).mode(entry.mode).open(&path);
            let file = create.on("create", &path)?;
            if self.filled && fork_of(&entry.path) == Some(Fork::Main) {
                fill(&file, entry.size).on("write", &path)?;
            }
            file.set_len(entry.size).on("set the size of", &path)?;
            set_mode(&path, entry.mode)?;
        }
        for entry in &self.versions {
            disk::durable_write(&inside(data_dir, &entry.path)?, LEFT_OUT.as_bytes(), entry.mode)?;
        }
        Ok(())
    }

    /// Says in the directory what it is not.
    pub fn mark(&self, data_dir: &Path, backup: &BackupHead) -> Result<()> {
        let lines = self.left_out.iter().map(|database| format!("{} {}\n", database.oid, database.name));
        let text = format!(
            "Of backup {} some databases are here only. Left out, empty and closed are:\n\n{}\n{PARTIAL_HINT}.\n",
            backup.backup_id,
            lines.collect::<String>()
        );
        disk::durable_write(&data_dir.join(PARTIAL), text.as_bytes(), 0o600)
    }
}

fn fill(file: &File, size: u64) -> std::io::Result<()> {
    let pages = page::empty().repeat(FILL / page::PAGE);
    let mut offset = 0;
    while offset < size {
        file.write_all_at(&pages, offset)?;
        offset += pages.len() as u64;
    }
    Ok(())
}

/// The databases that the backup has files of and nobody wants.
fn left_out(contents: &Contents, wanted: &[String], backup: &BackupHead) -> Result<BTreeMap<u32, Database>> {
    let there: BTreeSet<u32> = contents.files.iter().filter_map(|file| database_of(&file.path)).collect();
    let named: BTreeMap<u32, &str> = contents.databases.iter().map(|one| (one.oid, one.name.as_str())).collect();
    let number = |text: &String| {
        let by_name = named.iter().find(|(_, name)| **name == text.as_str()).map(|(oid, _)| *oid);
        by_name.or_else(|| text.parse().ok().filter(|oid| named.contains_key(oid) || there.contains(oid)))
    };
    let mut stay = BTreeSet::new();
    for text in wanted {
        stay.insert(number(text).ok_or_else(|| unknown(text, &named, &there, backup))?);
    }
    let is_system = |oid: u32| oid < FIRST_OF_USERS || named.get(&oid).is_some_and(|name| SYSTEM.contains(name));
    let out = there.into_iter().filter(|oid| !stay.contains(oid) && !is_system(*oid));
    Ok(out
        .map(|oid| {
            (oid, Database { oid, name: named.get(&oid).map_or_else(|| oid.to_string(), |name| (*name).to_owned()) })
        })
        .collect())
}

fn unknown(text: &str, named: &BTreeMap<u32, &str>, there: &BTreeSet<u32>, backup: &BackupHead) -> Error {
    let id = backup.backup_id;
    if named.is_empty() {
        let numbers: Vec<String> = there.iter().map(u32::to_string).collect();
        return Error::not_found(format!(
            "backup {id}, of an older version, does not say what its databases are called; it has {}",
            numbers.join(", ")
        ))
        .hint("name one by its number: SELECT oid, datname FROM pg_database");
    }
    let names: Vec<&str> = named.values().copied().collect();
    Error::not_found(format!("backup {id} has no database '{text}'; it has {}", names.join(", ")))
        .hint("one that was made after the backup is in WAL only and comes along with any other")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::repository::manifest::backup_head;

    fn contents(named: bool) -> Contents {
        let paths = [
            "PG_VERSION",
            "global/1262",
            "base/1/1259",
            "base/5/PG_VERSION",
            "base/16384/PG_VERSION",
            "base/16384/1259",
            "base/16390/PG_VERSION",
            "base/16390/pg_filenode.map",
            "base/16390/1259",
            "base/16390/1259_vm",
            "pg_tblspc/16500/PG_15_202209061/16384/16400",
            "pg_tblspc/16500/PG_15_202209061/16390/16401.1",
            "base/16399/1259",
        ];
        let names: &[(u32, &str)] = &[(1, "template1"), (5, "postgres"), (16384, "app"), (16390, "16384x")];
        let databases =
            names.iter().filter(|_| named).map(|(oid, name)| Database { oid: *oid, name: (*name).to_owned() });
        let content = vec![7; 3 * page::PAGE];
        Contents {
            files: paths.iter().map(|path| FileEntry::of(path, &content)).collect(),
            databases: databases.collect(),
            ..Contents::default()
        }
    }

    fn select(named: bool, wanted: &[&str]) -> Result<(Contents, Selection)> {
        let mut contents = contents(named);
        let wanted: Vec<String> = wanted.iter().map(|text| (*text).to_owned()).collect();
        let selection = Selection::of(&mut contents, &wanted, &backup_head(1, 1, 40, 80))?;
        Ok((contents, selection))
    }

    fn out(named: bool, wanted: &[&str]) -> Vec<u32> {
        select(named, wanted).expect("selected").1.left_out.iter().map(|database| database.oid).collect()
    }

    #[test]
    fn what_is_wanted_and_what_is_the_systems_stays() {
        // 16399 was dropped while the backup was taken: it has files and no name.
        assert_eq!(out(true, &["app"]), [16390, 16399]);
        assert_eq!(out(true, &["16384"]), [16390, 16399], "by number");
        assert_eq!(out(true, &["postgres"]), [16384, 16390, 16399]);
        assert_eq!(out(true, &["app", "16390", "16399"]), Vec::<u32>::new());
        assert_eq!(out(false, &["16390"]), [16384, 16399], "a backup of an older version");
        assert_eq!(out(true, &[]), Vec::<u32>::new());
        let (contents, selection) = select(true, &["app"]).expect("selected");
        let paths: Vec<&str> = contents.files.iter().map(|file| file.path.as_str()).collect();
        assert!(paths.contains(&"global/1262") && paths.contains(&"pg_tblspc/16500/PG_15_202209061/16384/16400"));
        assert!(paths.contains(&"base/16390/pg_filenode.map") && !paths.contains(&"base/16390/1259"));
        assert_eq!((selection.hollow.len(), selection.versions.len()), (4, 1));
    }

    #[test]
    fn a_name_that_fits_nothing_is_refused_with_those_that_do() {
        let said = |named, wanted: &str| select(named, &[wanted]).expect_err("unknown");
        let error = said(true, "other");
        assert!(
            error.to_string().contains("app") && error.hint_text().is_some_and(|hint| hint.contains("WAL")),
            "{error}"
        );
        let error = said(false, "app");
        assert!(error.to_string().contains("16384") && error.to_string().contains("older version"), "{error}");
    }

    #[test]
    fn what_is_left_out_takes_no_room_with_checksums_and_holds_empty_pages_without() {
        for filled in [false, true] {
            let (_, selection) = select(true, &["app"]).expect("selected");
            let selection = Selection { filled, ..selection };
            let dir = tempfile::tempdir().expect("a directory");
            for entry in selection.hollow.iter().chain(&selection.versions) {
                std::fs::create_dir_all(dir.path().join(&entry.path).parent().expect("a parent")).expect("made");
            }
            selection.make(dir.path()).expect("made");
            let main = dir.path().join("base/16390/1259");
            let content = std::fs::read(&main).expect("read");
            assert_eq!(content.len(), 3 * page::PAGE);
            let map = std::fs::read(dir.path().join("base/16390/1259_vm")).expect("read");
            assert!(map == vec![0; 3 * page::PAGE], "maps are made by recovery itself");
            match filled {
                true => assert!(content == page::empty().repeat(3)),
                false => assert_eq!(std::fs::metadata(&main).expect("there").blocks(), 0),
            }
            let version = std::fs::read_to_string(dir.path().join("base/16390/PG_VERSION")).expect("read");
            assert!(version.len() < 63 && !version.trim().contains(' ') && version.starts_with('0'), "{version}");
        }
    }
}
