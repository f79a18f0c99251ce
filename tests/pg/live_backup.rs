//! Backups of running servers: what they refuse, report, and leave behind when they are killed.

use std::os::unix::fs::FileExt;

use crate::support::*;

const REFUSED: i32 = 73;
const DAMAGED: i32 = 65;

fn backups(bucket: &Bucket) -> usize {
    bucket.json(&["list"])["backups"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_backup_that_is_killed_leaves_nothing_visible() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE filler AS SELECT n, md5(random()::text) || md5(random()::text) AS text FROM generate_series(1, 400000) n");
    assert_eq!(backups(&bucket), 1);
    for delay in [0, 100, 300, 600] {
        let data = machine.data_dir();
        let mut backup = bucket.command(&["backup", "-D", data.to_str().expect("text")]).spawn().expect("started");
        std::thread::sleep(std::time::Duration::from_millis(delay));
        let _ = backup.kill();
        let status = backup.wait().expect("ended");
        assert!(!status.success(), "killed after {delay} ms, and it was done");
        assert_eq!(backups(&bucket), 1, "killed after {delay} ms");
    }
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    assert_eq!(backups(&bucket), 2);
}

const CONTENT: &str = "SELECT count(*), sum(hashtext(noise::text)::bigint * n) FROM filler";

/// A table that cannot be compressed: four packs and a rest.
fn fill(machine: &Machine) {
    let noise = ["md5(random()::text)"; 8].join(" || ");
    let rows = format!("SELECT n, decode({noise}, 'hex') AS noise FROM generate_series(1, 560000) n");
    machine.sql(&format!("CREATE TABLE filler AS {rows}"));
    machine.sql("VACUUM (FREEZE, ANALYZE) filler");
    machine.sql("CHECKPOINT");
}

/// A process that does not outlive whoever gives up on it.
struct KilledWithUs(std::process::Child);

impl Drop for KilledWithUs {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A backup that is killed once most of its packs are in the bucket; how many bytes it has put. Its WAL is held up meanwhile, so
/// that it cannot end before.
fn kill_a_backup(machine: &Machine) -> u64 {
    let packs = || -> u64 {
        let all = all_files(&machine.bucket.path().join("packs"));
        // Not what is still being written.
        let whole = all.iter().filter(|path| path.to_str().is_some_and(|path| !path.contains('#')));
        whole.filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum()
    };
    let (before, data) = (packs(), machine.data_dir());
    machine.signal(nix::sys::signal::Signal::SIGSTOP);
    let backup = machine.bucket.command(&["backup", "-D", data.to_str().expect("text")]).spawn().expect("started");
    let backup = KilledWithUs(backup);
    wait_until("most of it is in the bucket", || packs() >= before + (64 << 20));
    drop(backup);
    machine.signal(nix::sys::signal::Signal::SIGCONT);
    packs() - before
}

/// Takes a backup; how many bytes it has put.
fn stored_by_a_backup(machine: &Machine) -> u64 {
    let done = machine.bucket.json(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    done["backup"]["stored_bytes"].as_u64().expect("bytes")
}

#[test]
fn a_backup_that_was_killed_goes_on_with_what_it_had_put() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    fill(&machine);
    let expected = machine.sql(CONTENT);
    let left = kill_a_backup(&machine);
    assert_eq!(backups(&bucket), 1);
    let stored = stored_by_a_backup(&machine);
    assert!(stored * 4 < left, "{left} bytes were there, and {stored} more were put");
    machine.archived();
    let restored = |name: &str| {
        let data = scratch.dir(name).join("data");
        bucket.must(&["restore", "-D", data.to_str().expect("text")]);
        let copy = Plain::start(&scratch, name, &bucket, &Postgres::debian()).up(false);
        copy.machine.sql(CONTENT)
    };
    assert_eq!(restored("b"), expected);
    // What it names of the dead one's is as safe as its own.
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    assert_eq!(backups(&bucket), 1);
    bucket.must(&["verify", "--full"]);
    assert_eq!(restored("c"), expected);
}

#[test]
fn the_first_backup_on_a_new_machine_costs_what_has_changed_since_the_last_one_on_the_old() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let packs = || -> u64 {
        let all = all_files(&bucket.path().join("packs"));
        all.iter().map(|path| path.metadata().expect("there").len()).sum()
    };
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    fill(&machine);
    let whole = stored_by_a_backup(&machine);
    assert!(whole > 64 << 20, "{whole} bytes");
    // A row in some kilobytes of each megabyte.
    machine.sql("UPDATE filler SET noise = decode(md5(n::text), 'hex') WHERE n % 2000 = 7");
    let expected = machine.sql(CONTENT);
    machine.archived();
    machine.vanish();
    let before = packs();
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    stored_by_a_backup(&next);
    // All that it has put, by its schedule too.
    let put = packs() - before;
    assert!(put * 10 < whole, "{put} bytes, of {whole} that there are");
    next.vanish();
    let mut last = Machine::new(&scratch, "c", &bucket);
    last.start(&[]).ready();
    assert_eq!(last.sql(CONTENT), expected);
}

#[test]
fn by_schedule_everything_is_stored_anew_once_the_last_full_backup_is_old() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    let schedule = ["--init", "--backup-every=300ms", "--full-every=20s"];
    machine.start(&[&schedule[..], &["--", "-c", "checkpoint_completion_target=0"]].concat()).ready();
    let taken = || bucket.json(&["list"])["backups"].as_array().expect("a list").clone();
    let is_full = |backup: &serde_json::Value| backup["parent"].is_null();
    wait_until("a second full one", || taken().iter().filter(|backup| is_full(backup)).count() == 2);
    let all = taken();
    assert!(is_full(&all[0]) && !is_full(&all[1]), "the one after the first builds on it: {all:?}");
    let mut last_full = &all[0];
    for backup in &all {
        last_full = if is_full(backup) { backup } else { last_full };
        assert_eq!(backup["full_at"], last_full["started_at"], "each tells how old what it builds on is");
        let share =
            backup["stored_bytes"].as_u64().expect("bytes") * 4 > all[0]["stored_bytes"].as_u64().expect("bytes");
        assert_eq!(share, is_full(backup), "{backup}");
    }
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_backup_reads_no_faster_than_it_may() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    let beside = scratch.dir("beside");
    std::fs::write(beside.join("index"), vec![7; 5 << 20]).expect("written");
    give(&beside);
    let (data, with) = (machine.data_dir(), format!("--with=beside={}", beside.display()));
    let report = bucket.json(&["backup", "-D", data.to_str().expect("text"), "--max-rate=10MB", &with]);
    let bytes = report["backup"]["bytes"].as_f64().expect("bytes");
    let seconds = report["seconds"].as_f64().expect("seconds");
    // Each of the two begins with a burst and what comes first, and the control file is not counted.
    let least = (bytes + 5e6 - 3e6) / (10 << 20) as f64 - 0.2;
    assert!(least > 1.5 && seconds > least, "{bytes} bytes in {seconds} s, expected {least} at least");
}

