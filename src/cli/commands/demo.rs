//! `perennial demo`: a database outlives its machine while you watch.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cli::setup::Setup;
use crate::cli::{args, environment, identity, output};
use crate::error::{Error, IoContext, Result};
use crate::postgres::{Client, ConnectOptions, PostmasterFile, ServerStatus};

use super::wide;

/// The story must not hang: a step that takes longer than this has failed.
const STEP: Duration = Duration::from_secs(60);

const ROWS: u32 = 100_000;

pub fn run(setup: &Setup, args: args::Demo) -> Result<i32> {
    let root = std::env::temp_dir().join(format!("perennial-demo-{}", std::process::id()));
    crate::disk::create_dir(&root, 0o755)?;
    let stage = Stage { program: stage_program(&root)?, root: root.clone(), pg_bindir: args.pg_bindir };
    identity::drop_root(&root)?;
    let outcome = wide(play(setup, &stage));
    if args.keep {
        output::line(format!("\nkept: {}", root.display()));
    } else {
        std::fs::remove_dir_all(&root).on("remove", &root)?;
        if outcome.is_ok() {
            output::line(format!("\nremoved {}; nothing is left behind", root.display()));
        }
    }
    outcome.map(|()| 0)
}

/// Where the story plays. Started as root, the program itself must lie where user postgres can execute it.
struct Stage {
    root: PathBuf,
    program: PathBuf,
    pg_bindir: Option<PathBuf>,
}

fn stage_program(root: &Path) -> Result<PathBuf> {
    let program = std::env::current_exe().on("find", "this program")?;
    if !nix::unistd::geteuid().is_root() {
        return Ok(program);
    }
    identity::give_away(root)?;
    let copy = root.join("perennial");
    std::fs::copy(&program, &copy).on("copy this program to", &copy)?;
    Ok(copy)
}

/// A machine of the story: a directory of its own, a socket of its own, and `perennial run`.
struct Machine<'a> {
    stage: &'a Stage,
    name: &'static str,
    child: Child,
    /// Then its server is for others only once the supervisor says so.
    supervised: bool,
}

impl Stage {
    fn repository(&self) -> String {
        format!("file://{}/bucket", self.root.display())
    }

    fn data_dir(&self, name: &str) -> PathBuf {
        self.root.join(name).join("data")
    }

    fn start(&self, name: &'static str, more: &[&str]) -> Result<Machine<'_>> {
        let home = self.root.join(name);
        crate::disk::create_dir(&home, 0o700)?;
        let log = home.join("log");
        let log = std::fs::File::create(&log).on("create", &log)?;
        let errors = log.try_clone().on("share", "the log")?;
        let data = self.data_dir(name);
        let child = self
            .command(&["run", &self.repository(), "-D"])
            .arg(&data)
            .args(more)
            .arg("--")
            .arg("-c")
            .arg("listen_addresses=")
            .arg("-k")
            .arg(&home)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn();
        Ok(Machine { stage: self, name, supervised: true, child: child.on("start", &self.program)? })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        command.args(
            self.pg_bindir
                .iter()
                .filter(|_| arguments.first() == Some(&"run"))
                .flat_map(|dir| ["--pg-bindir".as_ref(), dir.as_os_str()]),
        );
        command
    }
}

impl Machine<'_> {
    async fn sql(&self, setup: &Setup) -> Result<Client> {
        let data_dir = self.stage.data_dir(self.name);
        let deadline = setup.clock.monotonic() + STEP;
        while setup.clock.monotonic() < deadline {
            let ready = |file: &PostmasterFile| file.status == ServerStatus::Ready && file.is_alive(&data_dir);
            let up = PostmasterFile::of_starting(&data_dir)?.is_some_and(|file| ready(&file));
            if up && (!self.supervised || crate::run::ready_path(&data_dir).is_file()) {
                let connect = ConnectOptions { user: environment::connection().user, ..ConnectOptions::default() };
                let client = Client::connect(&connect, &data_dir).await?;
                if client.text("pg_is_in_recovery()").await? == "false" {
                    return Ok(client);
                }
            }
            setup.clock.sleep(Duration::from_millis(50)).await;
        }
        Err(self.failed("its server did not come up"))
    }

    fn failed(&self, why: &str) -> Error {
        let log = std::fs::read_to_string(self.stage.root.join(self.name).join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(15).collect();
        let end: Vec<&str> = lines.into_iter().rev().collect();
        Error::postgres(format!("machine {}: {why}; its log ends with:\n{}", self.name, end.join("\n")))
    }

    /// kill -9 of everything, and the disk is gone.
    fn vanish(mut self) -> Result<()> {
        let data_dir = self.stage.data_dir(self.name);
        let server = PostmasterFile::read(&data_dir)?;
        let kill =
            |pid: i32| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.kill();
        let _ = server.map(|server| kill(-server.pid).or_else(|_| kill(server.pid)));
        self.child.wait().on("wait for", &self.stage.program)?;
        std::fs::remove_dir_all(&data_dir).or_else(|_| std::fs::remove_dir_all(&data_dir)).on("remove", &data_dir)
    }

    fn stop(mut self) -> Result<()> {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.child.id() as i32),
            nix::sys::signal::Signal::SIGTERM,
        );
        self.child.wait().on("wait for", &self.stage.program).map(drop)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // A story that failed half-way leaves no server behind: it dies with its supervisor.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tell(text: &str) {
    output::line(text);
}

