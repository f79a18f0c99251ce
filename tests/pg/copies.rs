//! The bucket's region is gone too: a second place has the repository.

use crate::support::*;

const CONFLICT: i32 = 78;
const REFUSED: i32 = 73;

fn copy(from: &Bucket, to: &Bucket) -> serde_json::Value {
    let mut command = from.command(&["copy", "--to", &to.url, "--json"]);
    // What the second place needs of its own.
    command.envs(to.env.iter().map(|(name, value)| (format!("PERENNIAL_TO_{name}"), value)));
    let output = command.output().expect("runs");
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_str(&String::from_utf8(output.stdout).expect("text")).expect("JSON")
}

fn rows(machine: &Machine) -> String {
    machine.sql("SELECT count(*), sum(hashtext(t::text)) FROM t")
}

#[test]
fn the_copy_in_another_place_is_booted_when_the_bucket_is_gone() {
    let scratch = Scratch::new();
    let (bucket, second) = (Bucket::s3(), Bucket::directory(&scratch));
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
    machine.archived();
    // While it writes: the copy is of some moment, and a sound one.
    let first = copy(&bucket, &second);
    assert!(first["report"]["backups"] == 1 && first["report"]["bytes"].as_u64().expect("bytes") > 1 << 20, "{first}");
    second.must(&["verify", "--full"]);
    machine.sql("INSERT INTO t SELECT n, 'later' FROM generate_series(1, 1000) n");
    machine.segment_stored();
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    machine.sql("INSERT INTO t VALUES (0, 'the last')");
    let before = rows(&machine);
    machine.archived();
    let again = copy(&bucket, &second);
    assert!(again["report"]["backups"] == 1, "{again}");
    assert!(again["report"]["bytes"].as_u64() < first["report"]["bytes"].as_u64(), "{again}");
    assert_eq!(copy(&bucket, &second)["report"]["backups"], 0);
    second.must(&["verify", "--full"]);
    machine.vanish();

    let mut next = Machine::new(&scratch, "b", &second);
    next.start(&["--rpo=20ms"]).ready();
    assert_eq!(rows(&next), before);
    next.sql("INSERT INTO t VALUES (-1, 'in the second place')");
    assert_eq!(next.stop(), 0);
    // It has a life of its own now, and so may the first.
    let refused = bucket.command(&["copy", "--to", &second.url]).output().expect("runs");
    assert_eq!(refused.status.code(), Some(CONFLICT), "{}", text(&refused));
    assert!(text(&refused).contains("a life of its own"), "{}", text(&refused));
}

#[test]
fn a_second_place_that_something_keeps_current_has_all_but_the_last_moments() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let second = Bucket { url: format!("file://{}", scratch.dir("second").display()), env: Vec::new() };
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms", "--also-to", &second.url, "--also-every=100ms"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 1000) n");
    let written = machine.sql("SELECT pg_current_wal_flush_lsn()");
    let before = rows(&machine);
    let durable = |bucket: &Bucket| {
        let status = bucket.command(&["status", "--json"]).output().expect("runs");
        let status: Option<serde_json::Value> = serde_json::from_slice(&status.stdout).ok();
        status.and_then(|status| status["durable"]["through_lsn"].as_str().map(str::to_owned))
    };
    let has = |lsn: String| machine.sql(&format!("SELECT '{lsn}'::pg_lsn >= '{written}'::pg_lsn")) == "t";
    wait_until("the second place has it", || {
        second.command(&["list"]).output().expect("runs").status.success() && durable(&second).is_some_and(has)
    });
    wait_until("the backup too", || second.json(&["list"])["backups"].as_array().is_some_and(|all| all.len() == 1));
    machine.vanish();
    let mut next = Machine::new(&scratch, "b", &second);
    next.start(&[]).ready();
    assert_eq!(rows(&next), before);
    assert_eq!(next.stop(), 0);
}

#[test]
fn a_copy_goes_nowhere_where_something_else_is() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    bucket.must(&["init", &bucket.url]);
    let other = Bucket { url: format!("file://{}", scratch.dir("other").display()), env: Vec::new() };
    other.must(&["init", &other.url]);
    bucket.must_fail(&["copy", "--to", &other.url], REFUSED);
    let photos = scratch.dir("photos");
    std::fs::write(photos.join("one"), "precious").expect("written");
    bucket.must_fail(&["copy", "--to", &format!("file://{}", photos.display())], REFUSED);
    assert_eq!(all_files(&photos).len(), 1);
}
