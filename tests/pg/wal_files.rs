//! `wal push` and `wal fetch` as PostgreSQL calls them, and as it should never have to.

use std::path::{Path, PathBuf};

use crate::support::*;

const CONFLICT: i32 = 78;
const DAMAGED: i32 = 65;
const END_OF_WAL: i32 = 1;

/// A stopped machine with several stored segments in its `pg_wal`.
fn stopped(scratch: &Scratch, bucket: &Bucket) -> (Machine, Vec<PathBuf>) {
    let mut machine = Machine::new(scratch, "a", bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("ALTER SYSTEM SET wal_keep_size = '1GB'");
    machine.sql("SELECT pg_reload_conf()");
    let mut segments = Vec::new();
    for n in 0..4 {
        machine.sql(&format!("CREATE TABLE t{n} AS SELECT generate_series(1, 1000) AS id"));
        segments.push(machine.data_dir().join("pg_wal").join(machine.segment_stored()));
    }
    assert_eq!(machine.stop(), 0);
    assert!(segments.iter().all(|segment| segment.is_file()), "{segments:?}");
    (machine, segments)
}

fn push(machine: &Machine, segment: &Path) -> std::process::Output {
    let path = format!("pg_wal/{}", segment.file_name().and_then(|name| name.to_str()).expect("a name"));
    machine.bucket.command(&["wal", "push", &path]).current_dir(machine.data_dir()).output().expect("runs")
}

#[test]
fn pushing_the_same_segment_again_succeeds_and_other_bytes_under_its_name_do_not() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let (machine, segments) = stopped(&scratch, &bucket);
    let segment = &segments[1];
    let again = push(&machine, segment);
    assert!(again.status.success(), "{}", text(&again));

    // Valid WAL with other content: the segment of another cluster would be refused before, so blank a record's tail.
    let mut other = std::fs::read(segment).expect("read");
    let end = other.len();
    other[end - 8192..].fill(0);
    std::fs::write(segment, &other).expect("written");
    let refused = push(&machine, segment);
    let code = refused.status.code();
    assert!(code == Some(CONFLICT) || code == Some(0), "{}", text(&refused));
    if code == Some(CONFLICT) {
        assert!(
            text(&refused).matches("CRC-32C").count() == 1 && text(&refused).contains("here"),
            "{}",
            text(&refused)
        );
    }
}

#[test]
fn damaged_foreign_and_misnamed_wal_is_not_stored() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let (machine, segments) = stopped(&scratch, &bucket);
    let sound = std::fs::read(&segments[1]).expect("read");
    let unused = |number: u32| machine.data_dir().join(format!("pg_wal/0000000100000000000000{number:02X}"));

    // The right content under a name that is not its own.
    std::fs::write(unused(0x90), &sound).expect("written");
    let refused = push(&machine, &unused(0x90));
    assert_eq!(refused.status.code(), Some(DAMAGED), "{}", text(&refused));

    // One bit in the middle of a record, under a name nothing was archived as.
    let mut flipped = sound.clone();
    flipped[9000] ^= 1;
    std::fs::write(&segments[1], &flipped).expect("written");
    let refused = push(&machine, &segments[1]);
    assert_ne!(refused.status.code(), Some(0), "{}", text(&refused));
    std::fs::write(&segments[1], &sound[..sound.len() / 2]).expect("cut");
    assert_eq!(push(&machine, &segments[1]).status.code(), Some(DAMAGED));

    // WAL of another cluster.
    let other_scratch = Scratch::new();
    let other_bucket = Bucket::directory(&other_scratch);
    let (_, others) = stopped(&other_scratch, &other_bucket);
    let name = others[1].file_name().expect("a name");
    let foreign = machine.data_dir().join("pg_wal").join(name);
    std::fs::copy(&others[1], &foreign).expect("copied");
    let refused = push(&machine, &foreign);
    assert_eq!(refused.status.code(), Some(73), "{}", text(&refused));
    assert!(text(&refused).contains("belongs to system"), "{}", text(&refused));
}

#[test]
fn a_segment_can_be_fetched_twice_backwards_and_in_parallel() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let (machine, segments) = stopped(&scratch, &bucket);
    let out = scratch.dir("out");
    let fetch = |segment: &Path, to: &str| {
        let name = segment.file_name().and_then(|name| name.to_str()).expect("a name");
        bucket.command(&["wal", "fetch", name, out.join(to).to_str().expect("text")]).spawn().expect("started")
    };
    let mut running: Vec<(std::process::Child, &PathBuf, String)> = Vec::new();
    for (round, segment) in segments.iter().rev().chain(&segments).chain(&segments[..1]).enumerate() {
        let to = format!("segment{round}");
        running.push((fetch(segment, &to), segment, to));
    }
    for (mut child, segment, to) in running {
        assert!(child.wait().expect("ended").success());
        assert_eq!(
            std::fs::read(out.join(to)).expect("fetched"),
            std::fs::read(segment).expect("local"),
            "{}",
            segment.display()
        );
    }
    drop(machine);
}

