//! One database of many is wanted back: it is as it was, and the others neither cost nor mislead.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::support::relay::Relay;
use crate::support::*;

const REFUSED: i32 = 73;
const NOT_FOUND: i32 = 66;

/// One statement in a database; what was said when it failed.
fn sql_in(machine: &Machine, database: &str, statement: &str) -> Result<String, String> {
    let arguments = ["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement];
    let output = machine.client("psql").args(arguments).output().expect("psql runs");
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

fn must(machine: &Machine, database: &str, statement: &str) -> String {
    sql_in(machine, database, statement)
        .unwrap_or_else(|said| panic!("{database}: {statement}: {said}\n{}", machine.log()))
}

/// Everything that a server does to a database by itself and by its clients, again and again.
fn load(machine: &Machine, database: &str) -> Child {
    let script = machine.home.join(format!("{database}.sql"));
    let once = "UPDATE t SET text = md5(text) WHERE id % 20 = 3;\nVACUUM t;\nINSERT INTO t SELECT n, 'new' FROM generate_series(1, 200) n;\nDELETE FROM t WHERE text = 'new';\nCREATE TABLE passing AS SELECT * FROM t LIMIT 500;\nTRUNCATE scratch;\nINSERT INTO scratch SELECT generate_series(1, 300);\nDROP TABLE passing;\nVACUUM pg_class, pg_attribute;\n";
    std::fs::write(&script, once.repeat(500)).expect("written");
    give(&script);
    let mut psql = machine.client("psql");
    psql.args(["-Xq", "-d", database, "-f"]).arg(&script);
    psql.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("psql runs")
}

fn make_database(machine: &Machine, name: &str, rows: u32) {
    machine.sql(&format!("CREATE DATABASE {name}"));
    let tables = format!(
        "CREATE TABLE t AS SELECT n AS id, md5(n::text) AS text FROM generate_series(1, {rows}) n;
         CREATE INDEX ON t (id);
         CREATE INDEX ON t USING gin (to_tsvector('simple', text)) WHERE id < 2000;
         CREATE TABLE scratch (n int PRIMARY KEY);
         CREATE UNLOGGED TABLE fleeting (n int);
         CREATE TABLE quiet WITH (autovacuum_enabled = off) AS SELECT generate_series(1, 50000) AS n;
         SELECT count(*) FROM quiet;
         CREATE TABLE aside TABLESPACE side AS SELECT generate_series(1, 20000) AS n"
    );
    must(machine, name, &tables);
}

const ROWS: &str = "SELECT count(*), sum(hashtext(t::text)), (SELECT sum(n) FROM aside) FROM t";

/// Bytes that the files below a directory take on the disk.
fn taken(directory: &Path) -> u64 {
    all_files(directory).iter().map(|file| std::fs::metadata(file).expect("there").blocks() * 512).sum()
}

struct Told {
    /// Of the wanted database and of the one that came after the backup.
    rows: String,
    after: String,
    oids: [String; 2],
}

/// A cluster whose databases all change while it is backed up and afterwards, until the machine vanishes.
fn life(scratch: &Scratch, bucket: &Bucket, postgres: &Postgres, checksums: bool) -> Told {
    let mut machine = Machine::with(scratch, "a", bucket, postgres.clone());
    let space = scratch.dir("space");
    if checksums {
        machine.start(&["--init", "--rpo=50ms"]);
    } else {
        let mut initdb = std::process::Command::new(postgres.program("initdb"));
        let plain: &[&str] = if postgres.major >= 18 { &["--no-data-checksums"] } else { &[] };
        let initdb = initdb.args(plain).arg("-D").arg(machine.data_dir()).current_dir("/");
        let output = as_server_user(initdb).output().expect("runs");
        assert!(output.status.success(), "{}", text(&output));
        machine.start(&["--adopt", "--rpo=50ms"]);
    }
    machine.ready().with_backup();
    assert_eq!(machine.sql("SHOW data_checksums"), if checksums { "on" } else { "off" });
    machine.sql(&format!("CREATE TABLESPACE side LOCATION '{}'", space.display()));
    make_database(&machine, "one", 5000);
    make_database(&machine, "two", 300_000);
    make_database(&machine, "three", 5000);
    // The first change of every page comes after this.
    machine.sql("CHECKPOINT");
    let mut loads = ["one", "two", "three"].map(|database| load(&machine, database));
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    // Pages that were not touched while it was taken, and those whose hints were not set.
    machine.sql("CHECKPOINT");
    must(&machine, "two", "VACUUM quiet");
    must(&machine, "two", "VACUUM (FREEZE) t");
    // Alone with the table: two who update it in different orders may wait for each other.
    must(
        &machine,
        "two",
        "BEGIN; LOCK TABLE t IN SHARE ROW EXCLUSIVE MODE; UPDATE t SET id = -id WHERE id % 3 = 1; COMMIT",
    );
    must(&machine, "two", "VACUUM FULL pg_class");
    must(&machine, "two", "REINDEX TABLE t");
    machine.sql("CREATE DATABASE after");
    must(&machine, "after", "CREATE TABLE t AS SELECT n AS id FROM generate_series(1, 1000) n");
    machine.sql("DROP DATABASE IF EXISTS nothing");
    loads.iter_mut().for_each(|load| {
        let _ = load.kill();
        let _ = load.wait();
    });
    machine.sql("CHECKPOINT");
    let told = Told {
        rows: must(&machine, "one", ROWS),
        after: must(&machine, "after", "SELECT count(*), sum(id) FROM t"),
        oids: ["one", "two"].map(|name| machine.sql(&format!("SELECT oid FROM pg_database WHERE datname = '{name}'"))),
    };
    machine.archived();
    machine.vanish();
    std::fs::remove_dir_all(&space).expect("wiped");
    told
}

/// Restores database `one`, and looks at what came of it.
fn comes_back(scratch: &Scratch, bucket: &Bucket, postgres: &Postgres, told: &Told, database: &str) {
    let copy = Machine::with(scratch, "copy", bucket, postgres.clone());
    let (data_dir, space) = (copy.data_dir(), scratch.dir("elsewhere"));
    let map = format!("{}={}", scratch.path().join("space").display(), space.display());
    let directory = data_dir.to_str().expect("text").to_owned();
    let said = bucket.must(&["restore", "-D", &directory, "--database", database, "--tablespace", &map]);
    assert!(said.contains("left out: two, three") && said.contains("DROP DATABASE"), "{said}");
    let plain = Plain::start(scratch, "copy", bucket, postgres).up(false);
    let server = &plain.machine;
    assert_eq!(must(server, "one", ROWS), told.rows);
    assert_eq!(
        must(server, "one", "SET enable_seqscan = off; SELECT count(*) FROM t WHERE id > 0"),
        must(
            server,
            "one",
            "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off; SELECT count(*) FROM t WHERE id > 0"
        )
    );
    assert_eq!(must(server, "after", "SELECT count(*), sum(id) FROM t"), told.after);
    if postgres.major == 15 {
        must(server, "one", "CREATE EXTENSION amcheck");
        let all = "SELECT count(bt_index_check(c.oid, true)) FROM pg_class c WHERE relkind = 'i' AND relam = (SELECT oid FROM pg_am WHERE amname = 'btree') AND relpersistence = 'p'";
        must(server, "one", all);
        assert_eq!(
            must(
                server,
                "one",
                "SELECT count(*) FROM pg_class c, verify_heapam(c.oid) WHERE relkind IN ('r', 'm', 't') AND relpersistence = 'p'"
            ),
            "0"
        );
    }
    for left_out in ["two", "three"] {
        let refused = sql_in(server, left_out, "SELECT 1").expect_err("nobody can read it");
        assert!(refused.contains("left_out_by_perennial_restore"), "{refused}");
        assert!(
            must(server, "postgres", &format!("SELECT count(*) FROM pg_database WHERE datname = '{left_out}'")) == "1"
        );
        must(server, "postgres", &format!("DROP DATABASE {left_out}"));
    }
    must(server, "postgres", "CHECKPOINT");
    assert_eq!(must(server, "one", ROWS), told.rows);
    assert!(!data_dir.join("base").join(&told.oids[1]).exists(), "what was dropped is gone");
    drop(plain);
}

#[test]
fn one_database_comes_back_alone_and_the_others_neither_cost_nor_mislead() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let postgres = Postgres::debian();
    let told = life(&scratch, &bucket, &postgres, true);
    let relay = Relay::to(&from_run("PERENNIAL_TEST_S3"));
    let counted = Bucket { env: Bucket::at_endpoint(&relay.endpoint, &bucket.url).env, ..bucket.clone() };

    // What the whole costs, and what one database does.
    let map =
        |name: &str| format!("--tablespace={}={}", scratch.path().join("space").display(), scratch.dir(name).display());
    let whole = scratch.path().join("copy/whole");
    scratch.dir("copy");
    counted.must(&["restore", "-D", whole.to_str().expect("text"), &map("space-whole")]);
    let all = relay.brought();
    let part = scratch.path().join("copy/part");
    let name = part.to_str().expect("text");
    let planned = bucket.json(&["restore", "-D", name, "--database=one", "--dry-run"]);
    assert_eq!(planned["left_out"].as_array().map(Vec::len), Some(2), "{planned}");
    assert!(!part.exists());
    counted.must(&["restore", "-D", name, "--database=one", &map("space-part")]);
    let some = relay.brought();
    assert!(some * 2 < all, "{some} of {all} bytes were fetched");
    let two = part.join("base").join(&told.oids[1]);
    assert!(taken(&two) < 100_000, "{} bytes are taken by what is left out", taken(&two));
    assert!(!part.join("backup_manifest").exists(), "pg_verifybackup must not call it whole");

    // It is not the cluster, whoever asks.
    let refused = bucket.must_fail(&["run", "-D", name, "--adopt"], REFUSED);
    assert!(refused.contains("--database") && refused.contains("perennial.partial"), "{refused}");
    bucket.must_fail(&["backup", "-D", name], REFUSED);
    bucket.must_fail(&["agent", "-D", name], REFUSED);
    let segment = part.join("pg_wal/000000010000000000000001");
    bucket.must_fail(&["wal", "push", segment.to_str().expect("text")], REFUSED);
    let note = std::fs::read_to_string(part.join("perennial.partial")).expect("a note");
    assert!(note.contains(&format!("{} two", told.oids[1])), "{note}");
    let unknown = bucket.must_fail(&["restore", "-D", "/tmp/never", "--database=none"], NOT_FOUND);
    assert!(unknown.contains("one, two, three") && !Path::new("/tmp/never").exists(), "{unknown}");

    // The rest of it comes when all is asked for, and the mark goes.
    let output = bucket.command(&["restore", "-D", name, "--delta", &map("space-part")]).output().expect("runs");
    assert!(output.status.success() && text(&output).contains("are there already"), "{}", text(&output));
    assert!(!part.join("perennial.partial").exists() && part.join("backup_manifest").exists());
    // And over a whole copy a part of it, of which nothing is fetched.
    relay.brought();
    counted.must(&["restore", "-D", name, "--delta", "--database=one", &map("space-part")]);
    assert!(relay.brought() < some / 2 && taken(&two) < 100_000);
    comes_back(&scratch, &bucket, &postgres, &told, "one");
}

#[test]
fn recovery_runs_over_what_is_left_out_without_checksums_too() {
    for major in [13, 15] {
        let scratch = Scratch::new();
        let bucket = Bucket::directory(&scratch);
        let postgres = Postgres::major(major);
        let told = life(&scratch, &bucket, &postgres, false);
        comes_back(&scratch, &bucket, &postgres, &told, "one");
        holes_would_stop_it(&scratch, &bucket, &postgres, &told);
    }
}

/// Why the room is spent: over holes recovery does not get to its end there.
fn holes_would_stop_it(scratch: &Scratch, bucket: &Bucket, postgres: &Postgres, told: &Told) {
    let copy = Machine::with(scratch, "holes", bucket, postgres.clone());
    let (data_dir, space) = (copy.data_dir(), scratch.dir("space-holes"));
    let map = format!("--tablespace={}={}", scratch.path().join("space").display(), space.display());
    bucket.must(&["restore", "-D", data_dir.to_str().expect("text"), "--database=one", &map]);
    let two = data_dir.join("base").join(&told.oids[1]);
    assert!(taken(&two) > 20 << 20, "without checksums they take their room");
    let is_relation = |file: &Path| {
        file.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_digit()))
    };
    for file in all_files(&two).into_iter().filter(|file| is_relation(file)) {
        let file = std::fs::File::options().write(true).open(file).expect("opened");
        let size = file.metadata().expect("there").len();
        file.set_len(0).and_then(|()| file.set_len(size)).expect("punched");
    }
    let mut plain = Plain::start(scratch, "holes", bucket, postgres);
    assert_ne!(plain.machine.ended(), 0);
    assert!(plain.machine.log().contains("invalid pages"), "{}", plain.machine.log());
}

#[test]
fn recovery_runs_over_what_is_left_out_on_other_majors() {
    for major in [13, 17, 18] {
        let scratch = Scratch::new();
        let bucket = Bucket::directory(&scratch);
        let postgres = Postgres::major(major);
        let told = life(&scratch, &bucket, &postgres, true);
        // By number, as of a backup that does not say its names.
        comes_back(&scratch, &bucket, &postgres, &told, &told.oids[0]);
    }
}
