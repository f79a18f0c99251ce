//! The postmaster as our child: started, signalled, waited for; and what `postmaster.pid` says.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::watch;

use crate::clock::Clock;
use crate::disk;
use crate::error::{Error, Kind, Result};

/// How to stop a server (manual section 19.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Ends sessions, writes a shutdown checkpoint.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// What a server needs to be started.
#[derive(Debug, Clone)]
pub struct ServerCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub directory: PathBuf,
}

/// Who is given the lines that a server writes to its standard error, until its logging collector takes over.
pub type Listener = Box<dyn Fn(&str) + Send>;

/// How often the server's state is looked at while it starts. Its state file is a local read.
const LOOK: Duration = Duration::from_millis(50);

/// Looks for the end of a server's output once it has ended, 10 ms apart.
const LAST_LINES: u32 = 50;

fn listen(lines: std::process::ChildStderr, listener: &Listener) {
    use std::io::BufRead;
    for line in std::io::BufReader::new(lines).split(b'\n') {
        match line {
            Ok(line) => listener(&String::from_utf8_lossy(&line)),
            Err(_) => return,
        }
    }
}

/// A running child. Its end is seen however it comes.
#[derive(Debug, Clone)]
pub struct Postmaster {
    pid: nix::unistd::Pid,
    ended: watch::Receiver<Option<ExitStatus>>,
}

impl Postmaster {
    /// Starts the server in a process group of its own, so that a terminal's Ctrl-C reaches only us. Should we die
    /// without a word, the kernel sends it SIGQUIT: neither outlives the other.
    ///
    /// The kernel means the *thread* that started it; a thread of its own does that and lives as long as the server.
    pub fn start(command: &ServerCommand, listener: Listener) -> Result<Postmaster> {
        let (started, pid) = std::sync::mpsc::channel();
        let (end, ended) = watch::channel(None);
        let command = command.clone();
        let keeper = move || {
            let us = rustix::process::getpid();
            let mut child = Command::new(&command.program);
            child
                .args(&command.arguments)
                .current_dir(&command.directory)
                .process_group(0)
                .stdin(std::process::Stdio::null())
                .stderr(std::process::Stdio::piped());
            // SAFETY: between fork and exec only two system calls are made; neither allocates nor takes a lock.
            unsafe {
                child.pre_exec(move || {
                    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::QUIT))?;
                    // We may have died before the line above.
                    match rustix::process::getppid() {
                        Some(parent) if parent == us => Ok(()),
                        _ => Err(std::io::Error::other("the supervisor has gone")),
                    }
                });
            }
            match child.spawn() {
                Ok(mut child) => {
                    let _ = started.send(Ok(child.id()));
                    let lines = child.stderr.take().map(|lines| std::thread::spawn(move || listen(lines, &listener)));
                    let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(-1));
                    // Its last words come before its end. A process it left behind may keep the pipe open: not for ever.
                    for _ in 0..LAST_LINES {
                        if lines.as_ref().is_none_or(std::thread::JoinHandle::is_finished) {
                            break;
                        }
                        std::thread::park_timeout(std::time::Duration::from_millis(10));
                    }
                    let _ = end.send(Some(status));
                }
                Err(e) => {
                    let _ =
                        started.send(Err(Error::local(format!("could not start {}", command.program.display()), e)));
                }
            }
        };
        std::thread::Builder::new()
            .name("postmaster-keeper".to_owned())
            .spawn(keeper)
            .map_err(|e| Error::local("could not start a thread", e))?;
        let pid = pid.recv().map_err(|e| Error::internal("the keeper thread ended").source(e))??;
        Ok(Postmaster { pid: nix::unistd::Pid::from_raw(pid as i32), ended })
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub fn stop(&self, how: Stop) {
        self.signal(match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        });
    }

    pub fn reload(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// Sends a signal, unless the server has been waited for: its number may be somebody else's by then.
    fn signal(&self, signal: Signal) {
        if self.ended.borrow().is_none() {
            let _ = nix::sys::signal::kill(self.pid, signal);
        }
    }

    pub fn has_ended(&self) -> Option<ExitStatus> {
        *self.ended.borrow()
    }

    /// Waits until the server has recovered and accepts connections; `None` when it ended instead.
    pub async fn until_ready(&self, data_dir: &Path, clock: &Clock) -> Result<Option<PostmasterFile>> {
        loop {
            if self.has_ended().is_some() {
                return Ok(None);
            }
            let file = PostmasterFile::of_starting(data_dir)?.filter(|file| file.pid == self.pid());
            if let Some(file) = file.filter(|file| file.status == ServerStatus::Ready) {
                return Ok(Some(file));
            }
            clock.sleep(LOOK).await;
        }
    }

    pub async fn wait(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = *self.ended.borrow_and_update() {
                return status;
            }
            if self.ended.changed().await.is_err() {
                return ExitStatus::from_raw(-1);
            }
        }
    }
}

/// The last line of `postmaster.pid` (`PM_STATUS_*` in utils/pidfile.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStatus {
    Starting,
    Stopping,
    /// Accepts connections; in recovery, with `hot_standby` on, read-only ones.
    Ready,
    /// In recovery with `hot_standby` off: accepts none.
    Standby,
}

