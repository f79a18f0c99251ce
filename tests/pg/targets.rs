//! Every way to name a point of the past, and what is said when it cannot be reached.

use crate::support::*;

const NOT_FOUND: i32 = 66;
const REFUSED: i32 = 73;

struct Past {
    scratch: Scratch,
    bucket: Bucket,
    time: String,
    lsn: String,
    xid: String,
    end: String,
}

/// A server that wrote 1, 2 and 3 and remembers the moment after 2 by every name.
fn past() -> Past {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t (id int)");
    machine.sql("INSERT INTO t VALUES (1)");
    let xid = machine.sql("BEGIN; INSERT INTO t VALUES (2); SELECT pg_current_xact_id(); COMMIT");
    let lsn = machine.sql("SELECT pg_current_wal_insert_lsn()");
    machine.sql("SELECT pg_create_restore_point('before three')");
    let time = machine.sql("SELECT clock_timestamp() FROM pg_sleep(0.05)");
    machine.sql("INSERT INTO t SELECT 3 FROM pg_sleep(0.05)");
    machine.archived();
    let end = machine.sql("SELECT clock_timestamp()");
    // No commit any more, but WAL that shows that time went on.
    machine.sql("SELECT pg_create_restore_point('the end')");
    machine.archived();
    assert_eq!(machine.stop(), 0);
    Past { scratch, bucket, time, lsn, xid, end }
}

impl Past {
    fn restored(&self, name: &str, target: &[&str], paused: bool) -> String {
        let data = self.scratch.dir(name).join("data");
        self.bucket.must(&[&["restore", "-D", data.to_str().expect("text")], target].concat());
        let copy = Plain::start(&self.scratch, name, &self.bucket, &Postgres::debian()).up(paused);
        if paused {
            wait_until("recovery is paused", || {
                copy.machine.try_sql("SELECT pg_is_wal_replay_paused()").is_ok_and(|paused| paused == "t")
            });
        }
        copy.machine.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t")
    }

    fn refused(&self, target: &[&str], code: i32) -> String {
        let data = self.scratch.path().join("never");
        let said = self.bucket.must_fail(&[&["restore", "-D", data.to_str().expect("text")], target].concat(), code);
        assert!(!data.exists(), "something was written for a target that cannot be reached");
        said
    }
}

#[test]
fn a_moment_is_reached_by_time_position_transaction_and_name() {
    let past = past();
    assert_eq!(past.restored("time", &["--to-time", &past.time], false), "1,2");
    assert_eq!(past.restored("lsn", &["--to-lsn", &past.lsn], false), "1,2");
    assert_eq!(past.restored("xid", &["--to-xid", &past.xid], false), "1,2");
    assert_eq!(past.restored("before", &["--to-xid", &past.xid, "--exclusive"], false), "1");
    assert_eq!(past.restored("name", &["--to-name", "before three"], false), "1,2");
    assert_eq!(past.restored("newest", &[], false), "1,2,3");
    assert_eq!(past.restored("paused", &["--to-time", &past.time, "--action", "pause"], true), "1,2");
    // After the last commit, before the last push: nothing happened in between, so it is the newest state.
    assert_eq!(past.restored("end", &["--to-time", &past.end], false), "1,2,3");
}

/// The number of a prepared transaction stands at the end of a long record, behind everything else it did.
fn a_prepared_transaction_is_a_target(postgres: Postgres) {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::with(&scratch, "a", &bucket, postgres.clone());
    machine.start(&["--init", "--", "-c", "max_prepared_transactions=5"]).ready().with_backup();
    machine.sql("CREATE TABLE t (id int); CREATE TABLE old AS SELECT generate_series(1, 100) AS id; ANALYZE old");
    let xid = machine.sql(
        "BEGIN; INSERT INTO t VALUES (1); SAVEPOINT s; INSERT INTO t VALUES (2); DROP TABLE old; CREATE TABLE new (id int PRIMARY KEY);
         SELECT pg_current_xact_id(); PREPARE TRANSACTION 'two phases'",
    );
    machine.sql("INSERT INTO t VALUES (3)");
    machine.sql("COMMIT PREPARED 'two phases'");
    machine.sql("INSERT INTO t VALUES (4)");
    machine.archived();
    assert_eq!(machine.stop(), 0);
    let data = scratch.dir("copy").join("data");
    bucket.must(&["restore", "-D", data.to_str().expect("text"), "--to-xid", &xid]);
    let copy = Plain::start(&scratch, "copy", &bucket, &postgres).up(false);
    assert_eq!(copy.machine.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t"), "1,2,3");
}

#[test]
fn a_prepared_transaction_is_a_target_on_postgresql_15() {
    a_prepared_transaction_is_a_target(Postgres::debian());
}

#[test]
fn a_prepared_transaction_is_a_target_on_postgresql_18() {
    a_prepared_transaction_is_a_target(Postgres::major(18));
}

#[test]
fn a_point_that_cannot_be_reached_is_refused_before_a_byte_is_written() {
    let past = past();
    for target in [
        &["--to-time", "2100-01-01 00:00:00+00"][..],
        &["--to-time", "2001-01-01 00:00:00+00"],
        &["--to-lsn", "FF/0"],
        &["--to-lsn", "0/100"],
        &["--to-xid", "4000000"],
        &["--to-name", "never made"],
    ] {
        let said = past.refused(target, NOT_FOUND);
        assert!(said.contains("reachable on timeline 1"), "names no range: {said}");
    }
    assert!(past.refused(&["--backup", "00000001-0000000000000028-0000"], NOT_FOUND).contains("no backup"));
    past.refused(&["--generation", "7"], NOT_FOUND);
    past.refused(&["--timeline", "7"], NOT_FOUND);
}

#[test]
fn a_directory_with_something_in_it_is_not_overwritten_unless_forced() {
    let past = past();
    let data = past.scratch.dir("full");
    let file = data.join("precious");
    std::fs::write(&file, b"x").expect("written");
    give(&file);
    past.bucket.must_fail(&["restore", "-D", data.to_str().expect("text")], REFUSED);
    assert!(file.exists());
    past.bucket.must(&["restore", "--force", "-D", data.to_str().expect("text")]);
    assert!(!file.exists() && data.join("PG_VERSION").exists());
}

#[test]
fn a_copy_does_not_do_what_its_server_was_told_as_a_standby() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    let marks = scratch.dir("marks");
    let of_a_standby = format!(
        "\nrecovery_end_command = 'touch {0}/ended'\narchive_cleanup_command = 'touch {0}/cleaned'\nrecovery_min_apply_delay = '1d'\n",
        marks.display()
    );
    let file = machine.data_dir().join("postgresql.conf");
    let before = std::fs::read_to_string(&file).expect("read");
    std::fs::write(&file, before + &of_a_standby).expect("written");
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    machine.sql("CREATE TABLE t AS SELECT 1 AS n; CHECKPOINT");
    machine.segment_stored();
    machine.vanish();
    let data = scratch.dir("b").join("data");
    bucket.must(&["restore", "-D", data.to_str().expect("text")]);
    let copy = Plain::start(&scratch, "b", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql("SELECT n FROM t"), "1");
    assert_eq!(all_files(&marks), Vec::<std::path::PathBuf>::new());
}
