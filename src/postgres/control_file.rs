//! `global/pg_control`: the server's own word on what a data directory is. Believed only when its CRC holds.
//!
//! Offsets follow `ControlFileData` (catalog/pg_control.h) on 64-bit little-endian machines.

use std::path::Path;

use super::version::Version;
use crate::error::{Error, IoContext, Result};
use crate::model::{Lsn, SystemId, Timeline};
use crate::wal::SegmentSize;

/// Bytes the server writes (`PG_CONTROL_FILE_SIZE`).
pub const CONTROL_FILE_SIZE: usize = 8192;
/// A running server may be writing it: what is met half written is read again (as `get_controlfile` does).
const READS: u32 = 10;
pub const CONTROL_FILE: &str = "global/pg_control";

/// `DBState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

/// What we read of the control file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlFile {
    pub system_id: SystemId,
    pub catalog_version: u32,
    pub state: State,
    pub checkpoint: Lsn,
    pub redo: Lsn,
    pub timeline: Timeline,
    pub min_recovery_point: Lsn,
    /// Zero when there is none.
    min_recovery_timeline: u32,
    /// Parameters that a server in recovery may not have lower than they were when the WAL was written.
    pub least: [(&'static str, u32); 5],
    pub segment_size: SegmentSize,
    pub data_checksums: bool,
}

impl ControlFile {
    pub fn read(data_dir: &Path, version: Version) -> Result<ControlFile> {
        let path = data_dir.join(CONTROL_FILE);
        let read = || ControlFile::parse(&std::fs::read(&path).on("read", &path)?, version);
        let again = (1..READS).map(|_| read()).find(Result::is_ok);
        again.unwrap_or_else(read).map_err(|e| e.context(path.display()))
    }

    /// The timeline the next start is on. Right after a promotion the last checkpoint is still of the one before.
    pub fn newest_timeline(&self) -> Timeline {
        Timeline(self.timeline.0.max(self.min_recovery_timeline))
    }

    /// How far a server in recovery has come at least: what is in its files is of no later WAL.
    pub fn recovered(&self) -> Option<(Timeline, Lsn)> {
        let there = self.min_recovery_timeline != 0 && self.min_recovery_point > Lsn(0);
        there.then_some((Timeline(self.min_recovery_timeline), self.min_recovery_point))
    }

    pub fn is_in_recovery(&self) -> bool {
        matches!(self.state, State::InArchiveRecovery | State::ShutDownInRecovery)
    }

    pub fn parse(bytes: &[u8], version: Version) -> Result<ControlFile> {
        let crc_at = version.control_crc_at;
        if bytes.len() < crc_at + 4 {
            return Err(Error::damaged(format!("the control file is only {} bytes long", bytes.len())));
        }
        let u32_at = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let u64_at = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        if crc32c::crc32c(&bytes[..crc_at]) != u32_at(crc_at) {
            return Err(Error::damaged("the checksum of the control file does not hold"));
        }
        if u32_at(8) != version.control_version {
            return Err(Error::damaged(format!(
                "the control file is of version {}, PostgreSQL {} writes {}",
                u32_at(8),
                version.major,
                version.control_version
            )));
        }
        if u32_at(216) != 8192 {
            return Err(Error::refused(format!("a block size of {} bytes is not supported, only 8192", u32_at(216))));
        }
        let state = match u32_at(16) {
            1 => State::ShutDown,
            2 => State::ShutDownInRecovery,
            3 => State::ShuttingDown,
            4 => State::InCrashRecovery,
            5 => State::InArchiveRecovery,
            6 => State::InProduction,
            _ => State::StartingUp,
        };
        Ok(ControlFile {
            system_id: SystemId(u64_at(0)),
            catalog_version: u32_at(12),
            state,
            checkpoint: Lsn(u64_at(32)),
            redo: Lsn(u64_at(40)),
            timeline: Timeline(u32_at(48)),
            min_recovery_point: Lsn(u64_at(136)),
            min_recovery_timeline: u32_at(144),
            least: [
                ("max_connections", u32_at(180)),
                ("max_worker_processes", u32_at(184)),
                ("max_wal_senders", u32_at(188)),
                ("max_prepared_transactions", u32_at(192)),
                ("max_locks_per_transaction", u32_at(196)),
            ],
            segment_size: SegmentSize::try_from(u64::from(u32_at(228)))
                .map_err(|e| Error::damaged(format!("the control file: {e}")))?,
            data_checksums: u32_at(252) != 0,
        })
    }
}
