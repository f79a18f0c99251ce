//! What every story needs: a scratch directory, a bucket of its own, machines that run `perennial`, and their servers.
//!
//! Hermetic: servers listen on a socket in the scratch directory and nowhere else, buckets are prefixes nobody else has,
//! and dropping a machine kills it with everything it started. Started as root, servers and `perennial` run as user
//! `postgres`, as they would in life.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod chance;
pub mod clients;
pub mod relay;

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// No step of a story takes longer than this on the slowest machine we know.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// User and group that servers run as: `postgres` when we are root, ourselves otherwise.
fn server_user() -> Option<(u32, u32)> {
    static USER: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    *USER.get_or_init(|| {
        let root = nix::unistd::geteuid().is_root();
        let user = nix::unistd::User::from_name("postgres").ok().flatten();
        let user = if root { Some(user.expect("root needs a user postgres to run servers as")) } else { None };
        user.map(|user| (user.uid.as_raw(), user.gid.as_raw()))
    })
}

/// Makes a command run as the user of the servers.
pub fn as_server_user(command: &mut Command) -> &mut Command {
    if let Some((uid, gid)) = server_user() {
        command.uid(uid).gid(gid);
    }
    command
}

/// The program under test, where the servers' user can execute it.
pub fn perennial() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROGRAM.get_or_init(|| {
        let directory = tempfile::Builder::new().prefix("pt-bin").tempdir_in("/tmp").expect("a directory");
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).expect("readable");
        let path = directory.path().join("perennial");
        std::fs::copy(env!("CARGO_BIN_EXE_perennial"), &path).expect("copied");
        (directory, path)
    });
    path
}

/// A directory of the servers' user that goes with the story.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        // Short, because the path of a socket must fit into 107 bytes.
        let directory = tempfile::Builder::new().prefix("pt-").tempdir_in("/tmp").expect("a directory");
        give(directory.path());
        Scratch(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A new directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(&path).expect("made");
        give(&path);
        path
    }
}

/// Gives a path to the servers' user.
pub fn give(path: &Path) {
    if let Some((uid, gid)) = server_user() {
        chown(path, Some(uid), Some(gid)).expect("given");
    }
}

/// Where a story's repository is, and what a program needs to reach it.
#[derive(Clone)]
pub struct Bucket {
    pub url: String,
    pub env: Vec<(String, String)>,
}

impl Bucket {
    pub fn directory(scratch: &Scratch) -> Bucket {
        Bucket { url: format!("file://{}", scratch.dir("bucket").display()), env: Vec::new() }
    }

    /// A prefix of its own on the run's S3 server.
    pub fn s3() -> Bucket {
        Bucket::at_endpoint(&from_run("PERENNIAL_TEST_S3"), &format!("s3://perennial-test/{}", unique()))
    }

    /// A prefix of a bucket whose objects can be locked.
    pub fn lockable() -> Bucket {
        Bucket::at_endpoint(&from_run("PERENNIAL_TEST_S3"), &format!("s3://perennial-locked/{}", unique()))
    }

    /// The same over TLS, with the run's own certificate authority.
    pub fn s3_tls() -> Bucket {
        let mut bucket =
            Bucket::at_endpoint(&from_run("PERENNIAL_TEST_S3_TLS"), &format!("s3://perennial-test/{}", unique()));
        bucket.env.push(("AWS_CA_BUNDLE".to_owned(), from_run("PERENNIAL_TEST_CA")));
        bucket
    }

    /// A prefix of its own on the run's Azure emulator, whose account and key are public knowledge.
    pub fn azure() -> Bucket {
        let key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
        let pairs = [
            ("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1"),
            ("AZURE_STORAGE_ACCOUNT_KEY", key),
            ("AZURE_STORAGE_ENDPOINT", &from_run("PERENNIAL_TEST_AZURE")),
        ];
        let env = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        Bucket { url: format!("az://perennial-test/{}", unique()), env }
    }

