//! A second database out of the first: for a try, for a test system. It must not touch what it comes from.

use std::collections::BTreeMap;

use crate::support::*;

const REFUSED: i32 = 73;
const USAGE: i32 = 2;

/// The objects of a repository on a disk, with sizes and times.
fn objects(bucket: &Bucket) -> BTreeMap<String, (u64, std::time::SystemTime)> {
    let files = all_files(&bucket.path()).into_iter();
    let facts = files.map(|path| {
        let metadata = std::fs::metadata(&path).expect("there");
        (path.display().to_string(), (metadata.len(), metadata.modified().expect("a time")))
    });
    facts.collect()
}

#[test]
fn a_clone_goes_its_own_way_and_leaves_no_trace_where_it_comes_from() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let own = Bucket { url: format!("file://{}", scratch.dir("own").display()), env: Vec::new() };
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms", "--heartbeat=0"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT 1 AS n");
    machine.sql("SELECT pg_create_restore_point('before_the_mistake')");
    machine.sql("DELETE FROM t");
    machine.archived();
    machine.kill();
    let before = objects(&bucket);

    let mut clone = Machine::new(&scratch, "c", &own);
    let directory = clone.data_dir();
    let arguments =
        ["clone", "--to", &own.url, "-D", directory.to_str().expect("text"), "--to-name=before_the_mistake"];
    assert!(bucket.must(&[&arguments[..], &["--dry-run"]].concat()).contains("would clone"));
    assert!(all_files(&own.path()).is_empty());
    assert!(bucket.must(&arguments).contains("--adopt"));
    clone.start(&["--adopt", "--rpo=20ms"]).ready().with_backup();
    assert_eq!(clone.sql("SELECT count(*) FROM t"), "1", "of the moment that was asked for");
    clone.sql("INSERT INTO t VALUES (2)");
    clone.archived();
    clone.vanish();
    assert_eq!(objects(&bucket), before, "nothing was written, changed or deleted");

    // It is a database like any other from here on: its own repository is all that its next machine needs.
    let mut next = Machine::new(&scratch, "d", &own);
    next.start(&["--rpo=20ms"]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM t"), "2");
    assert_eq!(next.stop(), 0);
    // And the first one is what it was.
    machine.start(&["--rpo=20ms"]).ready();
    assert_eq!(machine.sql("SELECT count(*) FROM t"), "0");
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_clone_does_not_go_into_a_repository_that_is_in_use() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let own = Bucket { url: format!("file://{}", scratch.dir("own").display()), env: Vec::new() };
    for (name, bucket) in [("a", &bucket), ("b", &own)] {
        let mut machine = Machine::new(&scratch, name, bucket);
        machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
        assert_eq!(machine.stop(), 0);
    }
    let directory = scratch.path().join("clone");
    let arguments = |to: &str| ["clone".to_owned(), format!("--to={to}"), format!("-D{}", directory.display())];
    let refused = |to: &str, code| {
        let arguments = arguments(to);
        bucket.must_fail(&arguments.each_ref().map(String::as_str), code)
    };
    assert!(refused(&own.url, REFUSED).contains("is the repository of a database already"));
    refused(&bucket.url, USAGE);
    assert!(!directory.join("PG_VERSION").exists());
}
