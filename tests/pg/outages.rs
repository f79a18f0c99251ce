//! The bucket away for a while, under load: what waits, what goes on, and that nothing is lost.

use std::time::{Duration, Instant};

use crate::support::clients::{Clients, ledger};
use crate::support::relay::{Line, Relay};
use crate::support::*;

/// A repository behind a line that can be held up.
fn behind_a_relay() -> (Relay, Bucket) {
    let relay = Relay::to(&from_run("PERENNIAL_TEST_S3"));
    let bucket = Bucket::s3().with_env("AWS_ENDPOINT_URL", &relay.endpoint);
    (relay, bucket)
}

/// Peak memory of `perennial run`, in bytes.
fn peak_memory(machine: &Machine) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn commits_wait_and_nothing_is_lost(trouble: Line) {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=0"]).ready().with_backup();
    let clients = Clients::start(&machine, 8, 0);
    clients.wait_for(100);
    relay.set(trouble);
    // What was on its way may still be told; then nothing is.
    std::thread::sleep(Duration::from_secs(1));
    let before = clients.told();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(clients.told(), before, "a commit was acknowledged while the bucket was away");
    let told = bucket_status(&machine);
    assert_eq!(told["commits_wait"], true, "{told}");
    relay.set(Line::Open);
    clients.wait_for(100);
    machine.vanish();
    let told = clients.end();
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--rpo=0"]).ready();
    let there = ledger(&next);
    let missing = told.iter().filter(|(_, id)| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} acknowledged commits", told.len());
}

/// What the supervisor says of itself; the bucket need not be there for that.
fn bucket_status(machine: &Machine) -> serde_json::Value {
    use std::io::{Read, Write};
    let path = machine.data_dir().join("pgsql_tmp_perennial/supervisor.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(path).expect("it listens");
    stream.write_all(b"GET /status HTTP/1.0\r\n\r\n").expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON")
}

#[test]
fn at_rpo_zero_commits_wait_while_the_store_is_stalled_and_none_is_lost() {
    commits_wait_and_nothing_is_lost(Line::Stalled);
}

#[test]
fn at_rpo_zero_commits_wait_while_the_store_is_gone_and_none_is_lost() {
    commits_wait_and_nothing_is_lost(Line::Cut);
}

#[test]
fn at_rpo_zero_commits_wait_while_the_store_answers_503_and_none_is_lost() {
    commits_wait_and_nothing_is_lost(Line::Busy);
}

#[test]
fn without_the_bucket_the_server_goes_on_and_catches_up_within_its_memory() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE bulk (n int, text text)");
    machine.archived();
    for trouble in [Line::Stalled, Line::Cut, Line::Busy] {
        relay.set(trouble);
        // 50 MB and more of WAL, several segments.
        machine.sql("INSERT INTO bulk SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 120000) n");
        machine.sql("CHECKPOINT");
        machine.wait_for("WAL has waited for");
        relay.set(Line::Open);
        let began = Instant::now();
        machine.archived();
        assert!(began.elapsed() < Duration::from_secs(60), "it did not catch up");
    }
    let peak = peak_memory(&machine);
    assert!(peak < 128 << 20, "{} MB", peak >> 20);
    let count = machine.sql("SELECT count(*) FROM bulk");
    machine.vanish();
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM bulk"), count);
}

#[test]
fn a_stop_without_the_bucket_ends_in_time_and_says_what_is_left_behind() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--grace=5s"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS id");
    relay.set(Line::Stalled);
    machine.sql("INSERT INTO t VALUES (1001)");
    let began = Instant::now();
    machine.signal(nix::sys::signal::Signal::SIGTERM);
    machine.ended();
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    assert!(machine.log().contains("not all WAL reached the repository"), "{}", machine.log());
    relay.set(Line::Open);
    // Its disk has it all: a restart on it goes on.
    machine.start(&[]).ready();
    assert_eq!(machine.sql("SELECT count(*) FROM t"), "1001");
}

#[test]
fn without_the_bucket_commits_go_on_loudly_when_that_was_asked_for_and_wait_again_afterwards() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    let options = ["--init", "--rpo=0", "--on-bucket-loss=degrade", "--bucket-loss-after=1s"];
    machine.start(&options).ready().with_backup();
    assert_eq!(machine.sql("SHOW synchronous_standby_names"), "perennial");
    let clients = Clients::start(&machine, 4, 0);
    clients.wait_for(50);
    relay.set(Line::Stalled);
    machine.wait_for("ALARM: the repository has not answered for");
    clients.wait_for(200);
    wait_until("status says so", || bucket_status(&machine)["degraded"] == true);
    relay.set(Line::Open);
    machine.wait_for("commits wait for it as before");
    let before = clients.told();
    clients.wait_for(50);
    assert_eq!(bucket_status(&machine)["degraded"], false);
    machine.vanish();
    let told = clients.end();
    assert!(told.len() > before);
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--rpo=0"]).ready();
    let there = ledger(&next);
    let missing = told.iter().filter(|(_, id)| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} acknowledged commits", told.len());
    assert_eq!(next.sql("SHOW synchronous_standby_names"), "perennial");
    assert_eq!(next.stop(), 0);
    let setting = std::fs::read_to_string(next.data_dir().join("postgresql.auto.conf")).expect("read");
    assert!(!setting.contains("synchronous_standby_names"), "{setting}");
}

