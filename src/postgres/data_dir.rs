//! What of a data directory belongs into a base backup: the rules of the manual's low-level backup section (26.3.3) and
//! of backup/basebackup.c.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::version::Version;
use crate::error::{Error, IoContext, Result};
use crate::model::Timeline;
use crate::wal::{History, WalFileName};

/// Our own directory inside a data directory: writer's state and fetched WAL. The server's tools (pg_basebackup,
/// pg_rewind, pg_checksums) pass over every name that starts with `pgsql_tmp`, so a copy never takes it along.
pub const OWN_DIR: &str = "pgsql_tmp_perennial";

/// Marks a directory that a restore has not finished. PostgreSQL cannot start it: `global/pg_control` comes last.
pub const RESTORE_MARKER: &str = "perennial.restoring";

/// Says that a directory has some databases of a cluster only, and which it lacks. A copy of the directory takes it along.
pub const PARTIAL: &str = "perennial.partial";

/// What has some databases only must not be taken for the cluster: nothing of it goes into a repository.
pub fn refuse_partial(data_dir: &Path) -> Result<()> {
    match crate::disk::is_there(&data_dir.join(PARTIAL))? {
        true => Err(Error::refused(what_is_partial(data_dir)).hint(PARTIAL_HINT)),
        false => Ok(()),
    }
}

pub fn what_is_partial(data_dir: &Path) -> String {
    format!("{} has some databases of its cluster only (perennial restore --database)", data_dir.display())
}

/// What to do with such a directory.
pub const PARTIAL_HINT: &str = "use it as it is, or restore all of the cluster without --database; to go on with this as a cluster of its own, drop the databases that perennial.partial names, then delete that file";

/// Make a server that starts recover to an end, or go on for ever. The second goes before the first.
pub const RECOVERY_SIGNAL: &str = "recovery.signal";
pub const STANDBY_SIGNAL: &str = "standby.signal";

/// Directories whose content is of no use to a copy; they themselves must be there.
const WITHOUT_CONTENT: &[&str] =
    &["pg_wal", "pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"];

/// Files that belong to the running server or to an earlier copy.
const NOT_COPIED: &[&str] = &[
    "postmaster.pid",
    "postmaster.opts",
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    RECOVERY_SIGNAL,
    STANDBY_SIGNAL,
    ".DS_Store",
    RESTORE_MARKER,
];

/// Files below `global`, `base` and tablespaces that are not made of pages.
const NOT_PAGES: &[&str] = &["pg_control", "pg_filenode.map", "PG_VERSION", "pg_internal.init"];

/// Blocks in one file of a relation (`RELSEG_SIZE`, 1 GB of 8 kB pages).
const BLOCKS_PER_FILE: u32 = 131_072;

/// One thing found, path relative to the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Dir { path: String, mode: u32 },
    File(FileItem),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileItem {
    pub path: String,
    /// Where to read it: tablespaces are entered through their link.
    pub source: PathBuf,
    pub mode: u32,
    pub uid: u32,
    pub size: u64,
    pub mtime: i64,
    /// Block number of the file's first page, for files made of checksummed pages.
    pub first_block: Option<u32>,
    /// Whether each page begins with the position of its last change: the main fork of a relation. The maps of free space
    /// and visibility are changed without it.
    pub pages_have_lsn: bool,
}

/// A tablespace of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceItem {
    pub oid: u32,
    /// The link's target; `None` for one in place.
    pub location: Option<PathBuf>,
}

#[derive(Debug, Clone, Default)]
pub struct Walk {
    pub items: Vec<Item>,
    pub tablespaces: Vec<TablespaceItem>,
    /// What was left out though it is not one of PostgreSQL's own exclusions, with the reason.
    pub left_out: Vec<String>,
}

impl Walk {
    pub fn files(&self) -> impl Iterator<Item = &FileItem> {
        self.items.iter().filter_map(|item| match item {
            Item::File(file) => Some(file),
            Item::Dir { .. } => None,
        })
    }
}