#[test]
fn the_end_of_wal_is_said_only_when_it_is_proven() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let (machine, segments) = stopped(&scratch, &bucket);
    let to = scratch.path().join("x");
    let fetch = |bucket: &Bucket, name: &str| {
        bucket.command(&["wal", "fetch", name, to.to_str().expect("text")]).output().expect("runs")
    };
    let code = |output: &std::process::Output| output.status.code().expect("a code");
    assert_eq!(code(&fetch(&bucket, "0000000100000000000000F0")), END_OF_WAL);
    assert_eq!(code(&fetch(&bucket, "00000002.history")), END_OF_WAL);

    // A hole is not an end. (As if the log had let go of its entries long ago.)
    std::fs::remove_dir_all(bucket.path().join("generations/00000001/log")).expect("collected");
    let name = segments[1].file_name().and_then(|name| name.to_str()).expect("a name");
    let object = bucket.path().join(format!("generations/00000001/wal/00000001/00000000/{name}.zst"));
    let aside = scratch.path().join("aside");
    std::fs::rename(&object, &aside).expect("moved");
    assert!(code(&fetch(&bucket, name)) >= 126);
    std::fs::rename(&aside, &object).expect("moved back");

    // Nor is anything that went wrong.
    let gone = Bucket { url: format!("{}-gone", bucket.url), ..bucket.clone() };
    assert!(code(&fetch(&gone, name)) >= 126);
    assert!(code(&fetch(&bucket, "nonsense")) >= 126);
    let unreachable =
        Bucket::at_endpoint("http://127.0.0.1:1", "s3://perennial-test/x").with_env("PERENNIAL_PATIENCE", "1s");
    assert!(code(&fetch(&unreachable, name)) >= 126);
    drop(machine);
}

/// The segments that a workload of every kind of record leaves, checked against PostgreSQL's own reader.
#[test]
fn our_reading_of_wal_agrees_with_pg_waldump_and_survives_any_damage() {
    use perennial::wal::{SegmentName, scan_segment};

    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let (machine, segments) = stopped(&scratch, &bucket);
    let seed: u64 = std::env::var("PERENNIAL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}: replay with PERENNIAL_SEED={seed}");
    let mut random = seed.wrapping_mul(2).wrapping_add(1);
    for path in &segments {
        let name: SegmentName = path.file_name().and_then(|name| name.to_str()).expect("text").parse().expect("a name");
        let sound = std::fs::read(path).expect("read");
        let (_, facts) = scan_segment(name, &sound).expect("sound WAL");

        let dump = std::process::Command::new(Postgres::client("pg_waldump")).arg(path).output().expect("runs");
        let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
        let records = dump.lines().filter(|line| line.starts_with("rmgr:")).count() as u64;
        // The last one may go on in the next segment, where only the dump can follow it.
        assert!(
            records == facts.records || records == facts.records + 1,
            "{name}: {records} records, we see {}",
            facts.records
        );
        let commits = dump.lines().filter(|line| line.contains("desc: COMMIT") || line.contains("desc: ABORT")).count();
        assert_eq!(commits > 0, facts.last_commit.is_some(), "{name}");

        for _ in 0..300 {
            let mut bad = sound.clone();
            for _ in 0..4 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = (random >> 8) as usize % bad.len();
                bad[at] = random as u8;
            }
            // Some damage lies in padding and does no harm; none may be more than an error.
            let _ = scan_segment(name, &bad);
        }
    }
    drop(machine);
}

#[test]
fn segments_that_are_ready_go_along_with_the_one_that_was_asked_for() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let (machine, segments) = stopped(&scratch, &bucket);
    let name = |segment: &Path| segment.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    let object = |segment: &Path| {
        bucket.path().join(format!("generations/00000001/wal/00000001/00000000/{}.zst", name(segment)))
    };
    let (first, second) = (&segments[0], &segments[1]);
    for segment in [first, second] {
        std::fs::remove_file(object(segment)).expect("as if it had never been archived");
        let status = machine.data_dir().join("pg_wal/archive_status");
        std::fs::write(status.join(format!("{}.ready", name(segment))), "").expect("ready");
    }
    assert!(push(&machine, first).status.success());
    assert!(object(second).exists(), "the neighbour went along");
    // PostgreSQL's own call for it finds the mark: nothing is sent again, even if the store is away.
    let away = Bucket::at_endpoint("http://127.0.0.1:1", "s3://perennial-test/x").with_env("PERENNIAL_PATIENCE", "1s");
    let path = format!("pg_wal/{}", name(second));
    let refused = away.command(&["wal", "push", &path]).current_dir(machine.data_dir()).output().expect("runs");
    assert!(!refused.status.success(), "another repository does not have it");
    assert!(push(&machine, second).status.success());
    assert!(push(&machine, second).status.success(), "and once more, by content");
}
