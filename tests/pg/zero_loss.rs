//! What an acknowledged commit is worth: the live log, its fence, and nothing lost.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::clients::{Clients, ledger};
use crate::support::*;

const FENCED: i32 = 75;

/// kill -9 of everything under load, disk gone, another machine from the address alone; what of the acknowledged is missing.
fn missing_after_a_death(rpo: &str, bucket: Bucket) -> (usize, Vec<Duration>) {
    let scratch = Scratch::new();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo", rpo]).ready().with_backup();
    let clients = Clients::start(&first, 8, 0);
    // So that what is lost lies within the life of the load.
    first.archived();
    clients.wait_for(if rpo == "0" { 300 } else { 5000 });
    let died = Instant::now();
    first.vanish();
    let told = clients.end();
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--rpo", rpo]).ready();
    let there = ledger(&second);
    let missing = told.iter().filter(|(_, id)| !there.contains(id)).map(|(at, _)| died.saturating_duration_since(*at));
    let missing = missing.collect();
    assert_eq!(second.stop(), 0);
    (told.len(), missing)
}

#[test]
fn at_rpo_zero_no_acknowledged_commit_is_lost_with_the_machine() {
    let (told, missing) = missing_after_a_death("0", Bucket::s3());
    assert!(missing.is_empty(), "{} of {told} acknowledged commits are missing", missing.len());
}

#[test]
fn at_rpo_one_second_at_most_the_last_second_and_a_half_is_lost() {
    let (told, missing) = missing_after_a_death("1s", Bucket::s3());
    let oldest = missing.iter().max().copied().unwrap_or_default();
    assert!(oldest < Duration::from_millis(1500), "{} of {told} are missing, the oldest {oldest:?} old", missing.len());
}

#[test]
fn a_paused_machine_that_was_replaced_wakes_up_fenced_and_nothing_acknowledged_is_lost() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=0"]).ready().with_backup();
    let at_first = Clients::start(&first, 8, 0);
    at_first.wait_for(200);
    first.pause();
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--rpo=0"]).ready();
    let at_second = Clients::start(&second, 4, 500_000_000);
    at_second.wait_for(50);
    let woken = Instant::now();
    first.resume();
    assert_eq!(first.ended(), FENCED);
    assert!(woken.elapsed() < Duration::from_secs(5), "it took {:?} to notice", woken.elapsed());
    assert!(first.log().contains("another machine has taken over"), "{}", first.log());
    assert!(!first.log().contains("ended at 0/0"), "it says where the histories part: {}", first.log());
    assert!(first.data_dir().join("PG_VERSION").exists(), "its directory is kept");
    at_second.wait_for(50);
    let told: Vec<u64> = at_first.end().into_iter().chain(at_second.end()).map(|(_, id)| id).collect();
    let there = ledger(&second);
    let missing: Vec<_> = told.iter().filter(|id| !there.contains(id)).collect();
    assert!(missing.is_empty(), "{} of {} acknowledged commits are missing", missing.len(), told.len());

    // It does not come back by itself and fence the winner in turn.
    first.start(&["--rpo=0"]);
    assert_eq!(first.ended(), FENCED);
    assert_eq!(second.stop(), 0);
}

#[test]
fn a_spare_waits_for_a_living_writer_and_takes_over_once_it_is_silent() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--heartbeat=1s"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 1 AS id");
    first.archived();
    let mut spare = Machine::new(&scratch, "b", &bucket);
    spare.start(&["--takeover-after=4s"]).wait_for("waiting as a spare");
    // Longer than it would wait for a dead one: heartbeats of an idle server keep it back.
    std::thread::sleep(Duration::from_secs(8));
    assert!(!spare.log().contains("claimed generation"), "{}", spare.log());
    first.vanish();
    let died = Instant::now();
    spare.ready();
    let took = died.elapsed();
    assert!(took > Duration::from_secs(2), "it did not wait: {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(spare.sql("SELECT count(*) FROM t"), "1");
}

#[test]
fn a_spare_that_is_told_to_stop_just_stops() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    let mut spare = Machine::new(&scratch, "b", &bucket);
    spare.start(&["--takeover-after=60s"]).wait_for("waiting as a spare");
    assert_eq!(spare.stop(), 0);
    assert!(!spare.data_dir().join("PG_VERSION").exists(), "it has begun nothing");
    assert_eq!(first.sql("SELECT 1"), "1");
    assert_eq!(first.stop(), 0);
}

#[test]
fn a_machine_that_dies_between_a_segment_switch_and_its_padding_leaves_no_gap_behind() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=0"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT 1 AS id");
    first.archived();
    let log = bucket.path().join("generations/00000001/log");
    let entries = || {
        let mut all: Vec<_> =
            std::fs::read_dir(&log).expect("listed").map(|entry| entry.expect("an entry").path()).collect();
        all.sort();
        all
    };
    let before = entries().len();
    let switched = first.sql("SELECT pg_walfile_name(pg_switch_wal())");
    wait_until("the segment is stored", || first.log().contains(&format!("pushed {switched}")));
    first.vanish();
    // As if it had died with all but the first of the segment's last entries on their way.
    entries().iter().skip(before + 1).for_each(|entry| std::fs::remove_file(entry).expect("removed"));
    let object = format!("generations/00000001/wal/{}/{}/{switched}.zst", &switched[..8], &switched[8..16]);
    std::fs::remove_file(bucket.path().join(object)).expect("removed");

    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--rpo=0", "--backup-every=1d"]).ready();
    let left = second.sql("SELECT pg_read_file('pg_wal/00000002.history')");
    assert!(left.contains("000000\t"), "it recovered to the end of the switched segment: {left}");
    second.sql("INSERT INTO t VALUES (2)");
    second.vanish();
    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&["--rpo=0"]).ready();
    assert_eq!(third.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t"), "1,2");
    assert_eq!(third.stop(), 0);
}

#[test]
fn a_clean_stop_under_load_loses_nothing_and_the_next_machine_need_not_wait() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=5m"]).ready().with_backup();
    let clients = Clients::start(&first, 8, 0);
    clients.wait_for(1000);
    assert_eq!(first.stop(), 0, "{}", first.log());
    assert!(first.log().contains("released: everything up to"), "{}", first.log());
    let told = clients.end();
    first.wipe();
    let mut second = Machine::new(&scratch, "b", &bucket);
    let began = Instant::now();
    second.start(&["--takeover-after=10m"]).ready();
    assert!(began.elapsed() < Duration::from_secs(60), "it waited for a writer that had released");
    let there = ledger(&second);
    let missing = told.iter().filter(|(_, id)| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} commits, none of which waited for the bucket", told.len());
}

#[test]
fn nobody_reads_what_is_not_durable_before_the_port_opens() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.kill();
    machine.start(&[]);
    machine.wait_for("database system is ready to accept connections");
    let first = machine.log();
    let (_, after) = first.split_once("database system is ready to accept connections").expect("said");
    if !after.contains("ready to accept connections") {
        assert!(machine.try_sql("SELECT 1").is_err(), "the public socket was there in the first stage");
    }
    machine.ready();
    machine.sql("SELECT 1");
}

/// Pauses and resumes a machine as a hypervisor would: every process of it.
trait Pausable {
    fn pause(&self);
    fn resume(&self);
}

impl Pausable for Machine {
    fn pause(&self) {
        self.signal_all(Signal::SIGSTOP);
    }

    fn resume(&self) {
        self.signal_all(Signal::SIGCONT);
    }
}
