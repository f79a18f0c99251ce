//! A standby that follows the bucket: it sees what is written within moments, goes along with every takeover, serves while
//! the bucket is away, and becomes the database without a backup being fetched.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::clients::{Clients, ledger};
use crate::support::relay::{Line, Relay};
use crate::support::*;

const USAGE: i32 = 2;
const REFUSED: i32 = 73;
const FENCED: i32 = 75;

fn restore_standby(scratch: &Scratch, name: &str, bucket: &Bucket, more: &[&str]) -> String {
    let data = scratch.dir(name).join("data");
    bucket.must(&[&["restore", "--standby", "-D", data.to_str().expect("text")], more].concat())
}

/// Restored and started by hand, as its user would.
fn standby(scratch: &Scratch, name: &str, bucket: &Bucket) -> Plain {
    let said = restore_standby(scratch, name, bucket, &[]);
    assert!(said.contains("start it: pg_ctl") && said.contains("perennial run URL"), "{said}");
    Plain::start(scratch, name, bucket, &Postgres::debian()).up(true)
}

/// Waits until the standby sees it; how long that took.
fn sees(standby: &Machine, statement: &str, expected: &str) -> Duration {
    let began = Instant::now();
    wait_until(&format!("{statement} says {expected}"), || {
        standby.try_sql(statement).is_ok_and(|said| said == expected)
    });
    began.elapsed()
}

fn stop(standby: &mut Plain) {
    standby.machine.signal(Signal::SIGINT);
    assert_eq!(standby.machine.ended(), 0, "{}", standby.machine.log());
}

#[test]
fn a_standby_sees_a_row_within_moments_and_follows_every_machine_that_takes_over() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=1s"]).ready().with_backup();
    first.sql("CREATE TABLE t (n int)");
    let standby = standby(&scratch, "s", &bucket);
    let count = "SELECT count(*) FROM t";
    sees(&standby.machine, count, "0");
    let segment = first.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let mut lags = Vec::new();
    for n in 1..=5 {
        first.sql(&format!("INSERT INTO t VALUES ({n})"));
        lags.push(sees(&standby.machine, count, &n.to_string()));
    }
    println!("seen after {lags:?}");
    assert!(lags.iter().all(|lag| *lag < Duration::from_secs(10)), "{lags:?}");
    assert_eq!(first.sql("SELECT pg_walfile_name(pg_current_wal_lsn())"), segment, "no segment was switched");
    // Over the edge of segments, too.
    first.sql("CREATE TABLE much AS SELECT n, repeat('x', 500) FROM generate_series(1, 100000) n");
    sees(&standby.machine, "SELECT count(*) FROM much", "100000");
    first.sql("SELECT pg_switch_wal()");
    first.sql("INSERT INTO t VALUES (6)");
    sees(&standby.machine, count, "6");
    first.archived();
    first.vanish();

    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--rpo=1s"]).ready();
    second.sql("INSERT INTO t VALUES (7)");
    sees(&standby.machine, count, "7");
    assert_eq!(second.stop(), 0);
    // The same disk goes on, on the same timeline.
    second.start(&["--rpo=1s"]).ready();
    second.sql("INSERT INTO t VALUES (8)");
    sees(&standby.machine, count, "8");
    assert_eq!(standby.machine.sql("SELECT pg_is_in_recovery()"), "t");
    assert_eq!(second.stop(), 0);
}

#[test]
fn a_standby_becomes_the_database_without_a_backup_and_has_every_acknowledged_row() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=0"]).ready().with_backup();
    let clients = Clients::start(&first, 4, 0);
    let mut standby = standby(&scratch, "s", &bucket);
    let rows = "SELECT count(*) > 100 FROM ledger";
    clients.wait_for(200);
    sees(&standby.machine, rows, "t");
    clients.wait_for(50);
    // A hypervisor that stops the machine in the middle of a word.
    first.signal_all(Signal::SIGSTOP);
    stop(&mut standby);
    drop(standby);
    let (packs, aside) = (bucket.path().join("packs"), bucket.path().join("packs-aside"));
    std::fs::rename(&packs, &aside).expect("moved");
    let mut second = Machine::new(&scratch, "s", &bucket);
    second.start(&["--rpo=0"]).ready();
    assert!(second.log().contains("promoting the standby in the local directory"), "{}", second.log());
    assert!(!second.log().contains("restoring backup"), "{}", second.log());
    std::fs::rename(&aside, &packs).expect("moved back");
    first.signal_all(Signal::SIGCONT);
    assert_eq!(first.ended(), FENCED);
    let told: Vec<u64> = clients.end().into_iter().map(|(_, id)| id).collect();
    let there = ledger(&second);
    let missing = told.iter().filter(|id| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} acknowledged rows", told.len());
    second.sql("INSERT INTO ledger VALUES (-1)");
    for setting in ["wal_retrieve_retry_interval", "archive_mode", "primary_conninfo"] {
        let from = second.sql(&format!("SELECT coalesce(sourcefile, '') FROM pg_settings WHERE name = '{setting}'"));
        assert!(!from.contains("auto.conf"), "{setting} of the standby is left: {from}");
    }
    second.vanish();
    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&["--rpo=0"]).ready();
    assert_eq!(ledger_size(&third), there.len() as u64 + 1, "the history goes on through the standby's");
    bucket.must(&["verify", "--full"]);
    assert_eq!(third.stop(), 0);
}

