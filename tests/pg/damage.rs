//! Damaged and missing objects: named, refused, and nothing half-restored can be started.

use std::path::{Path, PathBuf};

use crate::support::*;

const DAMAGED: i32 = 65;

/// A repository with a backup, a few segments after it, and a tail that only the log has.
fn repository(scratch: &Scratch) -> Bucket {
    let bucket = Bucket::directory(scratch);
    let mut machine = Machine::new(scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    for n in 0..4 {
        machine.sql(&format!("CREATE TABLE t{n} AS SELECT generate_series(1, 10000) AS id"));
        machine.segment_stored();
    }
    for n in 0..25 {
        machine.sql(&format!("INSERT INTO t3 SELECT -{n}"));
        machine.archived();
    }
    machine.vanish();
    bucket
}

/// What an entry of a log says of itself, if the file is one.
fn log_entry(file: &Path) -> Option<serde_json::Value> {
    let bytes = std::fs::read(file).ok().filter(|_| file.to_str().is_some_and(|path| path.contains("/log/")))?;
    let length = u32::from_le_bytes(bytes[4..8].try_into().ok()?) as usize;
    serde_json::from_slice(&bytes[8..4 + length]).ok()
}

/// Whether an entry's WAL is in a whole segment too.
fn is_in_a_segment(bucket: &Bucket, entry: &serde_json::Value) -> bool {
    let position = |text: &str| text.parse::<perennial::model::Lsn>().expect("a position").0;
    let Some(end) = entry["end"].as_str() else { return true };
    let segment = (position(end) - 1) / (16 << 20);
    let name = format!("0000000100000000{segment:08X}.zst");
    all_files(&bucket.path().join("generations/00000001/wal")).iter().any(|file| file.ends_with(&name))
}

/// The segment that recovery asks for to get what is in the file.
fn segment_of(file: &Path, entry: Option<&serde_json::Value>) -> Option<String> {
    match entry {
        Some(entry) => {
            let start = entry["start"].as_str()?.parse::<perennial::model::Lsn>().ok()?.0;
            Some(format!("0000000100000000{:08X}", start / (16 << 20)))
        }
        None => Some(file.file_name()?.to_str()?.strip_suffix(".zst")?.to_owned()),
    }
}

/// Restores and, where that succeeds, fetches the file's WAL: one of both must notice what was done to `file`.
fn noticed(scratch: &Scratch, bucket: &Bucket, file: &Path, segment: Option<String>, what: &str) {
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
    let name = segment.unwrap_or_else(|| panic!("{what} of {key} was not noticed"));
    let name = name.as_str();
    let target = scratch.path().join("fetched");
    let output = bucket.command(&["wal", "fetch", name, target.to_str().expect("text")]).output().expect("runs");
    let code = output.status.code().expect("a code");
    assert!(code >= 126, "{what} of {key}: recovery would take code {code} for the end of WAL: {}", text(&output));
    assert!(text(&output).contains(&key), "{what} of {key} is not named: {}", text(&output));
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
        let entry = log_entry(&file);
        if entry.as_ref().is_some_and(|entry| is_in_a_segment(&bucket, entry)) {
            continue; // Whole segments have it too: nothing needs it any more.
        }
        for at in [from, from + (to - from) / 3, from + (to - from) / 2, to - 1] {
            let mut bad = sound.clone();
            bad[at] ^= 0x10;
            std::fs::write(&file, &bad).expect("written");
            noticed(&scratch, &bucket, &file, segment_of(&file, entry.as_ref()), &format!("a flip of byte {at}"));
        }
        verified(&bucket, &file);
        std::fs::write(&file, &sound).expect("written");
    }
    bucket.must(&["restore", "-D", scratch.path().join("sound").to_str().expect("text")]);
}