/// Lists what a base backup takes. Files may vanish between this and the copy, and others may appear: WAL brings both
/// in order again.
pub fn walk(data_dir: &Path, version: Version, catalog_version: u32) -> Result<Walk> {
    let mut walk = Walker {
        root: data_dir,
        tablespace_version: format!("PG_{}_{catalog_version}", version.major),
        walk: Walk::default(),
    };
    walk.directory(data_dir, "")?;
    for name in version.wal_directories {
        walk.walk.items.push(Item::Dir { path: format!("pg_wal/{name}"), mode: 0o700 });
    }
    Ok(walk.walk)
}

struct Walker<'a> {
    root: &'a Path,
    tablespace_version: String,
    walk: Walk,
}

impl Walker<'_> {
    fn directory(&mut self, source: &Path, path: &str) -> Result<()> {
        let names = match list(source) {
            // Dropped under our eyes: a database, or a temporary directory.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !path.is_empty() => return Ok(()),
            listed => listed.on("list directory", source)?,
        };
        let unlogged = if holds_relations(path) { unlogged_relations(&names) } else { BTreeSet::new() };
        for name in &names {
            if is_left_out(path, name) || is_temporary_or_unlogged(path, name, &unlogged) {
                continue;
            }
            let below = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            self.entry(&source.join(name), &below)?;
        }
        Ok(())
    }

    fn entry(&mut self, source: &Path, path: &str) -> Result<()> {
        let Some(metadata) = metadata_if_there(source)? else { return Ok(()) };
        let in_tablespaces = path.strip_prefix("pg_tblspc/").filter(|rest| !rest.contains('/'));
        if let Some(oid) = in_tablespaces {
            return self.tablespace(source, path, oid, &metadata);
        }
        if metadata.is_symlink() {
            return self.link(source, path);
        }
        if metadata.is_dir() {
            self.walk.items.push(Item::Dir { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
            if WITHOUT_CONTENT.contains(&path) { Ok(()) } else { self.directory(source, path) }
        } else if metadata.is_file() {
            self.file(source, path, &metadata);
            Ok(())
        } else {
            self.walk.left_out.push(format!("{path}: neither file nor directory"));
            Ok(())
        }
    }

    /// Links other than tablespaces: `pg_wal` is made anew as a directory, files are taken as what they point to.
    fn link(&mut self, source: &Path, path: &str) -> Result<()> {
        let target = match std::fs::metadata(source) {
            Ok(target) => target,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                self.walk.left_out.push(format!("{path}: a link that leads nowhere"));
                return Ok(());
            }
            Err(e) => return Err(e).on("follow", source),
        };
        if WITHOUT_CONTENT.contains(&path) {
            self.walk.items.push(Item::Dir { path: path.to_owned(), mode: target.mode() & 0o7777 });
        } else if target.is_file() {
            self.file(source, path, &target);
        } else {
            self.walk
                .left_out
                .push(format!("{path}: a link to a directory outside; pg_basebackup leaves these out too"));
        }
        Ok(())
    }

    fn tablespace(&mut self, source: &Path, path: &str, oid: &str, metadata: &Metadata) -> Result<()> {
        let Ok(oid) = oid.parse::<u32>() else { return Ok(()) };
        let location = match metadata.is_symlink() {
            true => Some(std::fs::read_link(source).on("read link", source)?),
            false => None,
        };
        if location.as_deref().is_some_and(|location| location.starts_with(self.root)) {
            return Err(Error::refused(format!(
                "tablespace {oid} lies inside the data directory, at {}",
                location.unwrap_or_default().display()
            )));
        }
        if location.is_none() {
            self.walk.items.push(Item::Dir { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
        }
        self.walk.tablespaces.push(TablespaceItem { oid, location });
        // Only this major's directory: another one's may lie beside it after an upgrade.
        let version = self.tablespace_version.clone();
        self.entry(&source.join(&version), &format!("{path}/{version}"))
    }

    fn file(&mut self, source: &Path, path: &str, metadata: &Metadata) {
        self.walk.items.push(Item::File(FileItem {
            path: path.to_owned(),
            source: source.to_owned(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            size: metadata.len(),
            mtime: metadata.mtime(),
            first_block: first_block(path),
            pages_have_lsn: pages_have_lsn(path),
        }));
    }
}

/// Where a timeline of the server came from, by the history file in its `pg_wal`.
pub fn history_of(data_dir: &Path, timeline: Timeline) -> Result<History> {
    if timeline == Timeline(1) {
        return Ok(History::root(timeline));
    }
    let path = data_dir.join(format!("pg_wal/{}", WalFileName::History(timeline)));
    let text = std::fs::read_to_string(&path).on("read", &path)?;
    History::parse(timeline, &text).map_err(|e| Error::damaged(format!("{}: {e}", path.display())))
}

fn list(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name().into_string().map_err(|name| {
            std::io::Error::new(std::io::ErrorKind::InvalidData, format!("the name {name:?} is not UTF-8"))
        })?;
        names.push(name);
    }
    names.sort();
    Ok(names)
}

fn metadata_if_there(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).on("stat", path),
    }
}