#[test]
fn a_damaged_page_is_reported_by_file_and_block_and_fails_only_when_asked() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n AS id, repeat('z', 100) AS text FROM generate_series(1, 20000) n");
    let file = machine.sql("SELECT pg_relation_filepath('t')");
    machine.sql("CHECKPOINT");
    let path = machine.data_dir().join(&file);
    let damaged = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
    damaged.write_all_at(b"rotten", 5 * 8192 + 4000).expect("written");
    let data = machine.data_dir();
    let arguments = ["backup", "-D", data.to_str().expect("text")];
    let said = bucket.must_fail(&[&arguments[..], &["--fail-on-damage"]].concat(), DAMAGED);
    assert!(said.contains(&format!("{file} block 5")), "{said}");
    assert_eq!(backups(&bucket), 1);
    let report = bucket.json(&arguments);
    assert_eq!(report["backup"]["damaged_pages"], 1);
    assert_eq!(report["backup"]["damaged"][0]["file"], file.as_str());
    assert_eq!(report["backup"]["damaged"][0]["block"], 5);
    assert!(bucket.must(&["list"]).contains("1 DAMAGED PAGES"));
}

#[test]
fn a_write_that_the_disk_has_lost_is_noticed_by_the_next_backup_full_or_not() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n AS id, repeat('z', 100) AS text FROM generate_series(1, 20000) n");
    let file = machine.sql("SELECT pg_relation_filepath('t')");
    machine.sql("VACUUM FREEZE t");
    machine.sql("CHECKPOINT");
    let path = machine.data_dir().join(&file);
    let disk = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("opened");
    let mut before = [0; 8192];
    disk.read_exact_at(&mut before, 200 * 8192).expect("read");
    machine.sql("UPDATE t SET text = 'new' WHERE ctid = '(200,1)'");
    machine.sql("CHECKPOINT");
    let data = machine.data_dir();
    let arguments = ["backup", "-D", data.to_str().expect("text")];
    let with_the_row = bucket.json(&arguments);
    assert_eq!(with_the_row["stretches_behind_wal"], 0, "{with_the_row}");
    // The page is what it was before, sound in itself: no checksum tells. Another one beside it has changed as it should.
    disk.write_all_at(&before, 200 * 8192).expect("written");
    machine.sql("UPDATE t SET text = 'other' WHERE ctid = '(201,1)'");
    machine.sql("CHECKPOINT");
    let said = bucket.must_fail(&[&arguments[..], &["--fail-on-damage"]].concat(), DAMAGED);
    assert!(said.contains(&format!("{file} from block 200")), "{said}");
    assert!(said.contains(with_the_row["backup"]["id"].as_str().expect("an id")), "{said}");
    let stretch = serde_json::json!({ "file": file, "first_block": 200, "last_block": 200 });
    let said = bucket.must_fail(&[&arguments[..], &["--full", "--fail-on-damage"]].concat(), DAMAGED);
    assert!(said.contains(&format!("{file} from block 200")), "{said}");
    let report = bucket.json(&arguments);
    assert_eq!(report["stretches_behind_wal"], 1, "{report}");
    assert_eq!(report["behind_wal"][0], stretch);
    assert_eq!(report["backup"]["damaged_pages"], 0);
    // What is there now is what the next one compares with.
    assert_eq!(bucket.json(&arguments)["stretches_behind_wal"], 0);
    let restored = scratch.dir("restored").join("data");
    let id = report["backup"]["id"].as_str().expect("an id");
    bucket.must(&["restore", "-D", restored.to_str().expect("text"), "--backup", id, "--immediate"]);
    let mut now = [0; 8192];
    let copy = std::fs::File::open(restored.join(&file)).expect("opened");
    copy.read_exact_at(&mut now, 200 * 8192).expect("read");
    assert_eq!(now, before, "to the byte what was read");
}

