//! Write-ahead log as bytes and names: pure functions from bytes to facts.
//!
//! Follows PostgreSQL's access/xlog_internal.h, access/xlogrecord.h, xlogreader.c and timeline.c. Nothing here reads a
//! file, a clock or a server; a segment that is not what it should be becomes an error value that names the position.

mod history;
mod name;
mod scan;

pub use history::{History, Switch};
pub use name::{SegmentName, SegmentSize, WalFileName};
pub use scan::{RestorePoint, SegmentFacts, SegmentHeader, find_transaction_end, record_end, scan_part, scan_segment};
