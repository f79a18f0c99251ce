//! The format page against a stranger: a Python reader, written from docs/format.md alone, restores what we wrote.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, and waits for real processes by a real clock"
)]

#[path = "../support/mod.rs"]
mod support;

use std::process::{Command, Output};

use support::*;

fn reader(arguments: &[&str]) -> Output {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/formats/reader.py");
    Command::new(from_run("PERENNIAL_TEST_PYTHON")).arg(program).args(arguments).output().expect("python runs")
}

const ROWS: &str = "SELECT count(*), md5(string_agg(text, ',' ORDER BY id)), (SELECT md5(string_agg(text, ',' ORDER BY id)) FROM large) FROM t";

/// A repository with two lives on two timelines, a tablespace, and WAL after the last backup.
fn repository(scratch: &Scratch, bucket: &Bucket, key: &[&str]) -> (String, String) {
    let encrypt = if key.is_empty() { &[][..] } else { &["--encrypt"] };
    let mut first = Machine::new(scratch, "a", bucket);
    first.start(&[&["--init"], encrypt].concat()).ready().with_backup();
    let space = scratch.dir("space");
    first.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    first.sql("CREATE TABLE t TABLESPACE fast AS SELECT n AS id, md5(n::text) AS text FROM generate_series(1, 5000) n");
    bucket.must(&["backup", "-D", first.data_dir().to_str().expect("text")]);
    // A few pages of a large file change, and then only the backup of that is left.
    first.sql("CREATE TABLE large (id int, text text) WITH (fillfactor = 50)");
    first.sql("INSERT INTO large SELECT n, repeat('x', 1000) FROM generate_series(1, 2000) n");
    bucket.must(&["backup", "-D", first.data_dir().to_str().expect("text")]);
    first.sql("UPDATE large SET text = repeat('y', 1000) WHERE id IN (1, 1000, 2000)");
    // Beside it a directory, of which only a part is new with the last backup.
    let index = scratch.dir("index");
    std::fs::write(index.join("small"), "first").expect("written");
    std::fs::write(index.join("large"), vec![7; 3_000_000]).expect("written");
    give(&index);
    let with = format!("--with=index={}", index.display());
    bucket.must(&["backup", "-D", first.data_dir().to_str().expect("text"), &with]);
    std::fs::write(index.join("small"), "second").expect("written");
    let last = bucket.json(&["backup", "-D", first.data_dir().to_str().expect("text"), &with]);
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    let name = format!("backups/{}/manifest", last["backup"]["id"].as_str().expect("an id"));
    let manifest = reader(&[&["cat", bucket.path().to_str().expect("text"), &name], key].concat());
    assert!(text(&manifest).contains("\",[["), "a region with patches: {}", text(&manifest));
    first.sql("INSERT INTO t SELECT n, 'after the backup' FROM generate_series(5001, 6000) n");
    first.archived();
    first.vanish();
    std::fs::remove_dir_all(&space).expect("wiped");
    let mut second = Machine::new(scratch, "b", bucket);
    second.start(&[]).ready();
    second.sql("INSERT INTO t VALUES (6001, 'on timeline 2')");
    let rows = second.sql(ROWS);
    let oid = second.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'");
    second.archived();
    second.vanish();
    (rows, oid)
}

#[test]
fn a_stranger_with_the_format_page_restores_a_backup_and_its_wal() {
    let scratch = Scratch::new();
    restores(&scratch, &Bucket::directory(&scratch), &[]);
}

#[test]
fn a_stranger_with_the_key_restores_what_is_encrypted() {
    let scratch = Scratch::new();
    let identity = age::x25519::Identity::generate();
    let file = scratch.path().join("identity");
    let secret = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
    std::fs::write(&file, secret).expect("written");
    give(&file);
    let bucket = Bucket::directory(&scratch).with_env("PERENNIAL_IDENTITY_FILE", file.to_str().expect("text"));
    bucket.must(&["init", &bucket.url, "--encrypt"]);
    let key = scratch.path().join("key");
    std::fs::write(&key, bucket.must(&["key", "export"])).expect("written");
    restores(&scratch, &bucket, &["--key-file", key.to_str().expect("text")]);
}

fn restores(scratch: &Scratch, bucket: &Bucket, key: &[&str]) {
    let (rows, oid) = repository(scratch, bucket, key);
    let path = bucket.path();
    let checked = reader(&[&["check", path.to_str().expect("text")], key].concat());
    assert!(checked.status.success(), "{}", text(&checked));

    let all = all_files(&path);
    let snapshot = all.iter().find(|file| file.to_str().is_some_and(|text| text.contains("/beside/index/")));
    let name = snapshot.expect("a snapshot").strip_prefix(&path).expect("below").to_str().expect("text");
    let back = scratch.path().join("index again");
    let put = ["beside", path.to_str().expect("text"), name, back.to_str().expect("text")];
    let put = reader(&[&put[..], key].concat());
    assert!(put.status.success(), "{}", text(&put));
    assert_eq!(std::fs::read(back.join("small")).expect("there"), b"second");
    assert!(std::fs::read(back.join("large")).expect("there") == vec![7; 3_000_000]);

    let data = scratch.dir("c").join("data");
    let elsewhere = scratch.dir("elsewhere");
    let map = format!("{oid}={}", elsewhere.display());
    let restore = ["restore", path.to_str().expect("text"), data.to_str().expect("text"), "--tablespace", &map];
    let restored = reader(&[&restore[..], key].concat());
    assert!(restored.status.success(), "{}", text(&restored));
    for directory in [&data, &elsewhere] {
        let given =
            Command::new("chown").arg("-R").arg(server_user_name()).arg(directory).status().expect("chown runs");
        assert!(given.success() || !nix::unistd::geteuid().is_root());
    }
    let copy = Plain::start(scratch, "c", bucket, &Postgres::debian()).up(false);
    assert_eq!(copy.machine.sql(ROWS), rows);
}

#[test]
fn a_stranger_notices_damage_too() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    repository(&scratch, &bucket, &[]);
    let path = bucket.path();
    for key in
        ["perennial.json", "generations/00000002/generation.json", "generations/00000002/wal/00000002.history.zst"]
    {
        let file = path.join(key);
        let sound = std::fs::read(&file).expect("read");
        let mut bad = sound.clone();
        bad[sound.len() / 2] ^= 1;
        std::fs::write(&file, bad).expect("written");
        let checked = reader(&["check", path.to_str().expect("text")]);
        assert!(!checked.status.success() && text(&checked).contains(key), "{key}: {}", text(&checked));
        std::fs::write(&file, sound).expect("written");
    }
}