    pub fn at_endpoint(endpoint: &str, url: &str) -> Bucket {
        let pairs = [
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "perennial"),
            ("AWS_SECRET_ACCESS_KEY", "perennial-secret"),
            ("AWS_REGION", "us-east-1"),
        ];
        Bucket { url: url.to_owned(), env: pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec() }
    }

    pub fn with_env(mut self, name: &str, value: &str) -> Bucket {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The directory of a `file://` repository.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(self.url.strip_prefix("file://").expect("a file repository"))
    }

    /// A command line of `perennial` against this repository.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(perennial());
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("PERENNIAL_REPO", &self.url);
        command.envs(self.env.iter().map(|(name, value)| (name, value))).current_dir("/").stdin(Stdio::null());
        as_server_user(&mut command);
        command
    }

    /// Runs a command that must succeed; its stdout.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("runs");
        assert!(output.status.success(), "perennial {arguments:?} failed: {}", text(&output));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that must fail with `code`; its stderr.
    pub fn must_fail(&self, arguments: &[&str], code: i32) -> String {
        let output = self.command(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(code), "perennial {arguments:?}: {}", text(&output));
        String::from_utf8(output.stderr).expect("text")
    }

    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.must(&[arguments, &["--json"]].concat());
        serde_json::from_str(&output).expect("JSON")
    }
}

/// What the test run hands to its tests.
pub fn from_run(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run the tests with `make test` or `scripts/test`"))
}

fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What `curl` says to a request that it signs; a status and headers.
pub fn signed(method: &str, url: &str) -> String {
    let of =
        ["-s", "-i", "--max-time", "30", "--user", "perennial:perennial-secret", "--aws-sigv4", "aws:amz:us-east-1:s3"];
    let mut curl = Command::new("curl");
    curl.args(of).args(if method == "HEAD" { vec!["-I"] } else { vec!["-X", method] });
    let said = curl.arg(url).output().expect("curl");
    String::from_utf8_lossy(&said.stdout).to_lowercase()
}

/// A PostgreSQL installation.
#[derive(Clone)]
pub struct Postgres {
    pub major: u32,
    pub bin_dir: PathBuf,
}

impl Postgres {
    /// Debian's, with all its programs.
    pub fn debian() -> Postgres {
        let bin_dir = PathBuf::from("/usr/lib/postgresql/15/bin");
        assert!(bin_dir.join("postgres").is_file(), "PostgreSQL 15 is missing: run `scripts/setup test`");
        Postgres { major: 15, bin_dir }
    }

    /// Another major, with `initdb`, `pg_ctl` and `postgres` only.
    pub fn major(major: u32) -> Postgres {
        if major == 15 {
            return Postgres::debian();
        }
        let bin_dir = PathBuf::from(from_run("PERENNIAL_TEST_SERVERS")).join(major.to_string()).join("bin");
        assert!(bin_dir.join("postgres").is_file(), "PostgreSQL {major} is missing: run `scripts/setup test`");
        Postgres { major, bin_dir }
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// Debian's programs speak to servers of every major.
    pub fn client(name: &str) -> PathBuf {
        Postgres::debian().program(name)
    }
}

/// A machine: a directory that is its disk, and `perennial run` on it.
pub struct Machine {
    pub name: String,
    pub home: PathBuf,
    pub bucket: Bucket,
    pub postgres: Postgres,
    child: Option<Child>,
}

impl Machine {
    pub fn new(scratch: &Scratch, name: &str, bucket: &Bucket) -> Machine {
        Machine::with(scratch, name, bucket, Postgres::debian())
    }