async fn play(setup: &Setup, stage: &Stage) -> Result<()> {
    tell("A database that outlives its machine.\n");
    tell(&format!("The bucket (a directory here, S3 in life):  {}\n", stage.repository()));
    tell("1. Machine A is born with nothing but the address:");
    tell(&format!("     $ perennial run {} -D DATA --init", stage.repository()));
    let a = stage.start("a", &["--init", "--rpo", "1s"])?;
    let sql = a.sql(setup).await?;
    wait_for_backup(setup, stage, &a).await?;
    tell("     PostgreSQL runs, its first base backup is in the bucket.");

    tell(&format!("2. An application writes {ROWS} rows ..."));
    sql.execute("CREATE TABLE note (id bigint PRIMARY KEY, text text, at timestamptz DEFAULT clock_timestamp())")
        .await?;
    sql.execute(&format!("INSERT INTO note SELECT n, 'note ' || n FROM generate_series(1, {ROWS}) n")).await?;
    setup.clock.sleep(Duration::from_millis(1100)).await;
    let moment = sql.now().await?;
    setup.clock.sleep(Duration::from_millis(1100)).await;
    tell("   ... and then somebody deletes half of them by mistake.");
    sql.execute("DELETE FROM note WHERE id % 2 = 0").await?;
    let count = sql.text("SELECT count(*) FROM note").await?;
    wait_for_archive(setup, &a, &sql).await?;
    drop(sql);

    tell("3. Machine A dies: kill -9, and its disk is wiped.");
    a.vanish()?;

    tell("4. Machine B starts. It knows the address, nothing else. (A is known to be dead; otherwise B would wait");
    tell("   until A has been silent for a minute.)");
    tell(&format!("     $ perennial run {} -D DATA --takeover-after 0", stage.repository()));
    let b = stage.start("b", &["--rpo", "1s", "--takeover-after", "0"])?;
    let sql = b.sql(setup).await?;
    let back = sql.text("SELECT count(*) FROM note").await?;
    drop(sql);
    tell(&format!("     {count} rows when A died, {back} rows on B: {}", verdict(&count, &back)));
    if count != back {
        return Err(b.failed("rows are missing"));
    }

    tell("5. And the rows deleted by mistake? A copy of the database as it was a moment before:");
    tell(&format!("     $ perennial restore --repo {} -D COPY --to-time '{moment}'", stage.repository()));
    let copy = past(setup, stage, &moment.to_string()).await?;
    tell(&format!(
        "     {ROWS} rows before the mistake, {copy} rows in the copy: {}",
        verdict(&ROWS.to_string(), &copy)
    ));
    b.stop()?;
    if copy != ROWS.to_string() {
        return Err(Error::postgres("rows are missing in the copy"));
    }
    tell("\nEvery row is back. The bucket was all that survived, and all that was needed.");
    Ok(())
}

fn verdict(expected: &str, found: &str) -> &'static str {
    if expected == found { "the same" } else { "NOT THE SAME" }
}

async fn wait_for_backup(setup: &Setup, stage: &Stage, machine: &Machine<'_>) -> Result<()> {
    let backups = stage.root.join("bucket/backups");
    let deadline = setup.clock.monotonic() + STEP;
    while setup.clock.monotonic() < deadline {
        let visible = std::fs::read_dir(&backups)
            .is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| e.path().join("manifest").is_file())));
        if visible {
            return Ok(());
        }
        setup.clock.sleep(Duration::from_millis(50)).await;
    }
    Err(machine.failed("its first backup did not become restorable"))
}

/// Waits until everything written so far is in the bucket, as `--rpo 1s` promises it soon is.
async fn wait_for_archive(setup: &Setup, machine: &Machine<'_>, sql: &Client) -> Result<()> {
    let written = sql.text("SELECT pg_current_wal_flush_lsn()").await?;
    let durable = format!(
        "SELECT coalesce(max(flush_lsn) >= '{written}', false) FROM pg_stat_replication WHERE application_name = 'perennial'"
    );
    let deadline = setup.clock.monotonic() + STEP;
    while setup.clock.monotonic() < deadline {
        if sql.text(&durable).await? == "true" {
            return Ok(());
        }
        setup.clock.sleep(Duration::from_millis(100)).await;
    }
    Err(machine.failed("its WAL did not reach the bucket"))
}

/// Restores a copy at `moment`, starts it, counts, stops it.
async fn past(setup: &Setup, stage: &Stage, moment: &str) -> Result<String> {
    let data = stage.data_dir("copy");
    let restore = stage
        .command(&["restore", "--quiet", "--repo", &stage.repository(), "--to-time", moment, "-D"])
        .arg(&data)
        .output();
    let restore = restore.on("start", &stage.program)?;
    if !restore.status.success() {
        return Err(Error::postgres(format!(
            "the restore failed: {}",
            String::from_utf8_lossy(&restore.stderr).trim()
        )));
    }
    let major = crate::postgres::version_of(&data)?.major;
    let install =
        crate::postgres::Install::find(stage.pg_bindir.as_deref(), environment::search_path().as_deref(), Some(major))?;
    let home = stage.root.join("copy");
    let log = std::fs::File::create(home.join("log")).on("create", home.join("log"))?;
    let errors = log.try_clone().on("share", "the log")?;
    let child = Command::new(install.program("postgres"))
        .arg("-D")
        .arg(&data)
        .args(["-c", "listen_addresses=", "-k"])
        .arg(&home)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn();
    let copy =
        Machine { stage, name: "copy", supervised: false, child: child.on("start", install.program("postgres"))? };
    let count = copy.sql(setup).await?.text("SELECT count(*) FROM note").await?;
    // A plain server: SIGINT is its fast stop.
    let _ =
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(copy.child.id() as i32), nix::sys::signal::Signal::SIGINT);
    let mut copy = copy;
    copy.child.wait().on("wait for", &stage.program)?;
    Ok(count)
}