#[test]
fn a_commit_whose_wait_is_cancelled_raises_an_alarm() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=0"]).ready().with_backup();
    machine.sql("CREATE TABLE t (id int)");
    relay.set(Line::Stalled);
    let mut waiting = machine.client("psql");
    let mut waiting =
        waiting.args(["-XAtq", "-d", "postgres", "-c", "INSERT INTO t VALUES (1)"]).spawn().expect("psql");
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    wait_until("the commit waits", || machine.sql(waits) == "1");
    machine.sql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
    let _ = waiting.wait();
    machine.wait_for("ALARM: a client was told that its transaction has committed before that was durable");
    relay.set(Line::Open);
}

#[test]
fn a_machine_that_ec2_takes_away_stops_in_time_and_the_next_one_need_not_wait() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let state = std::sync::Arc::clone(&taken);
    let metadata = Answering::with(move |head| match head.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["PUT", "/latest/api/token"] => ("200 OK", "t0ken".to_owned()),
        ["GET", "/latest/meta-data/spot/instance-action"] if state.load(std::sync::atomic::Ordering::SeqCst) => {
            ("200 OK", r#"{"action": "terminate", "time": "2026-11-25T10:00:00Z"}"#.to_owned())
        }
        ["GET", "/latest/meta-data/events/recommendations/rebalance"] => {
            ("200 OK", r#"{"noticeTime": "…"}"#.to_owned())
        }
        ["GET", "/latest/meta-data/autoscaling/target-lifecycle-state"] => ("200 OK", "InService".to_owned()),
        _ => ("404 Not Found", String::new()),
    });
    let here = bucket.clone().with_env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint);
    let mut machine = Machine::new(&scratch, "a", &here);
    machine.start(&["--init", "--notices=ec2"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT 1 AS id");
    machine.wait_for("the platform advises to leave this machine");
    taken.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(machine.ended(), 0);
    assert!(machine.log().contains("the platform takes this machine away: spot interruption"), "{}", machine.log());
    assert!(machine.log().contains("released: everything"), "{}", machine.log());
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--takeover-after=10m"]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM t"), "1");
}

/// Writes about this many megabytes of WAL.
fn write_wal(machine: &Machine, megabytes: u32) {
    let rows = megabytes * 2400;
    machine.sql(&format!("INSERT INTO bulk SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, {rows}) n"));
}

#[test]
fn past_the_bound_commits_wait_when_told_so() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--max-wal-behind=32MB", "--when-behind=block"]).ready().with_backup();
    machine.sql("CREATE TABLE bulk (n int, text text)");
    machine.archived();
    relay.set(Line::Stalled);
    // Slow enough, it may have to wait itself.
    let bulk = format!("INSERT INTO bulk SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, {}) n", 60 * 1000);
    let mut writing = machine.client("psql").args(["-XAtq", "-d", "postgres", "-c", &bulk]).spawn().expect("psql");
    machine.wait_for("commits wait from now on");
    let mut waiting = machine.client("psql");
    let mut waiting =
        waiting.args(["-XAtq", "-d", "postgres", "-c", "INSERT INTO bulk VALUES (-1, '')"]).spawn().expect("psql");
    wait_until("the commit waits", || {
        machine.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%(-1%'") == "1"
    });
    relay.set(Line::Open);
    assert!(waiting.wait().expect("ended").success() && writing.wait().expect("ended").success());
    machine.wait_for("commits do not wait any more");
    assert_eq!(machine.sql("SHOW synchronous_standby_names"), "");
}

#[test]
fn past_the_bound_wal_is_given_up_when_told_so_and_no_restore_crosses_the_gap() {
    let scratch = Scratch::new();
    let (relay, bucket) = behind_a_relay();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--max-wal-behind=32MB", "--when-behind=drop"]).ready().with_backup();
    machine.sql("CREATE TABLE bulk (n int, text text)");
    machine.archived();
    let before = machine.sql("SELECT pg_current_wal_insert_lsn()");
    relay.set(Line::Cut);
    for _ in 0..3 {
        write_wal(&machine, 60);
        machine.sql("CHECKPOINT");
    }
    let inside = machine.sql("SELECT pg_current_wal_insert_lsn()");
    relay.set(Line::Open);
    machine.wait_for("was given up before it reached the repository");
    machine.wait_for("claimed generation 2, child of generation 1");
    wait_until("a new backup is there", || machine.log().matches("is restorable").count() == 2);
    machine.sql("INSERT INTO bulk VALUES (-1, 'after the gap')");
    machine.archived();
    let count = machine.sql("SELECT count(*) FROM bulk");
    machine.vanish();

    let data = scratch.path().join("never");
    let said = bucket.must_fail(&["restore", "-D", data.to_str().expect("text"), "--to-lsn", &inside], 66);
    assert!(said.contains("cannot be reached"), "{said}");
    assert!(bucket.must(&["list"]).contains("missing"), "{}", bucket.must(&["list"]));
    let old = scratch.dir("old").join("data");
    bucket.must(&["restore", "-D", old.to_str().expect("text"), "--to-lsn", &before]);
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM bulk"), count);
}
