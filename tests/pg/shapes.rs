//! Clusters of every shape: tablespaces, unlogged tables, databases made and tables rewritten during the backup, paths
//! with blanks. What comes back is checked by PostgreSQL's own tools.

use crate::support::*;

/// Restores into a new directory and runs `pg_verifybackup` before anything recovers there.
fn verified_restore(scratch: &Scratch, bucket: &Bucket, name: &str, more: &[&str]) -> std::path::PathBuf {
    let data = scratch.dir(name).join("data");
    bucket.must(&[&["restore", "-D", data.to_str().expect("text")], more].concat());
    let mut verify = std::process::Command::new(Postgres::client("pg_verifybackup"));
    let output = as_server_user(verify.arg("-n").arg(&data)).output().expect("runs");
    assert!(output.status.success(), "pg_verifybackup: {}", text(&output));
    data
}

/// Every table and index of every database, page by page.
fn amcheck(machine: &Machine) {
    let output =
        machine.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed"]).output().expect("runs");
    assert!(output.status.success(), "pg_amcheck: {}", text(&output));
}

#[test]
fn tablespaces_unlogged_tables_new_databases_and_rewrites_during_the_backup_survive() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "machine a", &bucket);
    let space = scratch.dir("table space");
    first.start(&["--init"]).ready().with_backup();
    first.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    first.sql("CREATE TABLE placed (id int PRIMARY KEY) TABLESPACE fast");
    first.sql("INSERT INTO placed SELECT generate_series(1, 50000)");
    first.sql("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) AS id");
    first.sql("CREATE TABLE rewritten AS SELECT n AS id, repeat('y', 500) AS filler FROM generate_series(1, 100000) n");

    let data = first.data_dir();
    let during = bucket.command(&["backup", "-D", data.to_str().expect("text")]).spawn().expect("started");
    first.sql("CREATE DATABASE newborn");
    first.sql("CREATE DATABASE copied STRATEGY file_copy");
    first.sql("VACUUM FULL rewritten");
    first.sql("DELETE FROM rewritten WHERE id % 3 = 0");
    first.sql("CREATE TABLE later AS SELECT 42 AS answer");
    let output = during.wait_with_output().expect("ended");
    assert!(output.status.success(), "the backup failed: {}", text(&output));
    first.sql("DROP DATABASE copied");
    let count = "SELECT (SELECT count(*) FROM placed), (SELECT count(*) FROM rewritten), (SELECT answer FROM later)";
    let before = first.sql(count);
    first.archived();
    first.vanish();
    std::fs::remove_dir_all(&space).expect("wiped");

    // A copy elsewhere first: its tablespace must go elsewhere too.
    let oid = bucket.json(&["list"])["backups"].as_array().map(Vec::len);
    assert_eq!(oid, Some(2), "the first backup and the one under way");
    let elsewhere = scratch.dir("elsewhere");
    let map = format!("{}={}", space.display(), elsewhere.display());
    verified_restore(&scratch, &bucket, "copy", &["--tablespace", &map]);
    let copy = Plain::start(&scratch, "copy", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql(count), before);
    assert_eq!(
        copy.machine.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'"),
        elsewhere.display().to_string()
    );
    drop(copy);

    let mut second = Machine::new(&scratch, "machine b", &bucket);
    second.start(&[]).ready();
    assert_eq!(second.sql(count), before);
    assert_eq!(second.sql("SELECT count(*) FROM fleeting"), "0", "unlogged tables come back empty");
    assert_eq!(second.sql("SELECT count(*) FROM pg_database WHERE datname IN ('newborn', 'copied')"), "1");
    amcheck(&second);
}

#[test]
fn a_restored_directory_is_accepted_by_postgresqls_own_tools() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("CREATE TABLE t AS SELECT n AS id, md5(n::text) AS text FROM generate_series(1, 20000) n");
    first.sql("CREATE INDEX ON t (text)");
    first.archived();
    first.vanish();
    verified_restore(&scratch, &bucket, "b", &[]);
    let copy = Plain::start(&scratch, "b", &bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql("SELECT count(*) FROM t"), "20000");
    amcheck(&copy.machine);
}

#[test]
fn a_tablespace_in_place_survives() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql("ALTER SYSTEM SET allow_in_place_tablespaces = on");
    first.sql("SELECT pg_reload_conf()");
    wait_until("the setting holds", || first.try_sql("CREATE TABLESPACE inside LOCATION ''").is_ok());
    first.sql("CREATE TABLE t TABLESPACE inside AS SELECT generate_series(1, 1000) AS id");
    bucket.must(&["backup", "-D", first.data_dir().to_str().expect("text")]);
    first.archived();
    first.vanish();
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    assert_eq!(second.sql("SELECT count(*) FROM t"), "1000");
}

