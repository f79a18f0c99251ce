//! What a directory has already of the backup that is to be restored into it: regions whose CRC-32C is the manifest's stay,
//! everything else is fetched or goes.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use futures::StreamExt;

use super::fetch::Contents;
use super::layout::{Tablespaces, inside};
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::postgres::control_file::CONTROL_FILE;

/// Files looked at once. Each thread holds a region.
const FILES: usize = 4;

/// The regions that need not be fetched: by file of the manifest, then by region.
#[derive(Debug, Default)]
pub struct Have {
    regions: Vec<Vec<bool>>,
    pub bytes: u64,
}

impl Have {
    /// These regions, by file and then by number.
    pub fn of(regions: Vec<Vec<bool>>) -> Have {
        Have { regions, bytes: 0 }
    }

    /// Whether a region is there.
    pub fn has(&self, file: usize, region: usize) -> bool {
        self.regions.get(file).and_then(|regions| regions.get(region)).copied().unwrap_or(false)
    }
}

/// Deletes what is not of the backup: files it does not have, everything that is no plain file where it has one, links.
pub fn clear(data_dir: &Path, contents: &Contents, tablespaces: &Tablespaces, but: &[&str]) -> Result<()> {
    let files: HashSet<&str> = contents.files.iter().map(|file| file.path.as_str()).collect();
    let directories: HashSet<&str> = contents.directories.iter().map(|directory| directory.path.as_str()).collect();
    let keep = Keep { files, directories, but };
    keep.only(data_dir, "")?;
    for (oid, root) in &tablespaces.links {
        // Other majors keep theirs in directories beside ours.
        for directory in contents.directories.iter().filter_map(|d| d.path.strip_prefix(&format!("pg_tblspc/{oid}/"))) {
            if !directory.contains('/') {
                keep.only(&root.join(directory), &format!("pg_tblspc/{oid}/{directory}/"))?;
            }
        }
    }
    Ok(())
}

struct Keep<'a> {
    files: HashSet<&'a str>,
    directories: HashSet<&'a str>,
    but: &'a [&'a str],
}

impl Keep<'_> {
    /// `below` is what the manifest's paths have in front of those of this directory.
    fn only(&self, directory: &Path, below: &str) -> Result<()> {
        let entries = match std::fs::read_dir(directory) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.on("list directory", directory)?,
        };
        for entry in entries {
            let entry = entry.on("list directory", directory)?;
            let (path, kind) = (entry.path(), entry.file_type().on("stat", entry.path())?);
            let name = entry.file_name().into_string().unwrap_or_default();
            let known = format!("{below}{name}");
            if self.but.contains(&known.as_str()) || self.but.contains(&name.as_str()) || name == "lost+found" {
                continue;
            }
            match (kind.is_dir(), kind.is_file()) {
                (true, _) if self.directories.contains(known.as_str()) => self.only(&path, &format!("{known}/"))?,
                (true, _) => std::fs::remove_dir_all(&path).on("remove", &path)?,
                (_, true) if self.files.contains(known.as_str()) => (),
                _ => std::fs::remove_file(&path).on("remove", &path)?,
            }
        }
        Ok(())
    }
}

/// Looks at every file that is there, and gives it its size.
pub async fn look(contents: &Contents, data_dir: &Path) -> Result<Have> {
    let mut have = Have { regions: vec![Vec::new(); contents.files.len()], bytes: 0 };
    let looks =
        contents.files.iter().enumerate().filter(|(_, file)| file.path != CONTROL_FILE).map(|(number, file)| {
            let path = inside(data_dir, &file.path);
            let regions: Vec<(u32, u32)> = file.regions.iter().map(|region| (region.plain, region.crc)).collect();
            async move {
                let look = tokio::task::spawn_blocking(move || look_at(&path?, &regions));
                Ok::<_, Error>((number, look.await.map_err(|e| Error::internal("a reading thread ended").source(e))??))
            }
        });
    let looks: Vec<_> = looks.collect();
    let mut looks = futures::stream::iter(looks).buffer_unordered(FILES);
    while let Some(looked) = looks.next().await {
        let (number, regions) = looked?;
        let there = regions.iter().zip(&contents.files[number].regions).filter(|(same, _)| **same);
        have.bytes += there.map(|(_, region)| u64::from(region.plain)).sum::<u64>();
        have.regions[number] = regions;
    }
    Ok(have)
}

/// `regions`: bytes and CRC-32C of each.
fn look_at(path: &Path, regions: &[(u32, u32)]) -> Result<Vec<bool>> {
    let open = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOFOLLOW).open(path);
    let file = match open {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        // One that its owner must not write to is made anew.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return std::fs::remove_file(path).on("remove", path).map(|()| Vec::new());
        }
        file => file.on("open", path)?,
    };
    // Another name of the same file is not ours to change: that of a copy made of links, or of a server before its upgrade.
    let metadata = file.metadata().on("stat", path)?;
    if metadata.nlink() > 1 {
        return std::fs::remove_file(path).on("remove", path).map(|()| Vec::new());
    }
    let size = regions.iter().map(|(plain, _)| u64::from(*plain)).sum();
    if metadata.len() != size {
        file.set_len(size).on("set the size of", path)?;
    }
    let mut buffer = vec![0; regions.iter().map(|(plain, _)| *plain as usize).max().unwrap_or(0)];
    let mut offset = 0;
    let mut same = Vec::with_capacity(regions.len());
    for (plain, crc) in regions {
        let part = &mut buffer[..*plain as usize];
        file.read_exact_at(part, offset).on("read", path)?;
        same.push(crc32c::crc32c(part) == *crc);
        // What stays is not read again soon.
        disk::drop_from_cache(&file, offset, part.len());
        offset += part.len() as u64;
    }
    Ok(same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PackId;
    use crate::repository::manifest::{Directory, FileEntry, REGION};

    #[tokio::test]
    async fn what_is_the_same_stays_and_everything_else_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |path: &str| dir.path().join(path);
        let large: Vec<u8> = (0..3 * REGION as u32 / 2).map(|n| (n / 7) as u8).collect();
        let mut changed = large.clone();
        changed[5] ^= 1;
        changed.extend_from_slice(b"longer");
        std::fs::create_dir_all(at("base/1")).expect("made");
        std::fs::create_dir_all(at("base/2/deep")).expect("made");
        for (path, content) in [("base/1/same", &large), ("base/1/changed", &changed), ("base/2/gone", &large)] {
            std::fs::write(at(path), content).expect("written");
        }
        std::fs::write(at("keep"), b"x").expect("written");
        std::os::unix::fs::symlink(at("keep"), at("base/1/link")).expect("linked");
        let contents = Contents {
            packs: vec![PackId([0; 16])],
            directories: ["base", "base/1"].map(|path| Directory { path: path.to_owned(), mode: 0o700 }).to_vec(),
            files: ["base/1/same", "base/1/changed", "base/1/link", "base/1/new"]
                .map(|path| FileEntry::of(path, &large))
                .to_vec(),
            ..Contents::default()
        };
        clear(dir.path(), &contents, &Tablespaces::default(), &["keep"]).expect("cleared");
        assert!(at("keep").is_file() && !at("base/2").exists() && !at("base/1/link").exists());
        let have = look(&contents, dir.path()).await.expect("looked");
        let has = |file| [have.has(file, 0), have.has(file, 1)];
        assert_eq!([0, 1, 2, 3].map(has), [[true, true], [false, true], [false, false], [false, false]]);
        assert_eq!(std::fs::metadata(at("base/1/changed")).expect("there").len(), large.len() as u64);
    }
}