/// `verify --full` names a damaged object, unless no restore could ever need it.
fn verified(bucket: &Bucket, file: &Path) {
    let key = file.strip_prefix(bucket.path()).expect("in the bucket").to_str().expect("text").to_owned();
    let output = bucket.command(&["verify", "--full"]).output().expect("runs");
    // The first backup began in segment 2.
    let before_every_backup = ["000000000000000000000001.zst", "000000010000000000000001.zst"];
    if before_every_backup.iter().any(|name| key.ends_with(name)) {
        assert!(output.status.success(), "{key} is needed by no backup: {}", text(&output));
        return;
    }
    assert_eq!(output.status.code(), Some(DAMAGED), "{key}: {}", text(&output));
    assert!(text(&output).contains(&key), "{key} is not named: {}", text(&output));
}

#[test]
fn verify_says_what_cannot_be_restored_and_what_helps() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    for depth in [&["verify"][..], &["verify", "--full"]] {
        let said = bucket.must(depth);
        assert!(said.contains("everything that is listed can be restored"), "{said}");
    }
    let files = all_files(&bucket.path());
    let aside = scratch.path().join("aside");
    let pack = files.iter().find(|file| file.to_str().is_some_and(|path| path.contains("/packs/"))).expect("a pack");
    std::fs::rename(pack, &aside).expect("moved");
    let output = bucket.command(&["verify"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(DAMAGED), "{}", text(&output));
    assert!(text(&output).contains("is missing") && text(&output).contains("cannot be restored"), "{}", text(&output));
    std::fs::rename(&aside, pack).expect("moved back");

    // The WAL of the backup itself, in the segment and in the log.
    let needed: Vec<&PathBuf> = files
        .iter()
        .filter(|file| {
            file.to_str().is_some_and(|path| path.contains("/log/")) || file.ends_with("000000010000000000000002.zst")
        })
        .collect();
    let kept: Vec<Vec<u8>> = needed.iter().map(|file| std::fs::read(file).expect("read")).collect();
    needed.iter().for_each(|file| std::fs::remove_file(file).expect("removed"));
    let output = bucket.command(&["verify"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(DAMAGED), "{}", text(&output));
    assert!(text(&output).contains("000000010000000000000002 is missing"), "{}", text(&output));
    for (file, bytes) in needed.iter().zip(kept) {
        std::fs::write(file, bytes).expect("written");
        give(file);
    }

    let hole = files.iter().find(|file| file.ends_with("000000010000000000000003.zst")).expect("a segment");
    let entries: Vec<&PathBuf> = files.iter().filter(|file| log_entry(file).is_some()).collect();
    std::fs::rename(hole, &aside).expect("moved");
    let output = bucket.command(&["verify", "--json"]).output().expect("runs");
    // The log has it too, as long as its entries are there.
    assert!(output.status.success(), "{} entries: {}", entries.len(), text(&output));
    std::fs::rename(&aside, hole).expect("moved back");
}

#[test]
fn damage_that_nobody_has_read_yet_is_found_within_a_cycle() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--verify-every=200ms", "--verify-sample=34%"]).ready().with_backup();
    for part in 1..=3 {
        machine.wait_for(&format!("verified part {part} of 3"));
    }
    let id = bucket.json(&["list"])["backups"][0]["id"].as_str().expect("an id").to_owned();
    let pack = all_files(&bucket.path().join("packs")).into_iter().next().expect("a pack");
    let sound = std::fs::read(&pack).expect("read");
    let (from, to) = pack_frames(&sound);
    let mut bad = sound.clone();
    bad[(from + to) / 2] ^= 1;
    std::fs::write(&pack, bad).expect("written");
    machine.wait_for("the repository is damaged");
    let name = pack.file_name().and_then(|name| name.to_str()).expect("text");
    let log = machine.log();
    let line = log.lines().find(|line| line.contains("the repository is damaged")).expect("said");
    assert!(
        line.contains("ALARM") && line.contains(name) && line.contains(&id) && line.contains("what helps"),
        "{line}"
    );
    assert_eq!(machine.sql("SELECT 1"), "1", "the living server goes on");
    // What was not read this time is not said to be sound either.
    let found = bucket.must_fail(&["verify", "--sample=100%"], DAMAGED)
        + &text(&bucket.command(&["verify", "--sample=100%"]).output().expect("runs"));
    assert!(found.contains(name) && found.contains("part 1 of 1"), "{found}");
    std::fs::write(&pack, &sound).expect("written");
    let report = bucket.json(&["verify", "--sample=50%"]);
    assert!(report["depth"] == "sample" && report["parts"] == 2, "{report}");
    bucket.must(&["verify", "--full"]);
    assert_eq!(machine.stop(), 0);
}