/// The content of `postmaster.pid`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostmasterFile {
    pub pid: i32,
    pub port: u16,
    pub socket_dir: Option<String>,
    pub listen_address: Option<String>,
    pub status: ServerStatus,
}

impl PostmasterFile {
    /// `None` when there is no such file: no server runs there. One without a pid says nothing and is an error: a server
    /// is writing it this moment, or a full disk left it so.
    pub fn read(data_dir: &Path) -> Result<Option<PostmasterFile>> {
        let path = data_dir.join("postmaster.pid");
        let Some(text) = disk::read_if_there(&path)? else { return Ok(None) };
        PostmasterFile::parse(&String::from_utf8_lossy(&text)).map(Some).ok_or_else(|| {
            let path = path.display();
            Error::refused(format!("{path} names no process: a server is starting there, or a full disk left it so"))
                .hint(format!("try again; if it stays like this and no server runs there, remove it (rm '{path}')"))
                .retryable()
        })
    }

    /// Of a server that is being started: its file may be half written for a moment.
    pub fn of_starting(data_dir: &Path) -> Result<Option<PostmasterFile>> {
        match PostmasterFile::read(data_dir) {
            Err(error) if error.kind() == Kind::Refused => Ok(None),
            read => read,
        }
    }

    fn parse(text: &str) -> Option<PostmasterFile> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let line = |index: usize| lines.get(index).copied().filter(|line| !line.is_empty());
        Some(PostmasterFile {
            pid: line(0)?.parse().ok()?,
            port: line(3).and_then(|port| port.parse().ok()).unwrap_or_default(),
            socket_dir: line(4).map(str::to_owned),
            listen_address: line(5)
                .map(|address| if address == "*" { "localhost".to_owned() } else { address.to_owned() }),
            status: match line(7) {
                Some("ready") => ServerStatus::Ready,
                Some("standby") => ServerStatus::Standby,
                Some("stopping") => ServerStatus::Stopping,
                _ => ServerStatus::Starting,
            },
        })
    }

    /// Where to connect: the socket directory, or the address when there is no socket.
    pub fn host(&self) -> String {
        self.socket_dir.clone().or_else(|| self.listen_address.clone()).unwrap_or_else(|| "localhost".to_owned())
    }

    /// Whether the process it names lives and is the server of that directory. After a restart of the machine or the
    /// container the number may be another process's, even our own; a server's working directory is its data directory.
    pub fn is_alive(&self, data_dir: &Path) -> bool {
        let lives = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), None).is_ok();
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", self.pid));
        // What cannot be told for certain counts as a server.
        let elsewhere = matches!((&cwd, std::fs::canonicalize(data_dir)), (Ok(cwd), Ok(dir)) if *cwd != dir);
        lives && !elsewhere
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_file_says_where_the_server_is_and_how_far() {
        let text = "4242\n/data\n1700000000\n5433\n/run/postgresql\n*\n  5433001 7\nready   \n";
        let file = PostmasterFile::parse(text).expect("whole");
        assert_eq!(
            (file.pid, file.port, file.host().as_str(), file.status),
            (4242, 5433, "/run/postgresql", ServerStatus::Ready)
        );
        let early = PostmasterFile::parse("4242\n/data\n").expect("a pid");
        assert_eq!(early.status, ServerStatus::Starting);
        assert_eq!(PostmasterFile::parse(""), None);
    }

    #[test]
    fn a_number_that_is_another_process_by_now_is_no_server() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("postmaster.pid");
        std::fs::write(&path, format!("{}\n", std::process::id())).expect("written");
        let ours = PostmasterFile::read(dir.path()).expect("read").expect("there");
        assert!(!ours.is_alive(dir.path()), "this test runs elsewhere");
        std::fs::write(&path, "").expect("written");
        assert_eq!(PostmasterFile::read(dir.path()).expect_err("says nothing").kind(), Kind::Refused);
        assert_eq!(PostmasterFile::of_starting(dir.path()).expect("in a moment"), None);
    }

    #[tokio::test]
    async fn a_child_ends_with_its_status_and_is_never_signalled_after() {
        let command = ServerCommand {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), "echo one >&2; echo two >&2; exit 3".into()],
            directory: "/".into(),
        };
        let (said, heard) = std::sync::mpsc::channel();
        let listener = Box::new(move |line: &str| said.send(line.to_owned()).expect("heard"));
        let mut child = Postmaster::start(&command, listener).expect("started");
        assert_eq!(child.wait().await.code(), Some(3));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["one", "two"], "its last words come before its end");
        child.stop(Stop::Immediate);
        assert_eq!(child.has_ended().and_then(|status| status.code()), Some(3));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let command =
            ServerCommand { program: "/no/such/postgres".into(), arguments: Vec::new(), directory: "/".into() };
        assert!(
            Postmaster::start(&command, Box::new(|_| ()))
                .expect_err("not there")
                .to_string()
                .contains("/no/such/postgres")
        );
    }
}
