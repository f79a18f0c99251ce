//! Lives of a machine: boots, stops, restarts, copies, and who may go on.

use nix::sys::signal::Signal;

use crate::support::*;

const REFUSED: i32 = 73;
const FENCED: i32 = 75;

#[test]
fn twenty_boots_in_a_row_on_one_prefix_each_restorable_to_any_point_of_any_life() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut moments = Vec::new();
    for life in 1..=20 {
        let mut machine = Machine::new(&scratch, &format!("m{life}"), &bucket);
        machine.start(&["--init"]).ready();
        if life == 1 {
            machine.with_backup();
            machine.sql("CREATE TABLE lives (life int, step int)");
        }
        assert_eq!(
            machine.sql("SELECT count(*) FROM lives"),
            ((life - 1) * 2).to_string(),
            "every life before is there"
        );
        machine.sql(&format!("INSERT INTO lives VALUES ({life}, 1)"));
        let moment = machine.sql("SELECT clock_timestamp() FROM pg_sleep(0.01)");
        machine.sql(&format!("INSERT INTO lives SELECT {life}, 2 FROM pg_sleep(0.01)"));
        moments.push(moment);
        machine.archived();
        machine.vanish();
    }
    let generations = bucket.json(&["list"])["generations"].as_array().map(Vec::len);
    assert_eq!(generations, Some(20));
    for life in [3, 11, 17] {
        let name = format!("past{life}");
        let data = scratch.dir(&name).join("data");
        bucket.must(&["restore", "-D", data.to_str().expect("text"), "--to-time", &moments[life - 1]]);
        let copy = Plain::start(&scratch, &name, &bucket, &Postgres::debian()).up(false);
        let last = copy.machine.sql("SELECT max(life) || '/' || count(*) FROM lives");
        assert_eq!(last, format!("{life}/{}", life * 2 - 1), "as of the middle of life {life}");
    }
}

#[test]
fn a_clean_stop_leaves_nothing_behind_and_the_next_machine_has_it_all() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS id");
    assert_eq!(first.stop(), 0, "the server's own exit code");
    first.wipe();
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    assert_eq!(second.sql("SELECT count(*) FROM t"), "1000");
}

#[test]
fn a_restart_on_the_same_disk_goes_on_without_a_restore() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT 1 AS id");
    machine.kill();
    machine.start(&[]).ready();
    assert!(machine.log().contains("going on with the local directory, generation 1"), "{}", machine.log());
    machine.sql("INSERT INTO t VALUES (2)");
    machine.archived();
    machine.vanish();
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM t"), "2", "WAL of both generations is followed");
}

#[test]
fn a_machine_that_was_replaced_does_not_come_back() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.archived();
    first.kill();
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    first.start(&["--init"]);
    assert_eq!(first.ended(), FENCED);
    assert!(first.log().contains("has started generation 2"), "{}", first.log());
    assert!(first.data_dir().join("PG_VERSION").exists(), "its data is kept");

    first.start(&["--discard-diverged"]).ready();
    let aside = std::fs::read_dir(&first.home).expect("listed").flatten().map(|entry| entry.file_name());
    assert!(aside.into_iter().any(|name| name.to_string_lossy().starts_with("data.diverged-1-")));
}

#[test]
fn a_disk_that_was_put_back_in_time_is_not_started() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    assert_eq!(machine.stop(), 0);
    let snapshot = scratch.path().join("snapshot");
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
        assert!(status.success());
    };
    machine.start(&[]).ready();
    assert_eq!(machine.stop(), 0);
    copy(&machine.data_dir(), &snapshot);
    // Not a new generation: the same directory, as it was before more was archived under its own.
    let writer = std::fs::read(machine.data_dir().join("pgsql_tmp_perennial/writer.json")).expect("a note");
    machine.start(&[]).ready();
    machine.sql("CREATE TABLE t AS SELECT generate_series(1, 100000) AS id");
    machine.archived();
    machine.archived();
    assert_eq!(machine.stop(), 0);
    let newest = std::fs::read(machine.data_dir().join("pgsql_tmp_perennial/writer.json")).expect("a note");
    assert_ne!(writer, newest, "each start is a generation");
    machine.wipe();
    copy(&snapshot, &machine.data_dir());
    std::fs::write(machine.data_dir().join("pgsql_tmp_perennial/writer.json"), newest).expect("written");
    machine.start(&[]);
    assert_eq!(machine.ended(), REFUSED);
    assert!(machine.log().contains("does not continue the repository"), "{}", machine.log());
    assert!(machine.log().contains("--discard-diverged"), "{}", machine.log());
}

