//! The server's life under our care: start, watch, back up, stop, and bring the last WAL in.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Options, schedule, server};
use crate::archive::push::Pusher;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::postgres::process::Stop;
use crate::postgres::{ControlFile, Install, Postmaster, version_of};

/// How often the archive's lag is looked at, and the least age of a waiting segment that is worth a warning.
const WATCH: Duration = Duration::from_secs(10);
const LAG_LEAST: Duration = Duration::from_secs(60);

pub(super) async fn supervise(options: &Options, pusher: &Pusher, events: &Events) -> Result<i32> {
    let version = version_of(&options.data_dir)?;
    let install = Install::find(options.pg_bindir.as_deref(), options.search_path.as_deref(), Some(version.major))?;
    let command = server::command(options, &install)?;
    let mut signals = Signals::new()?;
    events.emit(Event::ServerStarting {
        command: format!("{} -D {}", command.program.display(), options.data_dir.display()),
    });
    let mut server = Postmaster::start(&command)?;
    let running = server.clone();
    let care = care(options, pusher, &running, events);
    let status = {
        tokio::pin!(care);
        let mut caring = true;
        let mut stopping = false;
        loop {
            tokio::select! {
                status = server.wait() => break status,
                outcome = &mut care, if caring => {
                    caring = false;
                    if let Err(error) = outcome {
                        events.emit(Event::Stopping { why: error.to_string() });
                        stopping = true;
                        server.stop(Stop::Fast);
                    }
                }
                what = signals.next() => match what {
                    Asked::Reload => server.reload(),
                    Asked::Stop(name) => {
                        let how = if stopping { Stop::Immediate } else { Stop::Fast };
                        events.emit(Event::Stopping { why: format!("{name} received, {how:?} stop").to_lowercase() });
                        // The backup in progress holds a session that a fast stop would end anyway.
                        caring = false;
                        stopping = true;
                        server.stop(how);
                    }
                },
            }
        }
    };
    events.emit(Event::ServerStopped { status: status.to_string() });
    bring_in_the_rest(options, pusher, events).await;
    Ok(exit_code(status))
}

/// What is done for a running server; ends only with an error.
async fn care(options: &Options, pusher: &Pusher, running: &Postmaster, events: &Events) -> Result<()> {
    let clock = pusher.repository.clock();
    let began = clock.monotonic();
    let recovering = server::is_recovering(&options.data_dir);
    let Some(up) = server::wait_until_ready(running, &options.data_dir, clock).await? else { return Ok(()) };
    if recovering {
        let control = ControlFile::read(&options.data_dir, version_of(&options.data_dir)?)?;
        events.emit(Event::RecoveryDone { timeline: control.timeline, elapsed: clock.monotonic() - began });
    }
    // After a crash recovery the checkpointer does not look at archive_timeout until something wakes it.
    running.reload();
    events.emit(Event::Ready { port: up.port, generation: pusher.writer.claim.generation });
    tokio::join!(schedule::backups(options, pusher, events), watch_archive(options, pusher, events));
    Ok(())
}

/// Tells when segments wait too long for the archiver.
async fn watch_archive(options: &Options, pusher: &Pusher, events: &Events) {
    let clock = pusher.repository.clock();
    let limit = (options.rpo * 3).max(LAG_LEAST);
    let mut told = clock.monotonic();
    loop {
        clock.sleep(WATCH).await;
        let ready = ready_files(&options.data_dir).unwrap_or_else(|error| {
            events.warning(format!("how far archiving lags cannot be told: {error}"));
            Vec::new()
        });
        let oldest = ready.into_iter().map(|(_, at)| at).min();
        let now = Duration::from_micros(clock.now().unix_micros().max(0) as u64);
        let waited =
            oldest.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|at| now.saturating_sub(at));
        if let Some(behind) = waited.filter(|waited| *waited > limit && clock.monotonic() - told > limit) {
            told = clock.monotonic();
            events.emit(Event::ArchiveLags { behind });
        }
    }
}

/// WAL files that PostgreSQL has marked for archiving, oldest first, histories before segments.
fn ready_files(data_dir: &Path) -> Result<Vec<(String, SystemTime)>> {
    let directory = data_dir.join("pg_wal/archive_status");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&directory).on("list directory", &directory)? {
        let entry = entry.on("list directory", &directory)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".ready") {
            let at = entry.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            files.push((name.to_owned(), at));
        }
    }
    files.sort_by_key(|(name, _)| (!name.ends_with(".history"), name.clone()));
    Ok(files)
}

/// The server is down: whatever it has not archived itself goes now. Its own next start finds the same bytes there.
async fn bring_in_the_rest(options: &Options, pusher: &Pusher, events: &Events) {
    let left = match ready_files(&options.data_dir) {
        Ok(left) => left,
        Err(error) => return events.warning(error.to_string()),
    };
    for (done, (name, _)) in left.iter().enumerate() {
        let path = options.data_dir.join("pg_wal").join(name);
        if !path.is_file() {
            continue;
        }
        if let Err(error) = pusher.push(&path).await {
            let segments = (left.len() - done) as u64;
            return events.emit(Event::WalLeftBehind { segments, error: error.to_string() });
        }
    }
}

/// The server's own code; 128 and the signal's number when a signal ended it, as a shell would say.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

enum Asked {
    Stop(&'static str),
    Reload,
}

struct Signals {
    term: Signal,
    int: Signal,
    quit: Signal,
    hup: Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        let listen = |kind| signal(kind).map_err(|e| Error::local("could not listen for signals", e));
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            int: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            hup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.term.recv() => Asked::Stop("SIGTERM"),
            _ = self.int.recv() => Asked::Stop("SIGINT"),
            _ = self.quit.recv() => Asked::Stop("SIGQUIT"),
            _ = self.hup.recv() => Asked::Reload,
        }
    }
}