#[test]
fn a_healthy_server_raises_no_alarm_about_pages_that_changed_without_a_word() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n AS id, point(n % 100, n / 100) AS place, md5(n::text) AS text FROM generate_series(1, 20000) n");
    for method in [
        "spgist (place)",
        "gist (place)",
        "spgist (text)",
        "btree (text)",
        "hash (id)",
        "brin (id)",
        "gin ((ARRAY[id]))",
    ] {
        machine.sql(&format!("CREATE INDEX ON t USING {method}"));
    }
    machine.sql("CREATE SEQUENCE s");
    let data = machine.data_dir();
    let backup = |full: bool| {
        let arguments = ["backup", "-D", data.to_str().expect("text"), "--fail-on-damage", "--full"];
        let report = bucket.json(&arguments[..if full { 5 } else { 4 }]);
        assert_eq!(report["stretches_behind_wal"], 0, "{report}");
    };
    backup(false);
    for round in 1..=4 {
        machine.sql(&format!("INSERT INTO t SELECT n, point(n % 77, n / 77), md5(n::text) FROM generate_series({round}00000, {round}02000) n"));
        machine.sql(&format!("DELETE FROM t WHERE id % 13 = {round} OR id > {round}01000"));
        machine.sql("SELECT nextval('s') FROM generate_series(1, 40)");
        if round % 2 == 0 {
            machine.sql("VACUUM t");
        }
        // Hints are set by whoever looks.
        machine.sql("SELECT count(*), sum(id) FROM t");
        machine.sql("CHECKPOINT");
        backup(round == 3);
    }
}

#[test]
fn a_server_that_does_not_archive_is_not_backed_up() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    bucket.must(&["init"]);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.initdb();
    let plain = Plain::start(&scratch, "a", &bucket, &Postgres::debian()).up(false);
    let said = bucket.must_fail(&["backup", "-D", machine.data_dir().to_str().expect("text")], REFUSED);
    assert!(said.contains("nothing brings this server's WAL"), "{said}");
    drop(plain);
    machine.kill();
}