#[test]
fn neither_perennial_nor_its_server_outlives_the_other() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready();
    let postmaster = nix::unistd::Pid::from_raw(machine.postmaster().expect("it runs"));
    machine.signal(Signal::SIGKILL);
    wait_until("the server has ended too", || {
        !machine.data_dir().join("postmaster.pid").exists() || nix::sys::signal::kill(postmaster, None).is_err()
    });
    assert_ne!(machine.ended(), 0);

    machine.start(&[]).ready();
    let postmaster = nix::unistd::Pid::from_raw(machine.postmaster().expect("it runs"));
    nix::sys::signal::kill(postmaster, Signal::SIGKILL).expect("killed");
    assert_eq!(machine.ended(), 128 + 9, "the signal that ended the server");
}

#[test]
fn a_second_signal_stops_at_once() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.signal(Signal::SIGTERM);
    machine.wait_for("fast stop");
    machine.signal(Signal::SIGTERM);
    machine.ended();
    assert!(
        machine.log().contains("immediate stop") || machine.log().contains("database system is shut down"),
        "{}",
        machine.log()
    );
}

#[test]
fn a_machine_that_died_before_its_first_backup_is_waited_for_and_never_overwritten() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready();
    first.vanish();
    if bucket.json(&["list"])["backups"].as_array().is_some_and(|backups| !backups.is_empty()) {
        return; // The backup was faster than the kill.
    }
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--init", "--takeover-after", "1s"]);
    assert_eq!(second.ended(), REFUSED);
    assert!(!second.data_dir().join("PG_VERSION").exists());
    assert!(second.log().contains("has no restorable backup"), "{}", second.log());
}

#[test]
fn a_copy_of_the_past_becomes_the_database_only_when_told_and_the_other_future_stays_reachable() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 'kept' AS what");
    let moment = first.sql("SELECT clock_timestamp() FROM pg_sleep(0.05)");
    first.sql("INSERT INTO t SELECT 'mistake' FROM pg_sleep(0.05)");
    first.archived();
    assert_eq!(first.stop(), 0);

    let mut second = Machine::new(&scratch, "b", &bucket);
    bucket.must(&["restore", "-D", second.data_dir().to_str().expect("text"), "--to-time", &moment]);
    let copy = Plain::start(&scratch, "b", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql("SELECT string_agg(what, ',') FROM t"), "kept");
    assert_eq!(copy.machine.sql("SHOW archive_mode"), "off", "a copy does not write into the repository");
    drop(copy);

    second.start(&[]);
    assert_eq!(second.ended(), REFUSED);
    assert!(second.log().contains("--adopt"), "{}", second.log());
    second.start(&["--adopt"]).ready();
    second.sql("INSERT INTO t VALUES ('other future')");
    second.archived();
    second.vanish();

    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&[]).ready();
    assert_eq!(third.sql("SELECT string_agg(what, ',') FROM t"), "kept,other future");
    let data = scratch.dir("d").join("data");
    bucket.must(&["restore", "-D", data.to_str().expect("text"), "--generation", "1"]);
    let abandoned = Plain::start(&scratch, "d", &bucket, &Postgres::debian()).up(false);
    assert_eq!(abandoned.machine.sql("SELECT string_agg(what, ',') FROM t"), "kept,mistake");
}

