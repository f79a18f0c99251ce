//! The skeleton of a restored directory: directories, tablespace links, and making it all durable.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Overwrite;
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::postgres::is_vacant;
use crate::repository::manifest::{BackupHead, Directory};

/// Where the control file waits until everything else is durable.
pub fn control_file_aside(data_dir: &Path) -> PathBuf {
    data_dir.join("global/pg_control.perennial")
}

/// Where each tablespace goes.
#[derive(Debug, Clone, Default)]
pub struct Tablespaces {
    /// oid → directory, for those that are links.
    pub links: BTreeMap<u32, PathBuf>,
    /// Those whose place the operator has named.
    named: BTreeSet<u32>,
}

impl Tablespaces {
    /// Applies the operator's map, whose keys are oids or former locations; one that fits nothing is an error.
    pub fn map(backup: &BackupHead, map: &BTreeMap<String, PathBuf>) -> Result<Tablespaces> {
        let (mut links, mut named) = (BTreeMap::new(), BTreeSet::new());
        let mut used = Vec::new();
        for tablespace in &backup.tablespaces {
            let Some(location) = &tablespace.location else { continue };
            let keys = [tablespace.oid.to_string(), location.clone()];
            let mapped = keys.iter().find_map(|key| map.get_key_value(key));
            if let Some((key, _)) = mapped {
                used.push(key.clone());
                named.insert(tablespace.oid);
            }
            let target = mapped.map_or_else(|| PathBuf::from(location), |(_, target)| target.clone());
            if !target.is_absolute() {
                return Err(Error::usage(format!(
                    "tablespace {}: {} is not an absolute path",
                    tablespace.oid,
                    target.display()
                )));
            }
            links.insert(tablespace.oid, target);
        }
        if let Some(unused) = map.keys().find(|key| !used.contains(key)) {
            let known: Vec<_> = backup
                .tablespaces
                .iter()
                .filter_map(|t| Some(format!("{} ({})", t.oid, t.location.as_ref()?)))
                .collect();
            return Err(Error::usage(format!("the backup has no tablespace '{unused}'; it has: {}", known.join(", "))));
        }
        Ok(Tablespaces { links, named })
    }

    /// A tablespace directory must be new or empty. Overwriting a data directory allows to overwrite those that it
    /// links to itself, and no others: they may be a living server's.
    ///
    /// A copy of a data directory has the links of the original: what is overwritten in place must be named. A restore that
    /// was cut off has made the links itself.
    pub fn check(&self, data_dir: &Path, overwrite: Overwrite, unfinished: Option<&str>) -> Result<()> {
        for (oid, directory) in &self.links {
            let begun = unfinished.is_some_and(|text| text.lines().any(|line| line == noted(*oid, directory)));
            let may_be_own = begun
                || match overwrite {
                    Overwrite::Empty => true,
                    Overwrite::Differences => self.named.contains(oid),
                    Overwrite::Never => false,
                };
            let own = may_be_own && is_linked_from(data_dir, directory)?;
            if !own && !is_vacant(directory)? && !holds_only_an_unfinished_restore(directory)? {
                return Err(Error::refused(format!(
                    "the directory of tablespace {oid}, {}, is not empty",
                    directory.display()
                ))
                .hint(format!("send it elsewhere: perennial restore --tablespace {oid}=/new/directory (with --delta the same directory, if no other server uses it)")));
            }
        }
        Ok(())
    }

    /// What the mark of an unfinished restore says of them: these it has begun to fill.
    pub fn note(&self) -> String {
        self.links.iter().map(|(oid, directory)| noted(*oid, directory) + "\n").collect()
    }

    pub fn roots(&self) -> impl Iterator<Item = &Path> {
        self.links.values().map(PathBuf::as_path)
    }

    /// Makes the directories and marks them as being restored.
    pub fn mark(&self) -> Result<()> {
        self.roots().try_for_each(|directory| {
            disk::create_dir(directory, 0o700)?;
            disk::durable_write(&directory.join(UNFINISHED), b"", 0o600)
        })
    }

    /// Empties them, but for what another major version of PostgreSQL has there.
    pub fn empty(&self, major: u32) -> Result<()> {
        let ours = format!("PG_{major}_");
        for directory in self.roots() {
            empty_but(directory, |name| name == UNFINISHED || (name.starts_with("PG_") && !name.starts_with(&ours)))?;
        }
        Ok(())
    }

    pub fn unmark(&self) -> Result<()> {
        self.roots().try_for_each(|directory| disk::remove_if_there(&directory.join(UNFINISHED)))
    }