fn is_left_out(path: &str, name: &str) -> bool {
    // `strncmp` with the prefix, as basebackup.c does it, also covers pg_internal.init.1234 being written.
    name.starts_with("pgsql_tmp")
        || name.starts_with("pg_internal.init")
        || NOT_COPIED.contains(&name) && (path.is_empty() || name == ".DS_Store")
}

/// Directories in which files are named by relation: `base/<db>`, `global` and `pg_tblspc/<oid>/<version>/<db>`.
fn holds_relations(path: &str) -> bool {
    let mut parts = path.split('/');
    let root = parts.next();
    matches!((root, parts.count()), (Some("global"), 0) | (Some("base"), 1) | (Some("pg_tblspc"), 3))
}

/// The digits of a relation's file name: `16384`, `16384_fsm`, `16384.1`, `16384_init`.
fn relation_number(name: &str) -> Option<&str> {
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    let rest = &name[digits..];
    (digits > 0 && (rest.is_empty() || rest.starts_with(['_', '.']))).then_some(&name[..digits])
}

fn unlogged_relations(names: &[String]) -> BTreeSet<String> {
    names
        .iter()
        .filter_map(|name| name.strip_suffix("_init"))
        .filter(|stem| relation_number(stem) == Some(stem))
        .map(str::to_owned)
        .collect()
}

fn is_temporary_or_unlogged(path: &str, name: &str, unlogged: &BTreeSet<String>) -> bool {
    if !holds_relations(path) {
        return false;
    }
    if is_temporary_relation(name) {
        return true;
    }
    relation_number(name).is_some_and(|number| unlogged.contains(number) && !name.ends_with("_init"))
}

/// `looks_like_temp_rel_name` (storage/file/fd.c): `t<backend>_<relation>`, with fork and file number.
fn is_temporary_relation(name: &str) -> bool {
    let Some((backend, relation)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else { return false };
    !backend.is_empty() && backend.bytes().all(|b| b.is_ascii_digit()) && relation_number(relation).is_some()
}

/// Whether a file is made of pages that tell where in WAL they were changed last.
pub fn pages_have_lsn(path: &str) -> bool {
    fork_of(path) == Some(Fork::Main)
}

/// For a file made of checksummed pages: the number of its first block.
pub fn first_block(path: &str) -> Option<u32> {
    let (directory, name) = path.rsplit_once('/')?;
    if !holds_relations(directory) || NOT_PAGES.contains(&name) || relation_number(name).is_none() {
        return None;
    }
    let file = name.rsplit_once('.').map_or(Some(0), |(_, number)| number.parse::<u32>().ok())?;
    file.checked_mul(BLOCKS_PER_FILE)
}

/// The database that a path of a data directory belongs to, if it is one's: `base/<db>/…` and
/// `pg_tblspc/<oid>/<version>/<db>/…`.
pub fn database_of(path: &str) -> Option<u32> {
    let (directory, _) = path.rsplit_once('/')?;
    let of_one = holds_relations(directory) && directory != "global";
    directory.rsplit('/').next().filter(|_| of_one)?.parse().ok()
}

/// The pages of a relation, in a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    Main,
    /// Maps of free space and visibility, and what an unlogged relation begins with.
    Other,
}

