//! WAL summaries of PostgreSQL 17 and later: backups that read only what has changed must hold what backups hold that read
//! everything, and must say so when they cannot.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::*;

/// A backup's report, and what was said meanwhile.
fn backup(machine: &Machine, more: &[&str]) -> (Value, String) {
    let data = machine.data_dir();
    let arguments = [&["backup", "--json", "-D", data.to_str().expect("text")], more].concat();
    let output = machine.bucket.command(&arguments).output().expect("runs");
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (serde_json::from_slice(&output.stdout).expect("JSON"), said)
}

fn id(report: &Value) -> &str {
    report["backup"]["id"].as_str().expect("an id")
}

fn unread(report: &Value) -> u64 {
    report["unread_bytes"].as_u64().expect("bytes")
}

fn told_by_summaries(report: &Value) {
    assert_eq!(report["changes_from"], "wal_summaries", "{report}");
    assert_eq!(report["why_pages"], Value::Null);
}

fn told_by_pages(report: &Value, why: &str) {
    assert_eq!(report["changes_from"], "pages", "{report}");
    assert_eq!(unread(report), 0);
    assert!(report["why_pages"].as_str().expect("a reason").contains(why), "{report}");
}

fn sql_in(machine: &Machine, database: &str, statement: &str) -> String {
    let psql = ["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement];
    let output = machine.client("psql").args(psql).output().expect("psql runs");
    assert!(output.status.success(), "{statement}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn bytes_of(machine: &Machine, relation: &str) -> u64 {
    machine.sql(&format!("SELECT pg_relation_size('{relation}')")).parse().expect("a number")
}

fn summarizing(machine: &Machine) {
    wait_until("WAL is summarized", || machine.sql("SHOW summarize_wal") == "on");
}

/// Restores a backup into a directory of its own, as it is before it recovers.
fn restored(scratch: &Scratch, bucket: &Bucket, name: &str, more: &[&str]) -> PathBuf {
    let data = scratch.dir(name).join("data");
    bucket.must(&[&["restore", "-D", data.to_str().expect("text")], more].concat());
    data
}

/// Every table and index of every database, page by page.
fn amcheck(machine: &Machine) {
    let arguments = ["--all", "--install-missing", "--heapallindexed"];
    let output = machine.client("pg_amcheck").args(arguments).output().expect("runs");
    assert!(output.status.success(), "pg_amcheck: {}", text(&output));
}

const TABLES: &[&str] =
    &["still", "updated", "cut", "emptied", "dropped", "rewritten", "growing", "hinted", "moved", "later"];
const DATABASES: &[&str] = &["one", "two", "copy", "logged", "moving"];

/// What a story compares: a line for each table, in each database.
fn rows(machine: &Machine) -> String {
    const DIGEST: &str = "SELECT count(*), md5(string_agg(md5(id || text), '' ORDER BY id)) FROM";
    let here = TABLES.iter().map(|table| machine.sql(&format!("{DIGEST} {table}")));
    let there = DATABASES.iter().map(|database| sql_in(machine, database, &format!("{DIGEST} t")));
    here.chain(there).chain([machine.sql("SELECT last_value FROM numbers")]).collect::<Vec<_>>().join("\n")
}

fn make_tables(machine: &Machine) {
    let filled = |table: &str, count: u32| {
        format!(
            "CREATE TABLE {table} AS SELECT n AS id, md5(n::text) || md5((-n)::text) AS text FROM generate_series(1, {count}) n"
        )
    };
    machine.sql(&filled("still", 400_000));
    machine.sql("CREATE UNIQUE INDEX ON still (id)");
    for table in TABLES.iter().filter(|table| !["still", "later"].contains(table)) {
        machine.sql(&filled(table, 40_000));
        machine.sql(&format!("CREATE UNIQUE INDEX ON {table} (id)"));
    }
    machine.sql("CREATE SEQUENCE numbers");
    for (name, oid) in [("one", 90001), ("two", 90002)] {
        machine.sql(&format!("CREATE DATABASE {name} OID = {oid}"));
        let rows =
            "CREATE TABLE t AS SELECT n AS id, md5(current_database() || n) AS text FROM generate_series(1, 30000) n";
        sql_in(machine, name, rows);
        // Nobody may find hints to set later on.
        sql_in(machine, name, "VACUUM FREEZE");
    }
    machine.sql("CREATE DATABASE copy OID = 90003 TEMPLATE one STRATEGY file_copy");
    machine.sql("CREATE DATABASE logged OID = 90004 TEMPLATE one STRATEGY wal_log");
    machine.sql("CREATE DATABASE moving OID = 90005 TEMPLATE one STRATEGY file_copy");
    machine.sql("VACUUM FREEZE still");
}

/// Changes of every kind.
fn change_all(machine: &Machine, space: &Path) {
    for statement in [
        "UPDATE updated SET text = text || 'x' WHERE id % 1000 = 0",
        "DELETE FROM cut WHERE id > 5000",
        // Gives the end of the file back, which then grows again.
        "VACUUM cut",
        "INSERT INTO cut SELECT n, 'again' FROM generate_series(50001, 60000) n",
        "TRUNCATE emptied",
        "INSERT INTO emptied VALUES (1, 'one')",
        "DROP TABLE dropped",
        "CREATE TABLE dropped AS SELECT n AS id, 'another' AS text FROM generate_series(1, 50000) n",
        "VACUUM FULL rewritten",
        "INSERT INTO growing SELECT n, 'more' FROM generate_series(50001, 90000) n",
        "SELECT count(*) FROM hinted",
        "SELECT nextval('numbers') FROM generate_series(1, 50)",
        "CREATE TABLE later AS SELECT 1 AS id, 'later' AS text",
        &format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()),
        "ALTER TABLE moved SET TABLESPACE fast",
        "ALTER DATABASE moving SET TABLESPACE fast",
        // Files of other rows, under the same names and of the same size.
        "DROP DATABASE copy",
        "CREATE DATABASE copy OID = 90003 TEMPLATE two STRATEGY file_copy",
        "DROP DATABASE logged",
        "CREATE DATABASE logged OID = 90004 TEMPLATE two STRATEGY wal_log",
    ] {
        machine.sql(statement);
    }
    sql_in(machine, "copy", "UPDATE t SET text = 'changed' WHERE id IN (5, 20000)");
}

/// Files of relations that nobody but the story writes to, by path.
fn relation_files(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let ours = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let digits: String = name.chars().take_while(char::is_ascii_digit).collect();
        let database = path.parent().and_then(|parent| parent.file_name()?.to_str());
        let known = database.is_some_and(|database| database.starts_with("9000"));
        digits.parse::<u32>().is_ok_and(|number| known || number >= 16384)
    };
    let below = |top: &str| all_files(&data.join(top));
    let files = below("base").into_iter().chain(below("pg_tblspc")).filter(|path| ours(path));
    files
        .map(|path| {
            let content = std::fs::read(&path).expect("read");
            (path.strip_prefix(data).expect("below").to_owned(), content)
        })
        .collect()
}