    /// The file from which the server makes the links anew (`read_tablespace_map` in xlogrecovery.c).
    pub fn map_file(&self) -> Option<String> {
        let escaped =
            |path: &Path| path.to_string_lossy().replace('\\', "\\\\").replace('\n', "\\\n").replace('\r', "\\\r");
        let lines = self.links.iter().map(|(oid, path)| format!("{oid} {}\n", escaped(path)));
        (!self.links.is_empty()).then(|| lines.collect())
    }
}

fn noted(oid: u32, directory: &Path) -> String {
    format!("tablespace {oid} in {}", directory.display())
}

/// Marks a tablespace directory whose restore has not finished.
pub(super) const UNFINISHED: &str = "perennial.restoring";

/// Whether the directory that is being overwritten has its tablespace there.
fn is_linked_from(data_dir: &Path, directory: &Path) -> Result<bool> {
    let Ok(wanted) = std::fs::canonicalize(directory) else { return Ok(false) };
    let links = match std::fs::read_dir(data_dir.join("pg_tblspc")) {
        Ok(links) => links,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e).on("list directory", data_dir.join("pg_tblspc")),
    };
    for link in links {
        let link = link.on("list directory", data_dir)?.path();
        if std::fs::canonicalize(&link).is_ok_and(|target| target == wanted) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn holds_only_an_unfinished_restore(directory: &Path) -> Result<bool> {
    Ok(directory.join(UNFINISHED).is_file())
}

/// Deletes what is in a directory, but for one name; links are removed, never followed.
pub fn empty(directory: &Path, but: Option<&str>) -> Result<()> {
    empty_but(directory, |name| but == Some(name))
}

/// The same but for what `stays`.
pub fn empty_but(directory: &Path, stays: impl Fn(&str) -> bool) -> Result<()> {
    for entry in std::fs::read_dir(directory).on("list directory", directory)? {
        let entry = entry.on("list directory", directory)?;
        let path = entry.path();
        let name = entry.file_name();
        if name.to_str().is_some_and(&stays) || name == "lost+found" {
            continue;
        }
        if entry.file_type().on("stat", &path)?.is_dir() {
            std::fs::remove_dir_all(&path).on("remove", &path)?;
        } else {
            std::fs::remove_file(&path).on("remove", &path)?;
        }
    }
    Ok(())
}

pub fn make_directories(data_dir: &Path, directories: &[Directory], tablespaces: &Tablespaces) -> Result<()> {
    disk::create_dir(&data_dir.join("pg_tblspc"), 0o700)?;
    for (oid, target) in &tablespaces.links {
        let link = data_dir.join(format!("pg_tblspc/{oid}"));
        std::os::unix::fs::symlink(target, &link).on("create link", &link)?;
    }
    for directory in directories {
        let path = inside(data_dir, &directory.path)?;
        disk::create_dir(&path, 0o700)?;
        set_mode(&path, directory.mode)?;
    }
    Ok(())
}

pub fn set_mode(path: &Path, mode: u32) -> Result<()> {
    if std::fs::metadata(path).on("stat", path)?.mode() & 0o7777 != mode & 0o7777 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o7777)).on("set the mode of", path)?;
    }
    Ok(())
}

/// Joins a path of a manifest; one that would leave the directory is not ours.
pub fn inside(data_dir: &Path, path: &str) -> Result<PathBuf> {
    let plain = |part: std::path::Component| matches!(part, std::path::Component::Normal(_));
    if path.is_empty() || !Path::new(path).components().all(plain) {
        return Err(Error::damaged(format!(
            "the manifest names a path outside the data directory: '{}'",
            path.escape_debug()
        )));
    }
    Ok(data_dir.join(path))
}

/// Writes back everything of the filesystem that holds `directory`, and tells of every write that failed (Linux 5.8).
pub fn sync_filesystem(directory: &Path) -> Result<()> {
    let handle = File::open(directory).on("open", directory)?;
    rustix::fs::syncfs(&handle).on("sync the filesystem of", directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_cannot_write_outside_the_directory() {
        let root = Path::new("/data");
        assert_eq!(inside(root, "base/1/2").expect("inside"), Path::new("/data/base/1/2"));
        for bad in ["", "/etc/passwd", "../x", "base/../../x", "./x"] {
            assert!(inside(root, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn emptying_removes_links_and_does_not_follow_them() {
        let outside = tempfile::tempdir().expect("a directory");
        std::fs::write(outside.path().join("precious"), b"x").expect("written");
        let dir = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).expect("linked");
        std::fs::create_dir_all(dir.path().join("a/b")).expect("made");
        std::fs::write(dir.path().join("keep"), b"x").expect("written");
        empty(dir.path(), Some("keep")).expect("emptied");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
        assert!(outside.path().join("precious").is_file());
    }
}