    pub fn with(scratch: &Scratch, name: &str, bucket: &Bucket, postgres: Postgres) -> Machine {
        Machine { name: name.to_owned(), home: scratch.dir(name), bucket: bucket.clone(), postgres, child: None }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    /// Makes a cluster that Perennial knows nothing of.
    pub fn initdb(&self) {
        let mut initdb = Command::new(self.postgres.program("initdb"));
        let output = as_server_user(initdb.arg("-D").arg(self.data_dir()).current_dir("/")).output().expect("runs");
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Starts `perennial run` with more arguments, and options for postgres after `--`.
    pub fn start(&mut self, arguments: &[&str]) -> &mut Machine {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let (ours, theirs) = match arguments.iter().position(|argument| *argument == "--") {
            Some(at) => (&arguments[..at], &arguments[at + 1..]),
            None => (arguments, &[][..]),
        };
        // Servers whose supervisor is killed come to us, and are reaped.
        rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).expect("set");
        let log = std::fs::File::create(self.log_path()).expect("a log");
        let mut command = self.bucket.command(&["run", "-D"]);
        command.arg(self.data_dir()).arg("--pg-bindir").arg(&self.postgres.bin_dir).arg("--verbose");
        if !ours.iter().any(|argument| argument.starts_with("--takeover-after")) {
            // A story says itself when a machine is to wait for another.
            command.arg("--takeover-after=0");
        }
        command.args(ours).arg("--");
        command.args(["-c", "listen_addresses=", "-c", "fsync=off", "-k"]).arg(&self.home).args(theirs);
        command.stdout(log.try_clone().expect("shared")).stderr(log);
        self.child = Some(command.spawn().expect("started"));
        self
    }

    /// Starts the server itself, as something else would; `perennial agent` comes beside it.
    pub fn serve(&mut self, options: &[&str]) -> &mut Machine {
        rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).expect("set");
        let log = std::fs::File::options().create(true).append(true).open(self.home.join("server.log")).expect("a log");
        let mut command = Command::new(self.postgres.program("postgres"));
        command.arg("-D").arg(self.data_dir()).args(["-c", "fsync=off", "-k"]).arg(&self.home);
        if !options.iter().any(|option| option.starts_with("listen_addresses")) {
            command.args(["-c", "listen_addresses="]);
        }
        command.args(options).env_clear().env("PATH", "/usr/bin:/bin");
        command.envs(self.bucket.env.iter().map(|(name, value)| (name, value)));
        command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone().expect("shared")).stderr(log);
        // It is reaped by `kill`, as a process whose parent has gone.
        drop(as_server_user(&mut command).spawn().expect("started"));
        wait_until("the server is up", || self.try_sql("SELECT 1").is_ok());
        self
    }

    /// Starts `perennial agent` for the server.
    pub fn attend(&mut self, arguments: &[&str]) -> &mut Machine {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = std::fs::File::create(self.log_path()).expect("a log");
        let mut command = self.bucket.command(&["agent", "--verbose", "-D"]);
        command.arg(self.data_dir()).args(arguments).stdout(log.try_clone().expect("shared")).stderr(log);
        self.child = Some(command.spawn().expect("started"));
        self
    }

    /// The server alone ends: SIGINT is its fast stop, SIGKILL its death.
    pub fn server_ends(&mut self, signal: nix::sys::signal::Signal) -> &mut Machine {
        let pid = nix::unistd::Pid::from_raw(self.postmaster().expect("it runs"));
        nix::sys::signal::kill(pid, signal).expect("signalled");
        wait_until("the server has ended", || has_ended(pid));
        self
    }

