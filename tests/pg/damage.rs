//! Damaged and missing objects: named, refused, and nothing half-restored can be started.

use std::path::{Path, PathBuf};

use crate::support::*;

const DAMAGED: i32 = 65;

fn all_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).expect("listed") {
        let path = entry.expect("listed").path();
        if path.is_dir() { files.extend(all_files(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// A repository with a backup and a few segments after it.
fn repository(scratch: &Scratch) -> Bucket {
    let bucket = Bucket::directory(scratch);
    let mut machine = Machine::new(scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    for n in 0..4 {
        machine.sql(&format!("CREATE TABLE t{n} AS SELECT generate_series(1, 10000) AS id"));
        machine.archived();
    }
    machine.vanish();
    bucket
}

/// Restores and, where that succeeds, fetches every segment: one of both must notice what was done to `file`.
fn noticed(scratch: &Scratch, bucket: &Bucket, file: &Path, what: &str) {
    let data = scratch.path().join("restored");
    let _ = std::fs::remove_dir_all(&data);
    let directory = data.to_str().expect("text");
    let key = file.strip_prefix(bucket.path()).expect("in the bucket").to_str().expect("text").to_owned();
    let output = bucket.command(&["restore", "-D", directory]).output().expect("runs");
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(DAMAGED), "{what} of {key}: {}", text(&output));
        assert!(text(&output).contains(&key), "{what} of {key} is not named: {}", text(&output));
        assert!(!data.join("global/pg_control").exists(), "{what} of {key}: what is there could be started");
        return;
    }
    // The restore itself needs no WAL: recovery does.
    let name = key
        .rsplit('/')
        .next()
        .and_then(|name| name.strip_suffix(".zst"))
        .unwrap_or_else(|| panic!("{what} of {key} was not noticed"));
    let target = scratch.path().join("fetched");
    let output = bucket.command(&["wal", "fetch", name, target.to_str().expect("text")]).output().expect("runs");
    let code = output.status.code().expect("a code");
    assert!(code >= 126, "{what} of {key}: recovery would take code {code} for the end of WAL: {}", text(&output));
    assert!(text(&output).contains(name), "{what} of {key} is not named: {}", text(&output));
    assert!(!target.exists(), "{what} of {key}: something was handed over");
}

#[test]
fn a_flipped_byte_in_any_object_is_found_and_named() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    for file in all_files(&bucket.path()) {
        let sound = std::fs::read(&file).expect("read");
        // Of a pack, the head and the index only repeat what the manifest says: a restore does not read them.
        let (from, to) = match file.to_str().is_some_and(|path| path.contains("/packs/")) {
            true => pack_frames(&sound),
            false => (0, sound.len()),
        };
        if file.to_str().is_some_and(|path| path.ends_with(".backup.zst")) {
            continue; // Never asked for: PostgreSQL archives it for people.
        }
        for at in [from, from + (to - from) / 3, from + (to - from) / 2, to - 1] {
            let mut bad = sound.clone();
            bad[at] ^= 0x10;
            std::fs::write(&file, &bad).expect("written");
            noticed(&scratch, &bucket, &file, &format!("a flip of byte {at}"));
        }
        std::fs::write(&file, &sound).expect("written");
    }
    bucket.must(&["restore", "-D", scratch.path().join("sound").to_str().expect("text")]);
}

/// Where the frames of a pack begin and end.
fn pack_frames(pack: &[u8]) -> (usize, usize) {
    let u32_at = |at: usize| u32::from_le_bytes(pack[at..at + 4].try_into().expect("four bytes")) as usize;
    (8 + u32_at(4), pack.len() - u32_at(pack.len() - 8))
}

#[test]
fn a_missing_object_is_found_and_named() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    let aside = scratch.path().join("aside");
    let segments: Vec<PathBuf> = all_files(&bucket.path())
        .into_iter()
        .filter(|file| file.to_str().is_some_and(|path| path.contains("/wal/")))
        .collect();
    let last = segments.last().expect("segments").clone();
    for file in all_files(&bucket.path()) {
        let name = file.to_str().expect("text");
        // Segment 1 was over before the backup began. Without the last segment the history just ends earlier; without a descriptor there is no repository; a
        // deleted manifest is a deleted backup; .backup files are for people.
        if file == last
            || name.ends_with("/perennial.json")
            || name.ends_with("/manifest")
            || name.ends_with(".backup.zst")
            || name.ends_with("/000000010000000000000001.zst")
        {
            continue;
        }
        std::fs::rename(&file, &aside).expect("moved");
        noticed_missing(&scratch, &bucket, &file);
        std::fs::rename(&aside, &file).expect("moved back");
    }
}

fn noticed_missing(scratch: &Scratch, bucket: &Bucket, file: &Path) {
    let data = scratch.path().join("restored");
    let _ = std::fs::remove_dir_all(&data);
    let name = file.file_name().and_then(|name| name.to_str()).expect("text");
    let output = bucket.command(&["restore", "-D", data.to_str().expect("text")]).output().expect("runs");
    assert!(!output.status.success(), "{name} is missing and a restore of the newest state went through");
    let stem = name.strip_suffix(".zst").unwrap_or(name);
    let said = text(&output);
    // A backup whose own WAL is missing is no backup any more; there may be no other.
    assert!(
        said.contains(stem) || said.contains("no backup leads") || said.contains("no generation"),
        "{name}: {said}"
    );
    assert!(!data.join("global/pg_control").exists());
}

#[test]
fn a_restore_that_was_killed_can_only_be_restored_again() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    let data = scratch.dir("b").join("data");
    let pack = all_files(&bucket.path().join("packs")).into_iter().next().expect("a pack");
    let sound = std::fs::read(&pack).expect("read");
    std::fs::write(&pack, &sound[..sound.len() / 2]).expect("cut");
    bucket.must_fail(&["restore", "-D", data.to_str().expect("text")], DAMAGED);
    std::fs::write(&pack, &sound).expect("written");

    let mut start = std::process::Command::new(Postgres::debian().program("postgres"));
    let output = as_server_user(start.arg("-D").arg(&data).current_dir("/")).output().expect("runs");
    assert!(!output.status.success(), "a half-restored directory was started");
    assert!(data.join("perennial.restoring").exists());

    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]).ready();
    assert_eq!(second.sql("SELECT count(*) FROM t3"), "10000");
}

#[test]
fn recovery_stops_at_a_damaged_segment_instead_of_promoting() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    let segments = all_files(&bucket.path().join("generations/00000001/wal"));
    let middle = &segments[segments.len() - 2];
    let mut bad = std::fs::read(middle).expect("read");
    let at = bad.len() - 10;
    bad[at] ^= 1;
    std::fs::write(middle, bad).expect("written");
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&[]);
    assert_ne!(second.ended(), 0);
    assert!(second.log().contains("is damaged"), "{}", second.log());
    assert!(!second.log().contains("selected new timeline"), "it promoted: {}", second.log());
}