fn only_what_has_changed_is_read_and_nothing_is_missed(postgres: &Postgres) {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = Machine::with(&scratch, "a", &bucket, postgres.clone());
    let quiet = ["--", "-c", "autovacuum=off"];
    first.start(&[&["--init"], &quiet[..]].concat()).ready().with_backup();
    summarizing(&first);
    make_tables(&first);
    let still = bytes_of(&first, "still");
    let (report, _) = backup(&first, &[]);
    told_by_summaries(&report);

    let space = scratch.dir("space");
    change_all(&first, &space);
    let before = rows(&first);
    let (report, said) = backup(&first, &[]);
    told_by_summaries(&report);
    assert!(unread(&report) > still, "{report}");
    assert!(said.contains("untouched and not read"), "{said}");
    // To the byte what a backup has that reads everything.
    let (full, _) = backup(&first, &["--full"]);
    told_by_pages(&full, "builds on no other backup");
    let map = |elsewhere: &str| format!("{}={}", space.display(), scratch.dir(elsewhere).display());
    let copy = restored(&scratch, &bucket, "copy", &["--backup", id(&report), "--tablespace", &map("space 2")]);
    let other = restored(&scratch, &bucket, "other", &["--backup", id(&full), "--tablespace", &map("space 3")]);
    let (files, others) = (relation_files(&copy), relation_files(&other));
    assert!(files.len() > 100, "{} files", files.len());
    assert_eq!(files.keys().collect::<Vec<_>>(), others.keys().collect::<Vec<_>>());
    let differing: Vec<_> =
        files.iter().filter(|(path, content)| others[*path] != **content).map(|(path, _)| path).collect();
    assert!(differing.is_empty(), "{differing:?}");
    let copy = Plain::start(&scratch, "copy", &bucket, postgres).up(false);
    assert_eq!(rows(&copy.machine), before);
    amcheck(&copy.machine);
    drop(copy);

    // The next machine: nothing is believed of files that another server wrote, then the same again.
    first.archived();
    first.vanish();
    std::fs::remove_dir_all(&space).expect("wiped");
    let mut second = Machine::with(&scratch, "b", &bucket, postgres.clone());
    second.start(&quiet).ready();
    assert_eq!(rows(&second), before);
    let older = "SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' AND name < pg_walfile_name(pg_current_wal_lsn()) AND left(name, 8) <> left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    wait_until("WAL of the old timeline is gone", || {
        second.segment_stored();
        second.sql("CHECKPOINT");
        second.sql(older) == "0"
    });
    summarizing(&second);
    let (report, _) = backup(&second, &[]);
    told_by_pages(&report, "the server was started");
    second.sql("UPDATE updated SET text = 'y' WHERE id = 7");
    let before = rows(&second);
    let (report, _) = backup(&second, &[]);
    told_by_summaries(&report);
    assert!(unread(&report) > still, "{report}");
    restored(&scratch, &bucket, "another copy", &["--backup", id(&report), "--tablespace", &map("space 4")]);
    let copy = Plain::start(&scratch, "another copy", &bucket, postgres).up(false);
    assert_eq!(rows(&copy.machine), before);
    amcheck(&copy.machine);
}

