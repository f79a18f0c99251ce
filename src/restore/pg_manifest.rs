//! `backup_manifest`: lets PostgreSQL's own `pg_verifybackup` check a restored directory (manual section 77).
//!
//! Checksums of files are joined from those of their regions, so nothing is read again: what the tool then reads on
//! disk must be what was read from the old server's disk.

use std::fmt::Write;
use std::path::Path;

use super::layout::Tablespaces;
use crate::disk;
use crate::error::Result;
use crate::model::Timestamp;
use crate::postgres::Version;
use crate::postgres::conf::AUTO_CONF;
use crate::repository::codec::Sha256;
use crate::repository::manifest::{BackupHead, FileEntry};

pub fn write(data_dir: &Path, backup: &BackupHead, files: &[FileEntry], tablespaces: &Tablespaces) -> Result<()> {
    let text = text(backup, files, tablespaces)?;
    disk::durable_write(&data_dir.join("backup_manifest"), text.as_bytes(), 0o600)
}

fn text(backup: &BackupHead, files: &[FileEntry], tablespaces: &Tablespaces) -> Result<String> {
    let version = Version::of(backup.pg_major)?.manifest_version;
    let mut text = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n");
    if version > 1 {
        let _ = writeln!(text, "\"System-Identifier\": {},", backup.system_id);
    }
    text.push_str("\"Files\": [");
    let made = [
        Some(("backup_label", backup.backup_label.clone())),
        tablespaces.map_file().map(|map| ("tablespace_map", map)),
    ];
    let made = made.into_iter().flatten().map(|(path, content)| {
        (path.to_owned(), content.len() as u64, backup.stopped_at, crc32c::crc32c(content.as_bytes()))
    });
    // The tool passes over postgresql.auto.conf, which a restore edits.
    let restored = files.iter().filter(|file| file.path != AUTO_CONF);
    let restored = restored
        .map(|file| (file.path.clone(), file.size, Timestamp::from_unix_micros(file.mtime * 1_000_000), file.crc32c()));
    for (number, (path, size, modified, crc)) in made.chain(restored).enumerate() {
        let separator = if number == 0 { "\n" } else { ",\n" };
        let path = serde_json::Value::String(path);
        let checksum: String = crc.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let _ = write!(
            text,
            "{separator}{{ \"Path\": {path}, \"Size\": {size}, \"Last-Modified\": \"{}\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{checksum}\" }}",
            modified.short().replace('Z', " GMT")
        );
    }
    let _ = write!(
        text,
        "\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": {}, \"Start-LSN\": \"{}\", \"End-LSN\": \"{}\" }}\n],\n",
        backup.timeline, backup.start_lsn, backup.stop_lsn
    );
    let checksum = Sha256::of(text.as_bytes());
    let _ = writeln!(text, "\"Manifest-Checksum\": \"{checksum}\"}}");
    Ok(text)
}
