//! A repository that says nothing to whoever has no key.

use std::path::PathBuf;

use age::secrecy::ExposeSecret;

use crate::support::*;

const DENIED: i32 = 77;
const DAMAGED: i32 = 65;
const REFUSED: i32 = 73;
const WORD: &str = "a-word-nobody-may-read";

/// An identity in a file that the server's user can read, and its recipient.
fn identity(scratch: &Scratch, name: &str) -> (PathBuf, String) {
    let identity = age::x25519::Identity::generate();
    let path = scratch.path().join(name);
    std::fs::write(&path, format!("# made for a test\n{}\n", identity.to_string().expose_secret())).expect("written");
    give(&path);
    (path, identity.to_public().to_string())
}

fn with(bucket: &Bucket, identity: &(PathBuf, String)) -> Bucket {
    bucket.clone().with_env("PERENNIAL_IDENTITY_FILE", identity.0.to_str().expect("text"))
}

fn rows(machine: &Machine) -> String {
    machine.sql("SELECT count(*), sum(hashtext(secret::text)) FROM secret")
}

/// Every command on an encrypted repository; then the machine is gone.
fn a_life(bucket: &Bucket, scratch: &Scratch) -> String {
    let mut machine = Machine::new(scratch, "a", bucket);
    let index = scratch.dir("index");
    std::fs::write(index.join(WORD), WORD.repeat(100)).expect("written");
    give(&index);
    machine.start(&["--init", "--encrypt", "--rpo=50ms", "--", "-c", "log_statement=none"]).ready().with_backup();
    machine.sql(&format!("CREATE TABLE secret AS SELECT n, '{WORD}' || n AS word FROM generate_series(1, 20000) n"));
    machine.sql(&format!("SELECT pg_create_restore_point('{WORD}')"));
    machine.segment_stored();
    let data_dir = machine.data_dir();
    let data_dir = data_dir.to_str().expect("text");
    let with = format!("--with=index={}", index.display());
    bucket.must(&["backup", "-D", data_dir, &with]);
    machine.sql(&format!("INSERT INTO secret SELECT n, '{WORD}' FROM generate_series(1, 10) n"));
    bucket.must(&["backup", "-D", data_dir, &with]);
    machine.sql("INSERT INTO secret VALUES (0, 'the last')");
    let before = rows(&machine);
    machine.archived();
    bucket.must(&["list"]);
    bucket.must(&["status", "-D", data_dir]);
    bucket.must(&["verify", "--full"]);
    bucket.must(&["prune", "--keep-last=2", "--prune-grace=0"]);
    let sandbox = scratch.dir("sandbox");
    bucket.must(&["drill", "--in", sandbox.to_str().expect("text")]);
    machine.vanish();
    before
}

#[test]
fn an_encrypted_repository_does_all_that_others_do() {
    let scratch = Scratch::new();
    let own = identity(&scratch, "own");
    let bucket = with(&Bucket::s3(), &own);
    let before = a_life(&bucket, &scratch);
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--rpo=0"]).ready();
    assert_eq!(rows(&next), before);
    next.sql("INSERT INTO secret VALUES (-1, 'acknowledged')");
    let before = rows(&next);
    next.vanish();
    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&["--rpo=0"]).ready();
    assert_eq!(rows(&third), before);
    assert_eq!(third.stop(), 0);
    bucket.must(&["verify", "--full"]);
}

#[test]
fn nothing_in_the_bucket_tells_what_is_in_the_database() {
    let scratch = Scratch::new();
    let own = identity(&scratch, "own");
    let bucket = with(&Bucket::directory(&scratch), &own);
    a_life(&bucket, &scratch);
    let objects = all_files(&bucket.path());
    assert!(objects.len() > 20, "{objects:?}");
    let clear = ["perennial.json", "/keys/"];
    for object in objects {
        let name = object.to_str().expect("text");
        let content = std::fs::read(&object).expect("read");
        let text = String::from_utf8_lossy(&content);
        if !clear.iter().any(|clear| name.contains(clear)) {
            for word in [WORD, "perennial", "START WAL LOCATION", "postgresql", "\"path\"", "\u{28}\u{b5}\u{2f}\u{fd}"]
            {
                assert!(!text.contains(word), "{name} says '{word}'");
            }
            assert!(!content.windows(4).any(|four| four == [0x28, 0xb5, 0x2f, 0xfd]), "{name} has a zstd frame");
        }
        assert!(!name.contains(WORD), "{name}");
    }
}