    fn log_path(&self) -> PathBuf {
        self.home.join("log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Waits until the log says `words`.
    pub fn wait_for(&mut self, words: &str) -> &mut Machine {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(words) {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("waited"));
            assert!(ended.is_none(), "{} ended ({ended:?}) before it said '{words}':\n{}", self.name, self.log());
            assert!(Instant::now() < deadline, "{} never said '{words}':\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self
    }

    pub fn ready(&mut self) -> &mut Machine {
        self.wait_for("info: ready: port")
    }

    pub fn with_backup(&mut self) -> &mut Machine {
        self.wait_for("is restorable")
    }

    /// Waits for the end of `perennial run`; its exit code.
    pub fn ended(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        let child = self.child.as_mut().expect("it was started");
        let status = loop {
            if let Some(status) = child.try_wait().expect("waited") {
                break status;
            }
            assert!(Instant::now() < deadline, "{} does not end:\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(20));
        };
        self.child = None;
        status.code().unwrap_or(-1)
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let child = self.child.as_ref().expect("it runs");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).expect("signalled");
    }

    /// The process number of `perennial run`.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// To `perennial`, the postmaster and every process of the server.
    pub fn signal_all(&self, signal: nix::sys::signal::Signal) {
        self.signal(signal);
        let postmaster = self.postmaster().expect("it runs");
        for entry in std::fs::read_dir("/proc").expect("listed").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent =
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
            if pid == postmaster || parent == Some(postmaster) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
            }
        }
    }

    /// SIGTERM, and the end with `code`.
    pub fn stop(&mut self) -> i32 {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.ended()
    }

    /// kill -9 of everything: supervisor, postmaster, and with it its processes.
    pub fn kill(&mut self) {
        let postmaster = self.postmaster();
        if let Some(child) = self.child.as_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(pid) = postmaster {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            wait_until("the server is dead", || has_ended(pid));
        }
        self.child = None;
    }

    pub fn postmaster(&self) -> Option<i32> {
        let file = std::fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        file.lines().next()?.trim().parse().ok()
    }

    /// The disk is gone.
    pub fn wipe(&mut self) {
        let data_dir = self.data_dir();
        wait_until("the disk is wiped", || std::fs::remove_dir_all(&data_dir).is_ok() || !data_dir.exists());
    }

    pub fn vanish(&mut self) {
        self.kill();
        self.wipe();
    }

    /// One statement; unaligned text.
    pub fn sql(&self, statement: &str) -> String {
        self.try_sql(statement).unwrap_or_else(|error| panic!("{}: {statement}: {error}\n{}", self.name, self.log()))
    }

    pub fn try_sql(&self, statement: &str) -> Result<String, String> {
        let output = self
            .client("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", statement])
            .output()
            .expect("psql runs");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// A client program connected to this machine's server.
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(Postgres::client(program));
        command.env("PGHOST", &self.home).env("PGUSER", server_user_name()).current_dir("/").stdin(Stdio::null());
        let file = std::fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
        command.env("PGPORT", file.lines().nth(3).unwrap_or("5432"));
        as_server_user(&mut command);
        command
    }

    /// Waits until everything written so far is in the repository.
    pub fn archived(&self) {
        let end = self.sql("SELECT pg_current_wal_flush_lsn()");
        let durable =
            format!("SELECT flush_lsn >= '{end}' FROM pg_stat_replication WHERE application_name = 'perennial'");
        wait_until(&format!("WAL up to {end} is durable"), || self.sql(&durable) == "t");
    }

    /// Ends the segment and waits until it is an object of its own; its name.
    pub fn segment_stored(&self) -> String {
        self.sql("CREATE TABLE IF NOT EXISTS something (id int); INSERT INTO something VALUES (1)");
        let name = self.sql("SELECT pg_walfile_name(pg_switch_wal())");
        wait_until(&format!("{name} is stored"), || self.log().contains(&format!("pushed {name}")));
        name
    }

