//! Backups of standbys: as good as the primary's own, and none where the standby is not what the bucket has.

use std::process::Command;

use crate::support::*;

const REFUSED: i32 = 73;
const POSTGRES: i32 = 76;

const ROWS: &str = "SELECT md5(string_agg(text, ',' ORDER BY n)) FROM t";

fn of(machine: &Machine) -> String {
    machine.data_dir().to_str().expect("text").to_owned()
}

fn back_up(machine: &Machine) -> serde_json::Value {
    machine.bucket.json(&["backup", "-D", &of(machine)])["backup"].clone()
}

fn restored(scratch: &Scratch, name: &str, bucket: &Bucket, postgres: &Postgres, more: &[&str]) -> Plain {
    let data = scratch.dir(name).join("data");
    bucket.must(&[&["restore", "-D", data.to_str().expect("text")], more].concat());
    Plain::start(scratch, name, bucket, postgres)
}

fn lsn(json: &serde_json::Value) -> u64 {
    let (high, low) = json.as_str().expect("a position").split_once('/').expect("two parts");
    let hex = |digits| u64::from_str_radix(digits, 16).expect("hexadecimal");
    hex(high) << 32 | hex(low)
}

fn sees(standby: &Plain, statement: &str) {
    wait_until(statement, || standby.machine.try_sql(statement).is_ok_and(|said| said == "t"));
}

/// A copy of a running server that streams from it, as `pg_basebackup -R` makes it.
fn streaming(scratch: &Scratch, name: &str, from: &Machine) -> Plain {
    let data = scratch.dir(name).join("data");
    let mut copy = from.client("pg_basebackup");
    let copied = copy.args(["-R", "-c", "fast", "-D"]).arg(&data).output().expect("pg_basebackup runs");
    assert!(copied.status.success(), "{}", text(&copied));
    Plain::start(scratch, name, &from.bucket, &Postgres::debian()).up(true)
}

#[test]
fn a_backup_of_a_standby_spares_the_primary_and_is_as_good_as_its_own() {
    as_good_as_its_own(15);
}

#[test]
fn a_backup_of_a_standby_on_postgresql_13() {
    as_good_as_its_own(13);
}

#[test]
fn a_backup_of_a_standby_on_postgresql_18() {
    as_good_as_its_own(18);
}

fn as_good_as_its_own(major: u32) {
    let (scratch, postgres) = (Scratch::new(), Postgres::major(major));
    let bucket = Bucket::directory(&scratch);
    let mut primary = Machine::with(&scratch, "a", &bucket, postgres.clone());
    primary.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    primary.sql("CREATE TABLE t AS SELECT n, repeat('x', 500) AS text FROM generate_series(1, 20000) n");
    let standby = restored(&scratch, "s", &bucket, &postgres, &["--standby"]).up(true);
    let mut taken = Vec::new();
    for n in 1..=2 {
        primary.sql(&format!("UPDATE t SET text = 'round {n}' WHERE n % 7 = {n}"));
        primary.sql("CHECKPOINT");
        primary.segment_stored();
        sees(&standby, &format!("SELECT count(*) > 0 FROM t WHERE text = 'round {n}'"));
        // What the standby is in the middle of is an object once the primary has begun another segment.
        primary.segment_stored();
        taken.push(back_up(&standby.machine));
    }
    assert_eq!(taken[1]["parent"], taken[0]["id"], "{taken:?}");
    assert_eq!(taken[1]["generation"], 1, "a standby claims nothing: {taken:?}");
    let rows = primary.sql(ROWS);
    primary.archived();
    bucket.must(&["verify", "--full"]);
    for (name, backup) in ["r1", "r2"].into_iter().zip(&taken) {
        let id = backup["id"].as_str().expect("an id");
        let restored = restored(&scratch, name, &bucket, &postgres, &["--backup", id]).up(false);
        assert_eq!(restored.machine.sql(ROWS), rows);
    }
    drop(standby);
    let standby = Machine::with(&scratch, "s", &bucket, postgres.clone());
    bucket.must_fail(&["backup", "-D", &of(&standby)], POSTGRES);
    // And the next machine boots from it.
    primary.vanish();
    let mut next = Machine::with(&scratch, "b", &bucket, postgres);
    next.start(&["--rpo=20ms"]).ready();
    assert_eq!(next.sql(ROWS), rows);
}