#[test]
fn an_existing_cluster_is_protected_when_it_is_adopted() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.initdb();
    machine.start(&[]);
    assert_eq!(machine.ended(), REFUSED);
    machine.start(&["--adopt"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT 1 AS id");
    machine.archived();
    machine.vanish();
    machine.start(&[]).ready();
    assert_eq!(machine.sql("SELECT count(*) FROM t"), "1");
}

#[test]
fn as_process_1_of_a_container_it_passes_signals_on_and_leaves_nobody_behind() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a process namespace needs root");
        return;
    }
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let machine = Machine::new(&scratch, "a", &bucket);
    let log = std::fs::File::create(machine.home.join("log")).expect("a log");
    // Root inside, too: perennial becomes user postgres by itself.
    let mut container = std::process::Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc"])
        .arg(perennial())
        .args(["run", &bucket.url, "--init", "-D"])
        .arg(machine.data_dir())
        .args(["--", "-c", "listen_addresses=", "-k"])
        .arg(&machine.home)
        .stdout(log.try_clone().expect("shared"))
        .stderr(log)
        .spawn()
        .expect("unshare runs");
    wait_until("it is ready", || machine.log().contains("info: ready: port"));
    assert_eq!(machine.sql("SELECT 1"), "1");
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", container.id())).expect("listed");
    let init: i32 = children.trim().parse().expect("one child: process 1 of the namespace");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), Signal::SIGTERM).expect("signalled");
    let status = container.wait().expect("ended");
    assert_eq!(status.code(), Some(0), "{}", machine.log());
    assert!(machine.log().contains("fast stop"), "{}", machine.log());
}

#[test]
fn a_point_before_a_takeover_becomes_the_database_and_later_machines_follow_it() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 'kept' AS what");
    let moment = first.sql("SELECT clock_timestamp() FROM pg_sleep(0.05)");
    first.sql("INSERT INTO t SELECT 'dropped' FROM pg_sleep(0.05)");
    first.archived();
    first.vanish();
    // A takeover: timeline 2 left timeline 1 later than the moment we go back to.
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    second.sql("INSERT INTO t VALUES ('dropped too')");
    second.archived();
    second.vanish();

    let mut third = Machine::new(&scratch, "c", &bucket);
    bucket.must(&["restore", "-D", third.data_dir().to_str().expect("text"), "--to-time", &moment]);
    third.start(&["--adopt"]);
    // It dies before its timeline has a whole segment: the way leads over the ancestor's, up to where it was left only.
    third.ready();
    let of = |machine: &Machine| machine.sql("SELECT string_agg(what, ',' ORDER BY what) FROM t");
    assert_eq!(of(&third), "kept");
    third.vanish();
    let mut fourth = Machine::new(&scratch, "d", &bucket);
    fourth.start(&[]).ready();
    assert_eq!(of(&fourth), "kept", "another future came back");
    fourth.sql("INSERT INTO t VALUES ('new')");
    fourth.archived();
    fourth.vanish();
    let mut fifth = Machine::new(&scratch, "e", &bucket);
    fifth.start(&[]).ready();
    assert_eq!(of(&fifth), "kept,new");
    assert!(bucket.must(&["list"]).contains("can be restored"));
}

#[test]
fn two_processes_never_work_on_one_directory() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    let data = machine.data_dir();
    let directory = data.to_str().expect("text");
    let said = bucket.must_fail(&["run", "-D", directory], REFUSED);
    assert!(said.contains("another perennial process"), "{said}");
    let said = bucket.must_fail(&["restore", "--force", "-D", directory], REFUSED);
    assert!(said.contains("server is running") || said.contains("another perennial process"), "{said}");
    machine.sql("SELECT 1");
}

#[test]
fn whoever_asks_is_told_when_the_server_is_ready_and_how_far_its_wal_is() {
    use std::io::{Read, Write};
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let address = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let ask = |path: &str| {
        let mut stream = std::net::TcpStream::connect(address).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--http", &address.to_string()]).ready().with_backup();
    let ready_file = machine.data_dir().join("pgsql_tmp_perennial/ready");
    assert!(ready_file.exists());
    machine.archived();
    wait_until("it is ready", || ask("/ready").is_some_and(|answer| answer.starts_with("HTTP/1.0 200")));
    assert!(ask("/metrics").expect("answers").contains("perennial_ready 1\n"));
    let told = bucket.json(&["status", "-D", machine.data_dir().to_str().expect("text")]);
    let supervisor = &told["local"]["supervisor"];
    assert_eq!((&supervisor["phase"], &supervisor["generation"]), (&"ready".into(), &1.into()), "{told}");
    assert!(supervisor["last_backup"].as_str().is_some_and(|id| id.starts_with("00000001-")), "{told}");
    assert_eq!(machine.stop(), 0);
    assert!(!ready_file.exists());
    let told = bucket.must(&["status", "-D", machine.data_dir().to_str().expect("text")]);
    assert!(told.contains("no supervisor is running here"), "{told}");
}
