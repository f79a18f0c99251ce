//! Finding a PostgreSQL installation: the directory with `postgres` and `initdb`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::version::{VERSIONS, Version};
use crate::error::{Error, IoContext, Result};

/// An installation of one major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Install {
    pub bin_dir: PathBuf,
    pub version: Version,
}

/// Where distributions put their majors.
const FOLDERS: &[(&str, &str)] = &[
    ("/usr/lib/postgresql/", "/bin"),
    ("/usr/pgsql-", "/bin"),
    ("/usr/local/pgsql/", "/bin"),
    ("/opt/homebrew/opt/postgresql@", "/bin"),
];

impl Install {
    /// The installation in `bin_dir`.
    pub fn at(bin_dir: &Path) -> Result<Install> {
        let postgres = bin_dir.join("postgres");
        let output = Command::new(&postgres).arg("--version").output().on("run", &postgres)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let major = text
            .split_whitespace()
            .nth(2)
            .and_then(|number| number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
        let version =
            major.ok_or_else(|| Error::postgres(format!("{} --version says '{}'", postgres.display(), text.trim())))?;
        // A link of one program stands for the directory where all of them are.
        let real = std::fs::canonicalize(&postgres).on("resolve", &postgres)?;
        let bin_dir = real.parent().unwrap_or(bin_dir).to_owned();
        Ok(Install { bin_dir, version: Version::of(version)? })
    }

    /// The installation for a data directory of `major`, or the newest one for a new cluster. `bin_dir` (a setting) is
    /// taken at its word; `path` is the search path.
    pub fn find(bin_dir: Option<&Path>, path: Option<&std::ffi::OsStr>, major: Option<u32>) -> Result<Install> {
        let fits = |install: &Install| major.is_none_or(|major| install.version.major == major);
        if let Some(bin_dir) = bin_dir {
            let install = Install::at(bin_dir)?;
            return match major.filter(|major| install.version.major != *major) {
                None => Ok(install),
                Some(major) => Err(Error::refused(format!(
                    "{} is PostgreSQL {}, the database needs {major}",
                    bin_dir.display(),
                    install.version.major
                ))),
            };
        }
        let in_path = path.into_iter().flat_map(std::env::split_paths);
        let newest_first = VERSIONS.iter().rev().filter(|version| major.is_none_or(|major| version.major == major));
        let folders = newest_first.flat_map(|version| {
            FOLDERS.iter().map(move |(before, after)| PathBuf::from(format!("{before}{}{after}", version.major)))
        });
        let candidates = in_path.chain(folders).filter(|dir| dir.join("postgres").is_file());
        candidates.filter_map(|dir| Install::at(&dir).ok()).find(fits).ok_or_else(|| {
            let wanted = major.map_or_else(|| "PostgreSQL".to_owned(), |major| format!("PostgreSQL {major}"));
            let package = major.map_or_else(|| "postgresql".to_owned(), |major| format!("postgresql-{major}"));
            Error::not_found(format!("no installation of {wanted} was found"))
                .hint(format!("install it (`apt-get install {package}`), or name its directory with --pg-bindir"))
        })
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// Makes a new cluster, with page checksums.
    pub fn initdb(&self, data_dir: &Path, options: &[String]) -> Result<()> {
        let program = self.program("initdb");
        let output = Command::new(&program)
            .arg("--data-checksums")
            .args(["--auth-local=peer", "--auth-host=scram-sha-256", "--encoding=UTF8"])
            .args(options)
            .arg("-D")
            .arg(data_dir)
            .output()
            .on("run", &program)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::postgres(format!("initdb failed ({}): {said}", output.status)))
    }

    /// A parameter as the server would see it at its next start.
    pub fn configured(&self, data_dir: &Path, options: &[String], name: &str) -> Result<String> {
        let program = self.program("postgres");
        let output = Command::new(&program)
            .arg("-D")
            .arg(data_dir)
            .args(options)
            .args(["-C", name])
            .output()
            .on("run", &program)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::postgres(format!("PostgreSQL does not accept its configuration: {said}")))
    }
}