fn ledger_size(machine: &Machine) -> u64 {
    machine.sql("SELECT count(*) FROM ledger").parse().expect("a number")
}

#[test]
fn a_standby_that_was_never_started_waits_for_the_living_writer_and_then_takes_over() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    restore_standby(&scratch, "s", &bucket, &[]);
    first.sql("CREATE TABLE t AS SELECT 1 AS n");
    first.archived();
    let mut second = Machine::new(&scratch, "s", &bucket);
    second.start(&["--takeover-after=60s"]).wait_for("waiting as a spare");
    assert_eq!(first.stop(), 0);
    second.ready();
    assert_eq!(second.sql("SELECT n FROM t"), "1");
    assert_eq!(second.stop(), 0);
}

#[test]
fn a_standby_serves_while_the_bucket_is_away_and_catches_up() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 1 AS n");
    let relay = Relay::to(&from_run("PERENNIAL_TEST_S3"));
    let through_relay = Bucket::at_endpoint(&relay.endpoint, &bucket.url).with_env("PERENNIAL_PATIENCE", "2s");
    let standby = standby(&scratch, "s", &through_relay);
    sees(&standby.machine, "SELECT count(*) FROM t", "1");
    relay.set(Line::Cut);
    first.sql("INSERT INTO t VALUES (2)");
    wait_until("it says why it waits", || standby.machine.log().contains("the standby waits for the repository"));
    assert_eq!(standby.machine.sql("SELECT count(*) FROM t"), "1");
    relay.set(Line::Open);
    sees(&standby.machine, "SELECT count(*) FROM t", "2");
    assert_eq!(first.stop(), 0);
}

#[test]
fn a_standby_that_has_fallen_behind_what_is_kept_says_so() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    restore_standby(&scratch, "s", &bucket, &[]);
    first.segment_stored();
    first.sql("CREATE TABLE t AS SELECT 1 AS n");
    assert_eq!(first.stop(), 0);
    // With the log of a life of its own goes all of the WAL that nobody needs.
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--rpo=20ms"]).ready();
    next.segment_stored();
    bucket.must(&["backup", "-D", next.data_dir().to_str().expect("text")]);
    for _ in 0..2 {
        bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    }

    let mut behind = Plain::start(&scratch, "s", &bucket, &Postgres::debian());
    assert_ne!(behind.machine.ended(), 0);
    let said = behind.machine.log();
    assert!(said.contains("fallen behind what the repository keeps"), "{said}");
    assert!(said.contains("restore --standby --delta"), "{said}");
    let mut refused = Machine::new(&scratch, "s", &bucket);
    refused.start(&[]);
    assert_eq!(refused.ended(), REFUSED);
    assert!(refused.log().contains("is a standby that cannot go on"), "{}", refused.log());

    let said = restore_standby(&scratch, "s", &bucket, &["--delta"]);
    assert!(said.contains("start it"), "{said}");
    let standby = Plain::start(&scratch, "s", &bucket, &Postgres::debian()).up(true);
    sees(&standby.machine, "SELECT n FROM t", "1");
    assert_eq!(next.stop(), 0);
}