#[test]
fn a_standby_that_lags_builds_on_no_later_backup_and_needs_no_wal_that_was_pruned() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut primary = Machine::new(&scratch, "a", &bucket);
    // What the standby has not replayed yet it has not received either.
    let keeps = ["--", "-c", "wal_keep_size=1GB"];
    primary.start(&[&["--init", "--rpo=20ms"][..], &keeps].concat()).ready().with_backup();
    let first = bucket.json(&["list"])["backups"][0]["id"].clone();
    primary.sql("CREATE TABLE t AS SELECT n, repeat('x', 500) AS text FROM generate_series(1, 20000) n");
    primary.sql("CHECKPOINT");
    let standby = streaming(&scratch, "s", &primary);
    let rows = primary.sql(ROWS);
    sees(&standby, "SELECT count(*) = 20000 FROM t");
    standby.machine.sql("CHECKPOINT");
    standby.machine.sql("SELECT pg_wal_replay_pause()");
    sees(&standby, "SELECT pg_get_wal_replay_pause_state() = 'paused'");
    // Started anew, the primary archives under another generation: the standby's backup begins under the one before.
    assert_eq!(primary.stop(), 0);
    primary.start(&[&["--rpo=20ms"][..], &keeps].concat()).ready();
    primary.sql("UPDATE t SET text = 'later'");
    let later = back_up(&primary);
    primary.segment_stored();
    let taken = back_up(&standby.machine);
    assert!(lsn(&taken["stop_lsn"]) < lsn(&later["start_lsn"]), "{taken} {later}");
    assert_eq!((&taken["parent"], &taken["generation"]), (&first, &serde_json::json!(2)), "{taken}");
    let id = taken["id"].as_str().expect("an id");
    let back = restored(&scratch, "r", &bucket, &Postgres::debian(), &["--backup", id, "--immediate"]).up(false);
    assert_eq!(back.machine.sql(ROWS), rows, "as the standby was");
    primary.archived();
    let on = restored(&scratch, "on", &bucket, &Postgres::debian(), &["--backup", id]).up(false);
    assert_eq!(on.machine.sql("SELECT count(*) FROM t WHERE text = 'later'"), "20000", "and on to the end");
    bucket.must(&["verify", "--full"]);

    // All points are kept from the primary's backup on only: the standby has not come so far.
    let last = back_up(&primary);
    bucket.must(&["prune", "--keep-last", "1"]);
    let refused = bucket.must_fail(&["backup", "-D", &of(&standby.machine)], REFUSED);
    assert!(refused.contains("prunes keep all of it from") && refused.contains("CHECKPOINT"), "{refused}");
    standby.machine.sql("SELECT pg_wal_replay_resume()");
    sees(&standby, "SELECT count(*) = 20000 FROM t WHERE text = 'later'");
    primary.sql("CHECKPOINT");
    primary.segment_stored();
    sees(&standby, "SELECT count(*) = 2 FROM something");
    let taken = back_up(&standby.machine);
    assert_eq!(taken["parent"], last["id"], "{taken}");
    primary.archived();
    bucket.must(&["drill"]);
}

#[test]
fn a_standby_of_the_primarys_twin_makes_no_backup() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut primary = Machine::new(&scratch, "a", &bucket);
    primary.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    primary.sql("CREATE TABLE t AS SELECT 1 AS n");
    assert_eq!(primary.stop(), 0);
    // The same disk twice: system, timeline and positions are the same, and each goes on.
    let mut twin = Machine::new(&scratch, "twin", &bucket);
    let copied = Command::new("cp").arg("-a").arg(primary.data_dir()).arg(twin.data_dir()).status();
    assert!(copied.expect("cp runs").success());
    primary.start(&["--rpo=20ms"]).ready();
    twin.serve(&["-c", "archive_mode=off"]);
    for (machine, n) in [(&primary, 2), (&twin, 3)] {
        machine.sql(&format!("INSERT INTO t VALUES ({n}); CHECKPOINT; SELECT pg_switch_wal()"));
    }
    primary.segment_stored();
    let standby = streaming(&scratch, "s", &twin);
    twin.sql("CREATE TABLE more AS SELECT 4 AS n");
    sees(&standby, "SELECT count(*) = 1 FROM more");
    // The primary has all WAL there up to where the standby's backup ends.
    for _ in 0..4 {
        primary.segment_stored();
    }
    let before = bucket.json(&["list"])["backups"].as_array().map(Vec::len);
    let refused = bucket.must_fail(&["backup", "-D", &of(&standby.machine)], REFUSED);
    assert!(refused.contains("another history of the same cluster"), "{refused}");
    assert_eq!(bucket.json(&["list"])["backups"].as_array().map(Vec::len), before);
    // One that follows the primary makes one.
    let own = streaming(&scratch, "own", &primary);
    primary.segment_stored();
    assert!(back_up(&own.machine)["id"].is_string());
    twin.kill();
}