#[test]
fn only_what_has_changed_is_read_and_nothing_is_missed_17() {
    only_what_has_changed_is_read_and_nothing_is_missed(&Postgres::major(17));
}

#[test]
fn only_what_has_changed_is_read_and_nothing_is_missed_18() {
    only_what_has_changed_is_read_and_nothing_is_missed(&Postgres::major(18));
}

#[test]
fn summaries_that_are_missing_or_off_are_made_up_for_and_that_is_told() {
    const LOUD: &str = "WARNING: every page is read";
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let postgres = Postgres::major(17);
    let mut first = Machine::with(&scratch, "a", &bucket, postgres.clone());
    first.start(&["--init", "--", "-c", "autovacuum=off"]).ready().with_backup();
    summarizing(&first);
    first.sql("CREATE TABLE t AS SELECT n AS id, md5(n::text) AS text FROM generate_series(1, 100000) n");
    let (report, said) = backup(&first, &[]);
    told_by_summaries(&report);
    assert!(!said.contains(LOUD), "{said}");

    // The only word on a change is lost.
    first.sql("UPDATE t SET text = 'lost' WHERE id = 77777");
    first.sql("CHECKPOINT");
    let start = report["backup"]["start_lsn"].as_str().expect("a position");
    let written = format!("SELECT count(*) FROM pg_available_wal_summaries() WHERE start_lsn >= '{start}'");
    wait_until("it is summarized", || first.sql(&written) != "0");
    for file in all_files(&first.data_dir().join("pg_wal/summaries")) {
        std::fs::remove_file(file).expect("removed");
    }
    let (report, said) = backup(&first, &[]);
    told_by_pages(&report, "is not summarized");
    assert!(said.contains(LOUD), "{said}");
    restored(&scratch, &bucket, "copy", &["--backup", id(&report), "--immediate"]);
    let copy = Plain::start(&scratch, "copy", &bucket, &postgres).up(true);
    assert_eq!(copy.machine.sql("SELECT text FROM t WHERE id = 77777"), "lost");
    drop(copy);

    // Switched off by somebody: that is his affair, and no alarm.
    first.sql("ALTER SYSTEM SET summarize_wal = off");
    first.sql("SELECT pg_reload_conf()");
    wait_until("it is off", || first.sql("SHOW summarize_wal") == "off");
    first.sql("UPDATE t SET text = 'off' WHERE id = 77777");
    let (report, said) = backup(&first, &[]);
    told_by_pages(&report, "summarize_wal is off");
    assert!(!said.contains(LOUD), "{said}");

    // On again, but for some of the WAL it is too late.
    first.sql("UPDATE t SET text = 'late' WHERE id = 77777");
    let start = report["backup"]["start_lsn"].as_str().expect("a position");
    let there = format!("SELECT count(*) FROM pg_ls_waldir() WHERE name = pg_walfile_name('{start}')");
    wait_until("WAL is removed", || {
        first.segment_stored();
        first.sql("CHECKPOINT");
        first.sql(&there) == "0"
    });
    first.sql("ALTER SYSTEM SET summarize_wal = on");
    first.sql("SELECT pg_reload_conf()");
    summarizing(&first);
    let (report, said) = backup(&first, &[]);
    told_by_pages(&report, "is not summarized");
    assert!(said.contains(LOUD), "{said}");
    let (report, _) = backup(&first, &[]);
    told_by_summaries(&report);
    assert!(unread(&report) > 0, "{report}");
    restored(&scratch, &bucket, "another copy", &["--backup", id(&report), "--immediate"]);
    let copy = Plain::start(&scratch, "another copy", &bucket, &postgres).up(true);
    assert_eq!(copy.machine.sql("SELECT text FROM t WHERE id = 77777"), "late");
}