#[test]
fn a_standby_of_a_future_that_was_given_up_says_so_and_does_not_become_the_database() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 'kept' AS what");
    let moment = first.sql("SELECT clock_timestamp() FROM pg_sleep(0.05)");
    first.sql("INSERT INTO t SELECT 'mistake' FROM pg_sleep(0.05)");
    let mut standby = standby(&scratch, "s", &bucket);
    sees(&standby.machine, "SELECT count(*) FROM t", "2");
    assert_eq!(first.stop(), 0);
    // What it has read is on its disk, too.
    stop(&mut standby);
    drop(standby);
    let mut second = Machine::new(&scratch, "b", &bucket);
    bucket.must(&["restore", "-D", second.data_dir().to_str().expect("text"), "--to-time", &moment]);
    let before = all_files(&bucket.path());
    let mut other = Plain::start(&scratch, "s", &bucket, &Postgres::debian()).up(true);
    assert_eq!(other.machine.sql("SELECT count(*) FROM t"), "2");
    assert_eq!(all_files(&bucket.path()), before, "a standby leaves the bucket as it is");
    second.start(&["--adopt"]).ready();
    second.sql("INSERT INTO t VALUES ('other future')");
    assert_ne!(other.machine.ended(), 0);
    assert!(other.machine.log().contains("cannot follow the repository"), "{}", other.machine.log());
    second.archived();
    assert_eq!(second.stop(), 0);

    let mut third = Machine::new(&scratch, "s", &bucket);
    third.start(&[]);
    assert_eq!(third.ended(), REFUSED);
    assert!(third.log().contains("is a standby that cannot go on"), "{}", third.log());
    third.start(&["--discard-diverged"]).ready();
    assert_eq!(third.sql("SELECT string_agg(what, ',') FROM t"), "kept,other future");
    assert_eq!(third.stop(), 0);
}

#[test]
fn a_standby_that_was_promoted_by_hand_is_a_copy_and_leaves_the_bucket_alone() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 1 AS n");
    let mut standby = standby(&scratch, "s", &bucket);
    sees(&standby.machine, "SELECT count(*) FROM t", "1");
    assert_eq!(first.stop(), 0);
    let before = all_files(&bucket.path());
    standby.machine.sql("SELECT pg_promote()");
    sees(&standby.machine, "SELECT pg_is_in_recovery()", "f");
    standby.machine.sql("INSERT INTO t VALUES (2)");
    assert_eq!(standby.machine.sql("SHOW archive_mode"), "off");
    stop(&mut standby);
    drop(standby);
    assert_eq!(all_files(&bucket.path()), before);
    let mut copy = Machine::new(&scratch, "s", &bucket);
    copy.start(&[]);
    assert_eq!(copy.ended(), REFUSED);
    assert!(copy.log().contains("--adopt"), "{}", copy.log());
    copy.start(&["--adopt"]).ready();
    assert_eq!(copy.sql("SELECT count(*) FROM t"), "2");
    assert_eq!(copy.stop(), 0);
}

#[test]
fn a_standby_with_an_end_is_a_mistake() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let data = scratch.path().join("data");
    for mistake in
        [&["--immediate"][..], &["--to-lsn", "0/1"], &["--action", "promote"], &["--exclusive"], &["--timeline", "2"]]
    {
        let arguments = [&["restore", "--standby", "-D", data.to_str().expect("text")], mistake].concat();
        bucket.must_fail(&arguments, USAGE);
    }
}

#[test]
fn a_standby_follows_on_postgresql_13() {
    follows_on(13);
}

#[test]
fn a_standby_follows_on_postgresql_18() {
    follows_on(18);
}

/// Without and with what later majors do in recovery (prefetching, other ways to read ahead).
fn follows_on(major: u32) {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let postgres = Postgres::major(major);
    let mut first = Machine::with(&scratch, "a", &bucket, postgres.clone());
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 1 AS n");
    restore_standby(&scratch, "s", &bucket, &[]);
    let mut standby = Plain::start(&scratch, "s", &bucket, &postgres).up(true);
    sees(&standby.machine, "SELECT count(*) FROM t", "1");
    first.segment_stored();
    first.sql("INSERT INTO t VALUES (2)");
    println!("seen after {:?}", sees(&standby.machine, "SELECT count(*) FROM t", "2"));
    first.archived();
    first.vanish();
    let mut second = Machine::with(&scratch, "b", &bucket, postgres.clone());
    second.start(&[]).ready();
    second.sql("INSERT INTO t VALUES (3)");
    sees(&standby.machine, "SELECT count(*) FROM t", "3");
    assert_eq!(second.stop(), 0);
    stop(&mut standby);
    drop(standby);
    let mut third = Machine::with(&scratch, "s", &bucket, postgres);
    third.start(&[]).ready();
    assert_eq!(third.sql("SELECT count(*) FROM t"), "3");
    assert_eq!(third.stop(), 0);
}
