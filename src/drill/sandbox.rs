//! A directory and a server that nothing else knows of.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock::Clock;
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events, Level};
use crate::model::Lsn;
use crate::postgres::data_dir;
use crate::postgres::process::{ServerCommand, Stop};
use crate::postgres::{Client, ConnectOptions, ControlFile, Install, Postmaster};
use crate::repository::DrillRecord;

use super::Options;

/// The server's last lines are kept for the message of a failure.
const LINES: usize = 20;

/// What makes the copy deaf and dumb: whatever its own configuration says.
const ALONE: &[&str] = &[
    "listen_addresses=",
    "archive_mode=off",
    "synchronous_standby_names=",
    "primary_conninfo=",
    "primary_slot_name=",
    "recovery_end_command=",
    "archive_cleanup_command=",
    // A subscription would take rows from its publisher that the living subscriber then misses.
    "max_logical_replication_workers=0",
    "hot_standby=off",
    "autovacuum=off",
    "logging_collector=off",
    "log_destination=stderr",
    "lc_messages=C",
    "ssl=off",
    "fsync=off",
    "jit=off",
];

/// Removed when it goes, unless it is to be kept.
pub struct Sandbox {
    path: PathBuf,
    keep: bool,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

impl Sandbox {
    /// A new directory of its own in `within`.
    pub fn new(within: &Path, keep: bool, clock: &Clock) -> Result<Sandbox> {
        disk::create_dir(within, 0o700)?;
        let within = std::fs::canonicalize(within).on("resolve", within)?;
        let path = within.join(format!("perennial-drill-{:08x}", u32::from_le_bytes(clock.random())));
        std::fs::DirBuilder::new().mode(0o700).create(&path).on("create directory", &path)?;
        let sandbox = Sandbox { path, keep };
        for name in ["data", "socket"] {
            disk::create_dir(&sandbox.path.join(name), 0o700)?;
        }
        let socket = sandbox.path.join("socket/.s.PGSQL.5432.lock");
        // `sun_path` of sockaddr_un holds 108 bytes, one of them zero.
        if socket.as_os_str().len() > 107 {
            return Err(Error::refused(format!("{} is too long a path for a server's socket", within.display()))
                .hint("name a directory with a shorter path with --in"));
        }
        Ok(sandbox)
    }

    pub fn directory(&self) -> &Path {
        &self.path
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path.join("data")
    }

    pub fn tablespace(&self, oid: u32) -> PathBuf {
        self.path.join(format!("tablespace-{oid}"))
    }

    fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }

    /// Removes it now; seconds for a large one, on a thread of its own.
    pub async fn remove(mut self) -> Result<()> {
        self.keep = true;
        let path = self.path.clone();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(&path).on("remove", &path)).await;
        removed.map_err(|e| Error::internal("a removing thread ended").source(e))?
    }

    pub fn start(&self, install: &Install, options: &Options, events: &Events) -> Result<Server> {
        let hba = self.path.join("pg_hba.conf");
        // Nobody else can enter the socket's directory.
        disk::durable_write(&hba, b"local all all trust\n", 0o600)?;
        let data_dir = self.data_dir();
        let mut settings: Vec<String> = ALONE.iter().map(|setting| (*setting).to_owned()).collect();
        settings.push(format!("hba_file={}", hba.display()));
        settings.push(format!("unix_socket_directories={}", self.socket().display()));
        settings.push("port=5432".to_owned());
        // Files of the living server, wherever its configuration says they are.
        settings.push(format!("data_directory={}", data_dir.display()));
        settings.push(format!("external_pid_file={}", self.path.join("pid").display()));
        if install.version.has_statistics_files {
            settings.push("stats_temp_directory=pg_stat_tmp".to_owned());
        }
        if !options.preload {
            settings.extend(
                ["shared_preload_libraries=", "local_preload_libraries=", "session_preload_libraries="]
                    .map(str::to_owned),
            );
        }
        let mut arguments: Vec<OsString> = vec!["-D".into(), data_dir.clone().into()];
        for setting in settings {
            arguments.extend(["-c".into(), setting.into()]);
        }
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let (heard, events) = (Arc::clone(&lines), events.clone());
        let listener = Box::new(move |line: &str| {
            let mut lines = heard.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.len() >= LINES {
                lines.remove(0);
            }
            lines.push(line.to_owned());
            events.emit(Event::Note { level: Level::Detail, text: format!("sandbox: {line}") });
        });
        let command = ServerCommand { program: install.program("postgres"), arguments, directory: data_dir.clone() };
        let postmaster = Postmaster::start(&command, listener)?;
        let connect = ConnectOptions {
            host: Some(self.socket().to_string_lossy().into_owned()),
            port: Some(5432),
            user: options.user.clone(),
            sslmode: Some("disable".to_owned()),
            ..ConnectOptions::default()
        };
        Ok(Server { postmaster, data_dir, connect, lines })
    }
}

pub struct Server {
    postmaster: Postmaster,
    data_dir: PathBuf,
    connect: ConnectOptions,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Waits until it has recovered and takes connections.
    pub async fn until_up(&self, clock: &Clock) -> Result<()> {
        self.postmaster.until_ready(&self.data_dir, clock).await?.map(drop).ok_or_else(|| self.ended())
    }

    /// Its last words are the cause.
    fn ended(&self) -> Error {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = lines.iter().rev().find(|line| line.contains("perennial: "));
        let cause = ours.or_else(|| lines.iter().rev().find(|line| line.contains("FATAL") || line.contains("PANIC")));
        let cause = cause.or(lines.last()).cloned().unwrap_or_default();
        Error::damaged(format!("the restored server did not come up: {cause}"))
            .hint("`perennial verify --full` looks at everything a restore reads; --keep leaves the sandbox there")
    }

    pub async fn connect(&self, database: &str) -> Result<Client> {
        let connect = ConnectOptions { database: Some(database.to_owned()), ..self.connect.clone() };
        Client::connect(&connect, &self.data_dir).await
    }

    /// Where recovery ended: the new timeline's last switch.
    pub fn recovered_to(&self, install: &Install) -> Result<Lsn> {
        let timeline = ControlFile::read(&self.data_dir, install.version)?.newest_timeline();
        let history = data_dir::history_of(&self.data_dir, timeline)?;
        Ok(history.switches.last().map_or(Lsn(0), |switch| switch.at))
    }

    pub async fn stop(&mut self) {
        self.postmaster.stop(Stop::Fast);
        self.postmaster.wait().await;
    }

    /// Every page of the stopped copy, by PostgreSQL's own tool, where the cluster has checksums.
    pub async fn check_pages(&self, install: &Install, record: &mut DrillRecord) -> Result<()> {
        let program = install.program("pg_checksums");
        if !program.is_file() {
            record.left_out.push("pg_checksums is not installed".to_owned());
            return Ok(());
        }
        let output = tokio::process::Command::new(&program)
            .kill_on_drop(true)
            .arg("--check")
            .arg("-D")
            .arg(&self.data_dir)
            .env("LC_ALL", "C")
            .output()
            .await
            .on("run", &program)?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() {
            record.checked.push("every page, with pg_checksums".to_owned());
        } else if said.contains("not enabled") {
            record.left_out.push("the cluster has no checksums".to_owned());
        } else {
            record.failures.push(format!("pg_checksums: {}", said.lines().next().unwrap_or_default()));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.postmaster.stop(Stop::Immediate);
    }
}
