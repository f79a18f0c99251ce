//! What a running supervisor knows of itself, for whoever asks: over HTTP, on a socket in the data directory, in a file.
//!
//! It folds what it is told and asks nobody: answering costs no request to the store and no query to the server.

mod web;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::Serialize;

use crate::clock::Clock;
use crate::model::{Generation, Lsn};

pub use web::{serve, serve_on_socket};

/// Where a supervised server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It recovers, or its log is not open yet: nobody can connect.
    #[default]
    Starting,
    Ready,
    Stopping,
}

/// How far WAL is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wal {
    /// Flushed on the server, received from it, durable in the repository.
    pub server: Lsn,
    pub received: Lsn,
    pub durable: Lsn,
    /// Since when (monotonic) the oldest byte waits that is not durable.
    pub waiting_since: Option<Duration>,
    pub connected: bool,
    /// Log entries written since the start.
    pub entries: u64,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    wal: Wal,
    /// Entries as they were at each of the last minutes.
    minutes: VecDeque<(Duration, u64)>,
    last_backup: Option<String>,
    generation: Generation,
    degraded: bool,
}

/// One supervisor's board; clones share it.
#[derive(Debug, Clone)]
pub struct Board {
    state: Arc<Mutex<State>>,
    clock: Clock,
    repository: String,
    rpo: Duration,
}

/// What is told; docs/reference/json.md.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub schema: &'static str,
    pub repository: String,
    pub generation: Generation,
    pub phase: Phase,
    pub rpo_seconds: f64,
    pub server_lsn: Lsn,
    pub received_lsn: Lsn,
    pub durable_lsn: Lsn,
    /// Bytes of WAL that would be lost with the machine now.
    pub bytes_behind: u64,
    /// Age of the oldest of them.
    pub seconds_behind: f64,
    pub streaming: bool,
    /// At an RPO of zero: whether commits wait for longer than they should.
    pub commits_wait: bool,
    /// At an RPO of zero: whether commits are acknowledged without being in the repository (`--on-bucket-loss degrade`).
    pub degraded: bool,
    pub entries_last_hour: u64,
    pub last_backup: Option<String>,
}

impl Board {
    pub fn new(clock: Clock, generation: Generation, repository: String, rpo: Duration) -> Board {
        let (phase, wal, minutes) = (Phase::Starting, Wal::default(), VecDeque::new());
        let state = State { phase, wal, minutes, last_backup: None, generation, degraded: false };
        Board { state: Arc::new(Mutex::new(state)), clock, repository, rpo }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn phase(&self, phase: Phase) {
        self.state().phase = phase;
    }

    pub fn generation(&self, generation: Generation) {
        self.state().generation = generation;
    }

    pub fn backup(&self, id: String) {
        self.state().last_backup = Some(id);
    }

    pub fn degraded(&self, degraded: bool) {
        self.state().degraded = degraded;
    }

    pub fn wal(&self, wal: Wal) {
        const MINUTE: Duration = Duration::from_secs(60);
        let now = self.clock.monotonic();
        let mut state = self.state();
        state.wal = wal;
        if state.minutes.back().is_none_or(|(at, _)| now.saturating_sub(*at) >= MINUTE) {
            state.minutes.push_back((now, wal.entries));
        }
        while state.minutes.len() > 1
            && state.minutes.front().is_some_and(|(at, _)| now.saturating_sub(*at) > 60 * MINUTE)
        {
            state.minutes.pop_front();
        }
    }

    pub fn report(&self) -> Report {
        let now = self.clock.monotonic();
        let state = self.state();
        let wal = state.wal;
        let waited = wal.waiting_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        Report {
            schema: "perennial/supervisor/1",
            repository: self.repository.clone(),
            generation: state.generation,
            phase: state.phase,
            rpo_seconds: self.rpo.as_secs_f64(),
            server_lsn: wal.server,
            received_lsn: wal.received,
            durable_lsn: wal.durable,
            bytes_behind: wal.server.bytes_since(wal.durable),
            seconds_behind: waited.as_secs_f64(),
            streaming: wal.connected,
            commits_wait: self.rpo.is_zero() && !state.degraded && waited > Duration::from_secs(2),
            degraded: state.degraded,
            entries_last_hour: wal.entries - state.minutes.front().map_or(0, |(_, entries)| *entries),
            last_backup: state.last_backup.clone(),
        }
    }

    /// Whether clients are served and their commits are as safe as was asked for.
    pub fn is_ready(&self) -> bool {
        let report = self.report();
        let bound = (self.rpo * 3).max(Duration::from_secs(10)).as_secs_f64();
        report.phase == Phase::Ready && report.streaming && report.seconds_behind < bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board(rpo: u64) -> Board {
        Board::new(Clock::system(), Generation(3), "s3://b/db".to_owned(), Duration::from_secs(rpo))
    }

    #[test]
    fn it_is_ready_only_while_clients_are_served_and_wal_is_not_behind() {
        let board = board(1);
        let wal = Wal { server: Lsn(100), received: Lsn(100), durable: Lsn(40), connected: true, ..Wal::default() };
        board.wal(wal);
        assert!(!board.is_ready(), "nobody can connect yet");
        board.phase(Phase::Ready);
        assert!(board.is_ready());
        assert_eq!(board.report().bytes_behind, 60);
        board.wal(Wal { connected: false, ..wal });
        assert!(!board.is_ready(), "nothing is brought in");
        board.wal(wal);
        board.phase(Phase::Stopping);
        assert!(!board.is_ready());
    }
}