#[test]
fn forcing_a_restore_never_empties_another_servers_tablespace() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready();
    let space = scratch.dir("space");
    machine.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    machine.sql("CREATE TABLE t TABLESPACE fast AS SELECT generate_series(1, 1000) AS id");
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    let copy = scratch.dir("copy").join("data");
    let said = bucket.must_fail(&["restore", "--force", "-D", copy.to_str().expect("text")], 73);
    assert!(said.contains("--tablespace") && !said.contains("add --force"), "{said}");
    machine.sql("CHECKPOINT");
    assert_eq!(machine.sql("SELECT count(*) FROM t"), "1000");
    assert!(std::fs::read_dir(&space).expect("listed").count() > 0);
}

/// What a backup has stored itself.
fn backed_up(machine: &Machine, more: &[&str]) -> (String, u64) {
    let data = machine.data_dir();
    let done = machine.bucket.json(&[&["backup", "-D", data.to_str().expect("text")], more].concat());
    let id = done["backup"]["id"].as_str().expect("an id").to_owned();
    (id, done["backup"]["stored_bytes"].as_u64().expect("bytes"))
}

#[test]
fn a_backup_costs_what_has_changed_and_stands_when_those_before_it_are_gone() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    first.sql(
        "CREATE TABLE t AS SELECT n AS id, md5(n::text) || md5((-n)::text) AS text FROM generate_series(1, 200000) n",
    );
    first.sql("CREATE UNIQUE INDEX ON t (id)");
    let (_, full) = backed_up(&first, &["--full"]);
    let mut last = 0;
    for round in 1..=4 {
        first.sql(&format!("UPDATE t SET text = md5('{round}' || id) || 'y' WHERE id % 20000 = {round}"));
        last = backed_up(&first, &[]).1;
        assert!(last < full / 10, "round {round}: {last} bytes after {full}");
    }
    let (_, nothing) = backed_up(&first, &[]);
    assert!(nothing < last, "hardly anything has changed: {nothing} bytes after {last}");
    let rows = "SELECT count(*), md5(string_agg(text, ',' ORDER BY id)) FROM t";
    let before = first.sql(rows);
    first.archived();
    first.vanish();
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    bucket.must(&["verify", "--full"]);
    verified_restore(&scratch, &bucket, "copy", &[]);
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    assert_eq!(second.sql(rows), before);
    amcheck(&second);
    // On the new machine every file is another one than in the last backup.
    second.sql("UPDATE t SET text = 'z' WHERE id % 20000 = 7");
    let (after, stored) = backed_up(&second, &[]);
    assert!(stored < full, "{stored} bytes after {full}");
    let before = second.sql(rows);
    second.archived();
    second.vanish();
    verified_restore(&scratch, &bucket, "another copy", &["--backup", &after]);
    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&[]).ready();
    assert_eq!(third.sql(rows), before);
    amcheck(&third);
}

#[test]
fn files_that_come_back_under_an_old_name_are_not_taken_for_the_old_ones() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init"]).ready().with_backup();
    // Two templates whose files have the same names and sizes, and other rows.
    for name in ["one", "two"] {
        first.sql(&format!("CREATE DATABASE {name} OID = {}", if name == "one" { 90001 } else { 90002 }));
        let rows =
            format!("CREATE TABLE t AS SELECT n AS id, md5('{name}' || n) AS text FROM generate_series(1, 30000) n");
        let output = first.client("psql").args(["-XAtq", "-d", name, "-c", &rows]).output().expect("psql runs");
        assert!(output.status.success(), "{}", text(&output));
    }
    first.sql("CREATE DATABASE copy OID = 90003 TEMPLATE one STRATEGY file_copy");
    backed_up(&first, &["--full"]);
    first.sql("DROP DATABASE copy");
    first.sql("CREATE DATABASE copy OID = 90003 TEMPLATE two STRATEGY file_copy");
    let change = "UPDATE t SET text = 'changed' WHERE id IN (5, 20000)";
    let output = first.client("psql").args(["-XAtq", "-d", "copy", "-c", change]).output().expect("psql runs");
    assert!(output.status.success(), "{}", text(&output));
    let (id, _) = backed_up(&first, &[]);
    let rows = "SELECT count(*), md5(string_agg(text, ',' ORDER BY id)) FROM t";
    let read = |machine: &Machine| {
        let output = machine.client("psql").args(["-XAtq", "-d", "copy", "-c", rows]).output().expect("psql runs");
        text(&output)
    };
    let before = read(&first);
    first.archived();
    first.vanish();
    verified_restore(&scratch, &bucket, "copy", &["--backup", &id]);
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    assert_eq!(read(&second), before);
    amcheck(&second);
}
