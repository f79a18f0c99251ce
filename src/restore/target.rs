//! Recovery targets, as the operator names them.

use std::fmt;

use crate::model::{Lsn, Timestamp};
use crate::postgres::data_dir::{RECOVERY_SIGNAL, STANDBY_SIGNAL};

/// Where recovery is to stop (manual section 20.5.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The end of WAL.
    Newest,
    /// The end of the WAL before a gap, when there is one.
    BeforeGap,
    /// As soon as the backup is consistent.
    Immediate,
    Time(Timestamp),
    Lsn(Lsn),
    Xid(u32),
    /// A restore point.
    Name(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Newest => f.write_str("the newest state"),
            Target::BeforeGap => f.write_str("the newest state before the gap"),
            Target::Immediate => f.write_str("the end of the backup"),
            Target::Time(time) => write!(f, "{time}"),
            Target::Lsn(lsn) => write!(f, "{lsn}"),
            Target::Xid(xid) => write!(f, "transaction {xid}"),
            Target::Name(name) => write!(f, "restore point '{name}'"),
        }
    }
}

/// What the server does once the target is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Pause,
    Promote,
    Shutdown,
    /// There is no end: it stays a standby, and follows the newest history as it grows.
    Follow,
}

impl Action {
    /// `recovery_target_action`.
    pub fn setting(self) -> Option<&'static str> {
        match self {
            Action::Pause => Some("pause"),
            Action::Promote => Some("promote"),
            Action::Shutdown => Some("shutdown"),
            Action::Follow => None,
        }
    }

    /// The file that makes the server recover (manual section 26.3.5).
    pub fn signal(self) -> &'static str {
        match self {
            Action::Follow => STANDBY_SIGNAL,
            _ => RECOVERY_SIGNAL,
        }
    }
}
