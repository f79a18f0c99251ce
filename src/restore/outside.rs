//! Configuration that lay outside the data directory (Debian's /etc/postgresql) comes back inside it: the new machine
//! has no such directory, and the server is started with the data directory alone.

use std::path::{Path, PathBuf};

use super::fetch::Contents;
use crate::disk;
use crate::error::{IoContext, Result};
use crate::postgres::conf::with_settings;

const MAIN: &str = "postgresql.conf";

/// Settings that say where the files were.
const PLACES: &[&str] = &["data_directory", "hba_file", "ident_file", "external_pid_file"];

/// Gives each outside file a path in the data directory: its own name, or its path below the directory of
/// `postgresql.conf`. One whose place is taken by the data directory's own file is left out.
pub fn place(contents: &mut Contents) {
    let main = contents.files.iter().filter_map(|file| file.outside.clone()).find(|path| path.ends_with(MAIN));
    let home = main.as_deref().map(Path::new).and_then(Path::parent).map(Path::to_path_buf);
    let taken: std::collections::BTreeSet<String> =
        contents.files.iter().filter(|file| file.outside.is_none()).map(|file| file.path.clone()).collect();
    for file in &mut contents.files {
        if let Some(outside) = &file.outside {
            file.path = new_place(Path::new(outside), home.as_deref());
        }
    }
    contents.files.retain(|file| file.outside.is_none() || !taken.contains(&file.path));
}

fn new_place(outside: &Path, home: Option<&Path>) -> String {
    let below = home.and_then(|home| outside.strip_prefix(home).ok()).map(PathBuf::from);
    let place = below.unwrap_or_else(|| PathBuf::from(outside.file_name().unwrap_or_default()));
    place.to_string_lossy().into_owned()
}

/// The directories that the new places need.
pub fn make_directories(contents: &Contents, data_dir: &Path) -> Result<()> {
    for file in contents.files.iter().filter(|file| file.outside.is_some()) {
        if let Some(parent) = super::layout::inside(data_dir, &file.path)?.parent() {
            disk::create_dir(parent, 0o700)?;
        }
    }
    Ok(())
}

/// What `include_dir` names (manual section 20.1.5).
fn included_directories(text: &str) -> Vec<String> {
    let value = |line: &str| {
        let rest = line.trim().strip_prefix("include_dir")?.trim_start_matches([' ', '\t', '=']);
        let named = rest.strip_prefix('\'')?.split('\'').next()?;
        Some(named.trim_end_matches('/').to_owned())
    };
    text.lines().filter_map(value).collect()
}

/// Takes the settings that name the old places out of the restored `postgresql.conf`: with them the server would start
/// in a directory of the machine that is gone. The entry then describes the file as it is.
pub fn adapt(contents: &mut Contents, data_dir: &Path) -> Result<()> {
    let Some(main) = contents.files.iter_mut().find(|file| file.outside.is_some() && file.path == MAIN) else {
        return Ok(());
    };
    let path = data_dir.join(MAIN);
    let text = std::fs::read_to_string(&path).on("read", &path)?;
    // The server does not start when a directory it is to look into is not there; an empty one is not in a backup.
    for named in included_directories(&text) {
        if let Ok(directory) = super::layout::inside(data_dir, &named) {
            disk::create_dir(&directory, 0o700)?;
        }
    }
    let settings: Vec<(&str, Option<String>)> = PLACES.iter().map(|name| (*name, None)).collect();
    let adapted = with_settings(&text, &settings);
    disk::durable_write(&path, adapted.as_bytes(), main.mode)?;
    let Some(mut region) = main.regions.first().cloned() else { return Ok(()) };
    region.plain = adapted.len() as u32;
    region.crc = crc32c::crc32c(adapted.as_bytes());
    main.size = adapted.len() as u64;
    main.regions = vec![region];
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_files_come_back_where_the_server_looks_for_them() {
        let home = Path::new("/etc/postgresql/15/main");
        let place = |path: &str| new_place(Path::new(path), Some(home));
        assert_eq!(place("/etc/postgresql/15/main/postgresql.conf"), "postgresql.conf");
        assert_eq!(place("/etc/postgresql/15/main/conf.d/tuning.conf"), "conf.d/tuning.conf");
        assert_eq!(place("/etc/ssl/pg_hba.conf"), "pg_hba.conf");
        assert_eq!(new_place(Path::new("/srv/x/pg_hba.conf"), None), "pg_hba.conf");
    }
}
