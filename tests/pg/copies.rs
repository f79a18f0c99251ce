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

/// Takes one backup to the second place; how many objects were new.
fn copy_one(from: &Bucket, to: &Bucket, id: &str) -> u64 {
    let output = from.command(&["copy", "--to", &to.url, "--backup", id, "--json"]).output().expect("runs");
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["report"]["objects"].as_u64().expect("a number")
}

/// Nothing is missing there, and nothing is said to be.
fn is_calm(bucket: &Bucket, backups: usize) {
    let said = bucket.must(&["verify", "--full"]);
    assert!(said.contains("everything that is listed can be restored"), "{said}");
    let list = bucket.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(backups), "{list}");
    let windows = list["windows"].as_array().expect("windows");
    assert!(!windows.is_empty() && windows.iter().all(|window| window["missing_segment"].is_null()), "{list}");
}

/// Restores a backup to its own end; its rows.
fn as_it_was(scratch: &Scratch, bucket: &Bucket, id: &str) -> String {
    let name = format!("then-{}", &id[9..]);
    let mut copy = Machine::new(scratch, &name, bucket);
    bucket.must(&["restore", "--backup", id, "--immediate", "-D", copy.data_dir().to_str().expect("text")]);
    let plain = Plain::start(scratch, &name, bucket, &Postgres::debian()).up(false);
    let rows = rows(&plain.machine);
    drop(plain);
    copy.wipe();
    rows
}

fn backup(machine: &Machine) -> String {
    let done = machine.bucket.json(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    done["backup"]["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_single_backup_is_put_aside_and_restored_without_all_the_rest() {
    let scratch = Scratch::new();
    let second = Bucket { url: format!("file://{}", scratch.path().join("archive").display()), env: Vec::new() };
    singles(&scratch, &Bucket::directory(&scratch), &second, &[]);
}

#[test]
fn a_single_backup_of_an_encrypted_repository_stays_encrypted() {
    let scratch = Scratch::new();
    let identity = scratch.path().join("identity");
    let secret = age::x25519::Identity::generate().to_string();
    std::fs::write(&identity, age::secrecy::ExposeSecret::expose_secret(&secret)).expect("written");
    give(&identity);
    let opened = |bucket: Bucket| bucket.with_env("PERENNIAL_IDENTITY_FILE", identity.to_str().expect("text"));
    let second = Bucket { url: format!("file://{}", scratch.path().join("archive").display()), env: Vec::new() };
    singles(&scratch, &opened(Bucket::directory(&scratch)), &opened(second), &["--encrypt"]);
}

fn singles(scratch: &Scratch, bucket: &Bucket, second: &Bucket, init: &[&str]) {
    let mut machine = Machine::new(scratch, "a", bucket);
    machine.start(&[&["--init", "--rpo=20ms"], init].concat()).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
    let mut states = Vec::new();
    for n in 0..3 {
        machine.sql(&format!("INSERT INTO t SELECT n, 'state {n}' FROM generate_series(1, 1000) n"));
        states.push((rows(&machine), backup(&machine)));
        machine.sql("INSERT INTO t VALUES (0, 'after it')");
        machine.segment_stored();
        machine.segment_stored();
        if n == 1 {
            // The last one is of another life, on another timeline.
            machine.archived();
            machine.vanish();
            machine.start(&["--rpo=20ms"]).ready();
        }
    }
    // The newest first, then an older one, then what lies between them.
    for (count, n) in [2, 0, 1].into_iter().enumerate() {
        let (then, id) = &states[n];
        assert!(copy_one(bucket, second, id) > 0);
        is_calm(second, count + 1);
        assert_eq!(&as_it_was(scratch, second, id), then, "{id}");
        assert_eq!(copy_one(bucket, second, id), 0, "it is there already");
    }
    let taken =
        |bucket: &Bucket| all_files(&bucket.path()).iter().map(|f| f.metadata().expect("there").len()).sum::<u64>();
    assert!(taken(second) < taken(bucket));

    // Cut off before its end it does not exist; the next copy brings what is missing.
    let (then, id) = &states[0];
    let lost = second.path().join(format!("backups/{id}/manifest"));
    std::fs::remove_file(&lost).expect("removed");
    let segment = all_files(&second.path().join("generations/00000001/wal")).into_iter().next().expect("a segment");
    std::fs::remove_file(&segment).expect("removed");
    is_calm(second, 2);
    assert_eq!(copy_one(bucket, second, id), 2);
    is_calm(second, 3);
    assert_eq!(&as_it_was(scratch, second, id), then);

    let unknown = bucket.must_fail(&["copy", "--to", &second.url, "--backup", "00000001-0000000000000028-0000"], 66);
    assert!(unknown.contains("has no backup"), "{unknown}");
    // All of it fits beside them, and the place is a repository: it can be booted.
    assert_eq!(machine.stop(), 0);
    let all = rows_of_newest(scratch, bucket);
    copy(bucket, second);
    is_calm(second, 4);
    let mut next = Machine::new(scratch, "b", second);
    next.start(&[]).ready();
    assert_eq!(rows(&next), all);
    assert_eq!(next.stop(), 0);
}

fn rows_of_newest(scratch: &Scratch, bucket: &Bucket) -> String {
    let newest = Machine::new(scratch, "newest", bucket);
    bucket.must(&["restore", "-D", newest.data_dir().to_str().expect("text")]);
    rows(&Plain::start(scratch, "newest", bucket, &Postgres::debian()).up(false).machine)
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