/// Which pages a path of a data directory holds, if any.
pub fn fork_of(path: &str) -> Option<Fork> {
    first_block(path)?;
    let name = path.rsplit('/').next()?;
    Some(if name.contains('_') { Fork::Other } else { Fork::Main })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for file in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            if !file.ends_with('/') {
                std::fs::write(path, b"x").expect("written");
            }
        }
        root
    }

    fn paths(root: &tempfile::TempDir) -> Vec<String> {
        let walk = walk(root.path(), Version::of(15).expect("supported"), 202_209_061).expect("walked");
        walk.files().map(|file| file.path.clone()).collect()
    }

    #[test]
    fn what_belongs_to_the_running_server_stays_behind() {
        let root = tree(&[
            "PG_VERSION",
            "postmaster.pid",
            "postmaster.opts",
            "backup_label",
            "backup_manifest",
            "recovery.signal",
            "global/pg_control",
            "global/pg_internal.init",
            "base/5/pg_internal.init.77",
            "pg_wal/000000010000000000000001",
            "pg_replslot/slot/state",
            "pg_stat_tmp/x",
            "pg_subtrans/0000",
            "pg_notify/0",
            "base/pgsql_tmp/pgsql_tmp1.1",
            "pgsql_tmp_perennial/state.json",
            "base/5/1259",
            "perennial.restoring",
            "postgresql.auto.conf",
        ]);
        assert_eq!(paths(&root), ["PG_VERSION", "base/5/1259", "global/pg_control", "postgresql.auto.conf"]);
    }

    #[test]
    fn temporary_and_unlogged_relations_stay_behind_but_for_their_init_forks() {
        let root = tree(&[
            "base/5/16384",
            "base/5/16384_init",
            "base/5/16384_fsm",
            "base/5/16384.1",
            "base/5/163840",
            "base/5/t3_16390",
            "base/5/t3_16390_fsm",
            "base/5/16391_vm",
            "base/5/16391",
        ]);
        assert_eq!(paths(&root), ["base/5/163840", "base/5/16384_init", "base/5/16391", "base/5/16391_vm"]);
    }

    #[test]
    fn a_tablespace_is_entered_through_its_link_and_only_this_majors_part() {
        let outside = tree(&["PG_15_202209061/5/16400", "PG_14_202107181/5/16400"]);
        let root = tree(&["pg_tblspc/16500/PG_15_202209061/5/16600", "PG_VERSION"]);
        std::os::unix::fs::symlink(outside.path(), root.path().join("pg_tblspc/16385")).expect("linked");
        let walk = walk(root.path(), Version::of(15).expect("supported"), 202_209_061).expect("walked");
        let files: Vec<_> = walk.files().map(|file| file.path.as_str()).collect();
        assert_eq!(
            files,
            ["PG_VERSION", "pg_tblspc/16385/PG_15_202209061/5/16400", "pg_tblspc/16500/PG_15_202209061/5/16600"]
        );
        assert_eq!(walk.tablespaces[0], TablespaceItem { oid: 16385, location: Some(outside.path().to_owned()) });
        assert_eq!(walk.tablespaces[1], TablespaceItem { oid: 16500, location: None });
    }

    #[test]
    fn a_path_says_whose_it_is_and_which_pages_it_holds() {
        assert_eq!(database_of("base/16384/1259"), Some(16384));
        assert_eq!(database_of("base/16384/PG_VERSION"), Some(16384));
        assert_eq!(database_of("pg_tblspc/16385/PG_15_202209061/5/16400_fsm"), Some(5));
        for other in [
            "base/16384",
            "global/1262",
            "pg_tblspc/16385/PG_15_202209061",
            "pg_xact/0000",
            "postgresql.conf",
            "base/x/1",
        ] {
            assert_eq!(database_of(other), None, "{other}");
        }
        assert_eq!(fork_of("base/5/16384.2"), Some(Fork::Main));
        assert_eq!(fork_of("base/5/16384_vm"), Some(Fork::Other));
        assert_eq!(fork_of("base/5/pg_filenode.map"), None);
    }

    #[test]
    fn only_relation_files_are_made_of_pages() {
        assert_eq!(first_block("base/5/16384"), Some(0));
        assert_eq!(first_block("base/5/16384.2"), Some(262_144));
        assert_eq!(first_block("base/5/16384_vm.1"), Some(131_072));
        assert_eq!(first_block("pg_tblspc/16385/PG_15_202209061/5/16400"), Some(0));
        for other in
            ["base/5/pg_filenode.map", "global/pg_control", "base/5/PG_VERSION", "pg_xact/0000", "postgresql.conf"]
        {
            assert_eq!(first_block(other), None, "{other}");
        }
    }
}
