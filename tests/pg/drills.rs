//! A restore that is tried before it is needed: in a sandbox, and what is wrong is told by name.

use crate::support::*;

/// What a drill must not touch: the living server's generations, slots and files of tablespaces.
fn living(machine: &Machine, space: &std::path::Path) -> String {
    let files: Vec<String> = all_files(space).iter().map(|path| path.display().to_string()).collect();
    let list = machine.bucket.json(&["list"]);
    format!(
        "{} {} {files:?}",
        list["generations"].as_array().expect("a list").len(),
        machine.sql("SELECT string_agg(slot_name || active, ',') FROM pg_replication_slots")
    )
}

#[test]
fn a_drill_proves_the_newest_state_and_touches_nothing_of_the_living() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    let (space, place) = (scratch.dir("space"), scratch.dir("drills"));
    machine.start(&["--init", "--rpo=0"]).ready();
    machine.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    machine.sql("CREATE TABLE t (id int PRIMARY KEY) TABLESPACE fast");
    machine.with_backup();
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    machine.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    machine.sql("CHECKPOINT");
    let before = living(&machine, &space);

    let place_name = place.to_str().expect("text").to_owned();
    let drill = ["drill", "--in", &place_name, "--check", "SELECT count(*) = 1000 FROM t"];
    let done = bucket.json(&drill);
    let record = &done["drill"];
    assert_eq!(record["failures"].as_array().map(Vec::len), Some(0), "{record}");
    let checked = record["checked"].to_string();
    assert!(checked.contains("amcheck") && checked.contains("pg_checksums") && checked.contains("1000"), "{record}");
    assert!(record["restore_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{record}");
    assert_eq!(all_files(&place), Vec::<std::path::PathBuf>::new(), "the sandbox is gone");
    assert_eq!(living(&machine, &space), before);

    let wrong = ["drill", "--in", &place_name, "--check", "SELECT count(*) = 7 FROM t", "--no-amcheck"];
    let said = bucket.must_fail(&wrong, 65);
    assert!(said.contains("count(*) = 7") && said.contains("false"), "{said}");
    machine.sql("INSERT INTO t VALUES (1001)");

    // Replaying that would go into the living tablespace: the WAL says where it is, and no map can say otherwise.
    let another = scratch.dir("another");
    machine.sql(&format!("CREATE TABLESPACE young LOCATION '{}'", another.display()));
    machine.sql("CREATE TABLE u TABLESPACE young AS SELECT generate_series(1, 1000) AS id");
    machine.sql("CHECKPOINT");
    let before = living(&machine, &another);
    let said = bucket.must_fail(&drill, 65);
    assert!(said.contains("a tablespace is made in"), "{said}");
    assert_eq!(living(&machine, &another), before);
    assert_eq!(machine.sql("SELECT count(*), sum(id) FROM u"), "1000|500500");
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    bucket.must(&["drill", "--in", &place_name, "--check", "SELECT count(*) = 1000 FROM u"]);
    assert_eq!(all_files(&place), Vec::<std::path::PathBuf>::new(), "no sandbox is left");
    assert_eq!(living(&machine, &another), before);
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_drill_by_schedule_names_the_backup_the_object_and_the_cure_when_a_pack_is_damaged() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    let place = scratch.dir("drills");
    let within = format!("--drill-in={}", place.display());
    machine.start(&["--init", "--drill-every=1s", &within]).ready().with_backup();
    machine.wait_for("restores, recovers and is sound");
    let id = bucket.json(&["list"])["backups"][0]["id"].as_str().expect("an id").to_owned();
    let pack = all_files(&bucket.path().join("packs")).into_iter().next().expect("a pack");
    let mut bytes = std::fs::read(&pack).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes).expect("written");
    machine.wait_for("the drill failed");
    let log = machine.log();
    let line = log.lines().find(|line| line.contains("the drill failed")).expect("said");
    let name = pack.file_name().and_then(|name| name.to_str()).expect("text");
    assert!(
        line.contains("ALARM") && line.contains(&id) && line.contains(name) && line.contains("what helps"),
        "{line}"
    );
    assert_eq!(machine.sql("SELECT 1"), "1", "the living server goes on");
    assert_eq!(machine.stop(), 0);
}