#[test]
fn whoever_has_no_key_or_another_one_is_told_so_and_makes_nothing() {
    let scratch = Scratch::new();
    let (own, other) = (identity(&scratch, "own"), identity(&scratch, "other"));
    let plain = Bucket::directory(&scratch);
    let bucket = with(&plain, &own);
    let before = a_life(&bucket, &scratch);
    let objects = all_files(&plain.path());

    let nobody = scratch.dir("nobody");
    let run = ["run", "-D", nobody.to_str().expect("text")];
    for arguments in [&["list"][..], &["verify"], &["status"], &run] {
        let said = plain.must_fail(arguments, DENIED);
        assert!(said.contains("no identity is named"), "{said}");
        let said = with(&plain, &other).must_fail(arguments, DENIED);
        assert!(said.contains("is not wrapped for this identity"), "{said}");
    }
    assert!(std::fs::read_dir(&nobody).expect("there").next().is_none());
    assert_eq!(all_files(&plain.path()), objects);

    // Rotated: from now on it is the other's.
    let exported = bucket.must(&["key", "export"]);
    bucket.must(&["key", "rotate", "--recipient", &other.1]);
    assert!(bucket.must_fail(&["list"], DENIED).contains("is not wrapped for this identity"));
    let bucket = with(&plain, &other);
    bucket.must(&["verify", "--full"]);
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    assert_eq!(rows(&next), before);
    assert_eq!(next.stop(), 0);

    // The wrapped key is lost: only the exported one helps.
    let wrapped: Vec<PathBuf> = all_files(&plain.path())
        .into_iter()
        .filter(|file| file.to_str().is_some_and(|name| name.contains("/keys/")))
        .collect();
    assert_eq!(wrapped.len(), 1);
    std::fs::remove_file(&wrapped[0]).expect("removed");
    assert!(bucket.must_fail(&["list"], DAMAGED).contains("has no wrapped key"));
    let safe = scratch.path().join("safe");
    std::fs::write(&safe, "00".repeat(32)).expect("written");
    give(&safe);
    let rotate = ["key", "rotate", "--recipient", &own.1, "--key-file", safe.to_str().expect("text")];
    bucket.must_fail(&rotate, 73);
    std::fs::write(&safe, exported).expect("written");
    bucket.must(&rotate);
    with(&plain, &own).must(&["verify", "--full"]);
}

#[test]
fn an_object_that_was_moved_or_altered_by_somebody_clever_is_refused() {
    let scratch = Scratch::new();
    let own = identity(&scratch, "own");
    let bucket = with(&Bucket::directory(&scratch), &own);
    a_life(&bucket, &scratch);
    let of = |directory: &str| -> Vec<PathBuf> {
        let all = all_files(&bucket.path().join(directory));
        all.into_iter().filter(|file| std::fs::metadata(file).expect("there").len() > 100).collect()
    };
    // Sound objects of this repository, in the place of others of their kind.
    for directory in ["packs", "generations/00000001/wal"] {
        let objects = of(directory);
        let (first, second) = (&objects[0], &objects[1]);
        let sound = std::fs::read(first).expect("read");
        std::fs::copy(second, first).expect("copied");
        let said = bucket.command(&["verify", "--full"]).output().expect("runs");
        assert_eq!(said.status.code(), Some(DAMAGED), "{}", text(&said));
        let name = first.strip_prefix(bucket.path()).expect("below").to_str().expect("text");
        assert!(text(&said).contains(name), "{name}: {}", text(&said));
        std::fs::write(first, sound).expect("written");
    }
    bucket.must(&["verify", "--full"]);
}

#[test]
fn an_encrypted_repository_is_never_mistaken_for_one_in_the_clear_nor_the_other_way_round() {
    let scratch = Scratch::new();
    let own = identity(&scratch, "own");
    let clear = Bucket::directory(&scratch);
    let encrypted = Bucket { url: format!("file://{}", scratch.dir("encrypted").display()), env: Vec::new() };
    let encrypted = with(&encrypted, &own);
    clear.must(&["init", &clear.url]);
    encrypted.must(&["init", &encrypted.url, "--encrypt"]);
    // Whoever asks for encryption, or names an identity, does not get a repository in the clear.
    let nowhere = scratch.dir("nowhere");
    let run = ["run", "-D", nowhere.to_str().expect("text"), "--init", "--recipient", &own.1];
    assert!(clear.must_fail(&run, REFUSED).contains("not encrypted"));
    assert!(with(&clear, &own).must_fail(&["list"], REFUSED).contains("though an identity is named"));

    // A server that archived into the one and is sent to the other by a change of its archive_command.
    let mut machine = Machine::new(&scratch, "a", &clear);
    machine.initdb();
    machine.serve(&["-c", "wal_level=replica"]);
    machine.sql(&format!("CREATE TABLE secret AS SELECT n, '{WORD}' || n AS word FROM generate_series(1, 20000) n"));
    let push = |bucket: &Bucket| {
        let name = machine.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
        machine.sql("INSERT INTO secret VALUES (0, 'more')");
        machine.sql("SELECT pg_switch_wal()");
        let path = format!("pg_wal/{name}");
        let output = bucket.command(&["wal", "push", &path]).current_dir(machine.data_dir()).output().expect("runs");
        assert!(output.status.success(), "{}", text(&output));
    };
    push(&clear);
    push(&encrypted);
    push(&encrypted);
    let objects = all_files(&encrypted.path());
    assert!(objects.len() > 4, "{objects:?}");
    for object in objects {
        let content = std::fs::read(&object).expect("read");
        let name = object.to_str().expect("text");
        let clear = name.ends_with("perennial.json") || name.contains("/keys/");
        assert!(clear || !content.windows(9).any(|nine| nine == b"perennial"), "{name} is in the clear");
    }
    encrypted.must(&["list"]);
    machine.kill();
}
