//! The one table of differences between PostgreSQL majors. No other file names a major.

use crate::error::{Error, Result};

/// What differs from major to major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub major: u32,
    /// `PG_CONTROL_VERSION` (catalog/pg_control.h).
    pub control_version: u32,
    /// Offset of the CRC in `pg_control`.
    pub control_crc_at: usize,
    /// Starting and stopping a base backup (manual section 26.3.3): renamed in 15, when the exclusive mode went.
    pub start_backup: &'static str,
    pub stop_backup: &'static str,
    /// `PostgreSQL-Backup-Manifest-Version`; version 2 names the system identifier (backup/backup_manifest.c).
    pub manifest_version: u32,
    /// Whether statistics are kept in files while the server runs (`stats_temp_directory`, gone in 15).
    pub has_statistics_files: bool,
    /// Whether the server can keep summaries of what WAL touches (`summarize_wal`, since 17).
    pub has_wal_summaries: bool,
    /// Empty directories below `pg_wal` that the server expects.
    pub wal_directories: &'static [&'static str],
}

const OLD_START: &str = "SELECT pg_start_backup($1, $2, false)";
const OLD_STOP: &str = "SELECT lsn, labelfile, spcmapfile FROM pg_stop_backup(false, false)";
const START: &str = "SELECT pg_backup_start($1, $2)";
const STOP: &str = "SELECT lsn, labelfile, spcmapfile FROM pg_backup_stop(false)";
const STATUS_ONLY: &[&str] = &["archive_status"];
const STATUS_AND_SUMMARIES: &[&str] = &["archive_status", "summaries"];

const fn version(major: u32, control: (u32, usize), modern: bool, manifest_version: u32) -> Version {
    Version {
        major,
        control_version: control.0,
        control_crc_at: control.1,
        start_backup: if modern { START } else { OLD_START },
        stop_backup: if modern { STOP } else { OLD_STOP },
        manifest_version,
        has_statistics_files: !modern,
        has_wal_summaries: manifest_version != 1,
        wal_directories: if manifest_version == 1 { STATUS_ONLY } else { STATUS_AND_SUMMARIES },
    }
}

/// Every supported major.
pub const VERSIONS: &[Version] = &[
    version(13, (1300, 288), false, 1),
    version(14, (1300, 288), false, 1),
    version(15, (1300, 288), true, 1),
    version(16, (1300, 288), true, 1),
    version(17, (1700, 288), true, 2),
    version(18, (1800, 292), true, 2),
];

impl Version {
    pub fn of(major: u32) -> Result<Version> {
        VERSIONS.iter().find(|version| version.major == major).copied().ok_or_else(|| {
            let (first, last) = (VERSIONS[0].major, VERSIONS[VERSIONS.len() - 1].major);
            Error::refused(format!("PostgreSQL {major} is not supported: {first} to {last} are"))
        })
    }

    /// From the text of a `PG_VERSION` file.
    pub fn of_file(text: &str) -> Result<Version> {
        let major = text.trim().parse().map_err(|_| {
            Error::damaged(format!("PG_VERSION holds '{}', expected a major version", text.trim().escape_debug()))
        })?;
        Version::of(major)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn majors_out_of_range_are_refused_by_name() {
        assert_eq!(Version::of_file("15\n").expect("supported").major, 15);
        assert!(Version::of_file("9.6\n").is_err());
        assert!(Version::of(12).expect_err("too old").to_string().contains("PostgreSQL 12"));
    }
}