    /// The same for a server that stores its segments by `archive_command`.
    pub fn archived_by_command(&self) {
        let written = self.sql("SELECT pg_walfile_name(pg_switch_wal())");
        // Not the last one archived: after a promotion older segments may follow later.
        let waits = format!("SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name = '{written}.ready'");
        wait_until(&format!("{written} is archived"), || self.sql(&waits) == "0");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log() + &std::fs::read_to_string(self.home.join("server.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!(
                "--- the end of machine {}'s log\n{}",
                self.name,
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
    }
}

/// Reaps the process if it has come to us, as an init process would.
fn has_ended(pid: nix::unistd::Pid) -> bool {
    let _ = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
    nix::sys::signal::kill(pid, None) == Err(nix::errno::Errno::ESRCH)
}

pub fn server_user_name() -> String {
    let uid = server_user().map_or(nix::unistd::geteuid().as_raw(), |(uid, _)| uid);
    nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten().expect("a user").name
}

/// All files below a directory, in order.
pub fn all_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.expect("listed").path();
        if path.is_dir() { files.extend(all_files(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// Looks until `done` says so; a story that never gets there fails with `what`.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A plain server on a restored directory, without Perennial around it.
pub struct Plain {
    pub machine: Machine,
}

impl Plain {
    pub fn start(scratch: &Scratch, name: &str, bucket: &Bucket, postgres: &Postgres) -> Plain {
        let mut machine = Machine::with(scratch, name, bucket, postgres.clone());
        let log = std::fs::File::create(machine.log_path()).expect("a log");
        let mut command = Command::new(postgres.program("postgres"));
        command
            .arg("-D")
            .arg(machine.data_dir())
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_prepared_transactions=5", "-k"])
            .arg(&machine.home);
        command.env_clear().env("PATH", "/usr/bin:/bin").envs(bucket.env.iter().map(|(name, value)| (name, value)));
        command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone().expect("shared")).stderr(log);
        as_server_user(&mut command);
        machine.child = Some(command.spawn().expect("started"));
        Plain { machine }
    }

    /// Waits until it accepts connections and has left recovery (or stays in it, when `paused`).
    pub fn up(mut self, paused: bool) -> Plain {
        wait_until("the plain server is up", || {
            let ended = self.machine.child.as_mut().and_then(|child| child.try_wait().expect("waited"));
            assert!(ended.is_none(), "it ended ({ended:?}):\n{}", self.machine.log());
            let recovering = self.machine.try_sql("SELECT pg_is_in_recovery()");
            recovering.is_ok_and(|recovering| paused || recovering == "f")
        });
        self
    }
}

/// An HTTP server with answers of our own: a store in trouble, or a service that hands out addresses and credentials.
pub struct Answering {
    pub endpoint: String,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    address: std::net::SocketAddr,
}

impl Answering {
    /// Every request gets the same answer.
    pub fn start(status: &'static str, body: &str) -> Answering {
        let body = body.to_owned();
        Answering::with(move |_| (status, body.clone()))
    }

    /// `answer` is given the request line and headers.
    pub fn with(answer: impl Fn(&str) -> (&'static str, String) + Send + 'static) -> Answering {
        Answering::serve("http", move |stream| talk(stream, &answer))
    }

    /// The same over TLS, with a certificate of the run's authority.
    pub fn with_tls(answer: impl Fn(&str) -> (&'static str, String) + Send + 'static) -> Answering {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
        let certificates = CertificateDer::pem_file_iter(from_run("PERENNIAL_TEST_CERT")).expect("a file");
        let key = PrivateKeyDer::from_pem_file(from_run("PERENNIAL_TEST_KEY")).expect("a key");
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(certificates.map(|one| one.expect("a certificate")).collect(), key)
            .expect("a pair");
        let config = std::sync::Arc::new(config);
        Answering::serve("https", move |stream| {
            let session = rustls::ServerConnection::new(std::sync::Arc::clone(&config)).expect("a session");
            talk(rustls::StreamOwned::new(session, stream), &answer);
        })
    }

    fn serve(scheme: &str, each: impl Fn(std::net::TcpStream) + Send + 'static) -> Answering {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                each(stream);
            }
        });
        Answering { endpoint: format!("{scheme}://{address}"), stop, address }
    }
}

/// One request and its answer.
fn talk(stream: impl std::io::Read + std::io::Write, answer: &impl Fn(&str) -> (&'static str, String)) {
    use std::io::{BufRead, BufReader, Read};
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while reader.read_line(&mut head).is_ok_and(|read| read > 2) {}
    let length = head
        .to_ascii_lowercase()
        .lines()
        .find_map(|line| line.strip_prefix("content-length:").and_then(|value| value.trim().parse().ok()));
    let _ = reader.by_ref().take(length.unwrap_or(0)).read_to_end(&mut Vec::new());
    let (status, body) = answer(&head);
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    let _ = reader.get_mut().write_all(answer.as_bytes());
    let _ = reader.get_mut().flush();
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(self.address);
    }
}