#[test]
fn whoever_decides_himself_on_summaries_is_left_alone() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::with(&scratch, "a", &bucket, Postgres::major(17));
    machine.start(&["--init"]).ready().with_backup();
    summarizing(&machine);
    assert_eq!(machine.stop(), 0);
    machine.start(&["--", "-c", "summarize_wal=off"]).ready();
    backup(&machine, &[]);
    assert_eq!(machine.sql("SHOW summarize_wal"), "off");
    let settings = std::fs::read_to_string(machine.data_dir().join("postgresql.auto.conf")).expect("read");
    assert!(!settings.contains("summarize_wal"), "ours is gone: {settings}");
}

#[test]
fn a_damaged_page_is_reported_again_and_one_that_rots_unread_when_everything_is_read() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::with(&scratch, "a", &bucket, Postgres::major(18));
    machine.start(&["--init", "--", "-c", "autovacuum=off"]).ready().with_backup();
    summarizing(&machine);
    let rot = |table: &str, block: u64| {
        machine.sql("CHECKPOINT");
        let path = machine.data_dir().join(machine.sql(&format!("SELECT pg_relation_filepath('{table}')")));
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
        file.write_all_at(b"rotten", block * 8192 + 4000).expect("written");
    };
    for table in ["t", "u"] {
        machine.sql(&format!(
            "CREATE TABLE {table} AS SELECT n AS id, repeat('z', 100) AS text FROM generate_series(1, 30000) n"
        ));
    }
    rot("t", 5);
    let (report, _) = backup(&machine, &[]);
    told_by_summaries(&report);
    assert_eq!(report["backup"]["damaged_pages"], 1);
    rot("u", 7);
    let (report, _) = backup(&machine, &[]);
    told_by_summaries(&report);
    assert_eq!(report["backup"]["damaged_pages"], 1, "{report}");
    assert_eq!(report["backup"]["damaged"][0]["block"], 5, "{report}");
    let (report, _) = backup(&machine, &["--full"]);
    assert_eq!(report["backup"]["damaged_pages"], 2, "{report}");
}