/// Where the frames of a pack begin and end.
fn pack_frames(pack: &[u8]) -> (usize, usize) {
    let u32_at = |at: usize| u32::from_le_bytes(pack[at..at + 4].try_into().expect("four bytes")) as usize;
    (8 + u32_at(4), pack.len() - u32_at(pack.len() - 8))
}

#[test]
fn a_missing_object_is_found_and_named_or_not_needed() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    let aside = scratch.path().join("aside");
    let files = all_files(&bucket.path());
    let last = files.iter().filter_map(|file| log_entry(file)?["number"].as_u64()).max().expect("a log");
    for file in &files {
        let name = file.to_str().expect("text");
        // Without a descriptor there is no repository; a deleted manifest is a deleted backup; .backup files are for
        // people. Of a log that was not sealed, the last entries may as well never have arrived.
        let may_be_on_its_way =
            log_entry(file).and_then(|entry| entry["number"].as_u64()).is_some_and(|n| n + 16 > last);
        let skipped = ["/perennial.json", "/manifest", ".backup.zst"];
        if may_be_on_its_way || skipped.iter().any(|ending| name.ends_with(ending)) {
            continue;
        }
        let before = file.extension().is_some().then(|| fetched(&scratch, &bucket, file));
        std::fs::rename(file, &aside).expect("moved");
        noticed_missing(&scratch, &bucket, file, before);
        std::fs::rename(&aside, file).expect("moved back");
    }
}

/// What `wal fetch` brings for a WAL object; nothing when it refuses.
fn fetched(scratch: &Scratch, bucket: &Bucket, file: &Path) -> Option<Vec<u8>> {
    let name = segment_of(file, None)?;
    let target = scratch.path().join("fetched");
    let _ = std::fs::remove_file(&target);
    let output = bucket.command(&["wal", "fetch", &name, target.to_str().expect("text")]).output().expect("runs");
    output.status.success().then(|| std::fs::read(&target).expect("fetched"))
}

fn noticed_missing(scratch: &Scratch, bucket: &Bucket, file: &Path, before: Option<Option<Vec<u8>>>) {
    let data = scratch.path().join("restored");
    let _ = std::fs::remove_dir_all(&data);
    let name = file.file_name().and_then(|name| name.to_str()).expect("text");
    let output = bucket.command(&["restore", "-D", data.to_str().expect("text")]).output().expect("runs");
    if output.status.success() {
        // The log has not let go of its entries yet, so the segment can be put together from them, to the byte.
        assert_eq!(Some(fetched(scratch, bucket, file)), before, "{name} is missing and it was not noticed");
        return;
    }
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
    assert_eq!(second.sql("SELECT count(*) FROM t3"), "10025");
}

#[test]
fn recovery_stops_at_a_damaged_segment_instead_of_promoting() {
    let scratch = Scratch::new();
    let bucket = repository(&scratch);
    let segments = all_files(&bucket.path().join("generations/00000001/wal"));
    let middle = &segments[segments.len() - 1];
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

#[test]
fn a_damaged_backup_does_not_stand_in_the_way_of_a_sound_one() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE t AS SELECT 1 AS id");
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    machine.archived();
    machine.vanish();
    let manifests: Vec<PathBuf> = all_files(&bucket.path().join("backups"));
    assert_eq!(manifests.len(), 2);
    std::fs::write(&manifests[1], b"nonsense").expect("damaged");
    // What an interrupted write leaves on a disk is no backup and no generation.
    std::fs::create_dir(bucket.path().join("backups/00000001-0000000099000028-0000")).expect("made");
    std::fs::create_dir(bucket.path().join("generations/00000002")).expect("made");
    give(&bucket.path().join("generations/00000002"));
    let listed = bucket.command(&["list"]).output().expect("runs");
    assert!(listed.status.success() && text(&listed).contains("cannot be used"), "{}", text(&listed));
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&[]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM t"), "1");
}