#[test]
fn a_server_that_something_else_runs_is_protected_by_its_archive_command_alone() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    bucket.must(&["init"]);
    let machine = Machine::new(&scratch, "a", &bucket);
    machine.initdb();
    // Configuration outside the data directory, as Debian has it.
    let etc = scratch.dir("etc");
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        std::fs::rename(machine.data_dir().join(name), etc.join(name)).expect("moved");
    }
    let conf = format!(
        "data_directory = '{data}'\nhba_file = '{etc}/pg_hba.conf'\nident_file = '{etc}/pg_ident.conf'\narchive_mode = on\narchive_command = '{program} wal push --repo {url} \"%p\"'\nwork_mem = '7MB'\ninclude_dir = 'conf.d'\n",
        data = machine.data_dir().display(),
        etc = etc.display(),
        program = perennial().display(),
        url = bucket.url
    );
    std::fs::write(etc.join("postgresql.conf"), conf).expect("written");
    std::fs::create_dir(etc.join("conf.d")).expect("made, and left empty as Debian does");
    give(&etc.join("conf.d"));
    let log = std::fs::File::create(machine.home.join("log")).expect("a log");
    let mut command = std::process::Command::new(Postgres::debian().program("postgres"));
    command.arg("-D").arg(&etc).args(["-c", "listen_addresses=", "-k"]).arg(&machine.home).envs(bucket.env.clone());
    command.stdout(log.try_clone().expect("shared")).stderr(log).current_dir("/");
    let mut server = as_server_user(&mut command).spawn().expect("started");
    wait_until("it is up", || machine.try_sql("SELECT 1").is_ok());
    machine.sql("CREATE TABLE t AS SELECT generate_series(1, 100) AS id");
    let backup = bucket
        .command(&["backup", "-D", machine.data_dir().to_str().expect("text")])
        .env("PGHOST", &machine.home)
        .output()
        .expect("runs");
    assert!(backup.status.success(), "{}", text(&backup));
    machine.sql("INSERT INTO t VALUES (101)");
    machine.archived_by_command();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.id() as i32), nix::sys::signal::Signal::SIGQUIT)
        .expect("stopped");
    server.wait().expect("ended");

    let data = scratch.dir("b").join("data");
    bucket.must(&["restore", "-D", data.to_str().expect("text")]);
    let conf = std::fs::read_to_string(data.join("postgresql.conf")).expect("it came back inside");
    assert!(conf.contains("work_mem = '7MB'") && !conf.contains("data_directory"), "{conf}");
    let copy = Plain::start(&scratch, "b", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql("SELECT count(*) FROM t"), "101");
    assert_eq!(copy.machine.sql("SHOW work_mem"), "7MB");
}

/// Without Perennial around the servers a switchover shows in the timelines of what they archive.
#[test]
fn after_a_switchover_there_and_back_the_first_primary_archives_and_is_backed_up_again() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    bucket.must(&["init"]);
    let command = format!("archive_command={} wal push --repo {} \"%p\"", perennial().display(), bucket.url);
    let archiving = ["-c", "archive_mode=on", "-c", command.as_str()];
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.initdb();
    first.serve(&archiving);
    first.sql("CREATE TABLE t (id int); INSERT INTO t VALUES (1)");
    first.archived_by_command();
    let mut second = Machine::new(&scratch, "b", &bucket);
    let mut copy = first.client("pg_basebackup");
    let copied = copy.args(["-R", "-X", "stream", "-c", "fast", "-D"]).arg(second.data_dir()).status();
    assert!(copied.expect("pg_basebackup runs").success());
    second.serve(&archiving);
    let stop = nix::sys::signal::Signal::SIGINT;
    let promoted = |machine: &Machine, id: u32| {
        machine.sql("SELECT pg_promote()");
        machine.sql(&format!("INSERT INTO t VALUES ({id})"));
        machine.archived_by_command();
    };
    // There: the first ends cleanly, which waits for its standby.
    first.server_ends(stop);
    promoted(&second, 2);
    // And back.
    let follow = format!("\nprimary_conninfo = 'host={} user={}'\n", second.home.display(), server_user_name());
    let auto = first.data_dir().join("postgresql.auto.conf");
    let settings = std::fs::read_to_string(&auto).expect("read") + &follow;
    std::fs::write(&auto, settings).expect("written");
    std::fs::write(first.data_dir().join("standby.signal"), "").expect("written");
    give(&first.data_dir().join("standby.signal"));
    first.serve(&archiving);
    wait_until("the first follows", || first.sql("SELECT count(*) FROM t") == "2");
    second.server_ends(stop);
    promoted(&first, 3);
    let data_dir = first.data_dir();
    let backup = bucket.command(&["backup", "-D", data_dir.to_str().expect("text")]).output().expect("runs");
    assert!(backup.status.success(), "{}", text(&backup));
    assert_eq!(bucket.json(&["list"])["generations"].as_array().map(Vec::len), Some(3));
    let data = scratch.dir("c").join("data");
    bucket.must(&["restore", "-D", data.to_str().expect("text")]);
    let copy = Plain::start(&scratch, "c", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t"), "1,2,3");
}
