//! Old backups go, and nothing that anybody was promised goes with them.

use std::path::PathBuf;

use crate::support::chance::Chance;
use crate::support::*;

/// All objects but those of logs, which a server may write at any time.
fn objects(bucket: &Bucket) -> Vec<PathBuf> {
    let all = all_files(&bucket.path());
    all.into_iter().filter(|path| !path.components().any(|part| part.as_os_str() == "log")).collect()
}

fn backup(machine: &Machine) -> String {
    let done = machine.bucket.json(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    done["backup"]["id"].as_str().expect("an id").to_owned()
}

fn backups(bucket: &Bucket) -> Vec<String> {
    let list = bucket.json(&["list"]);
    list["backups"].as_array().expect("a list").iter().map(|b| b["id"].as_str().expect("an id").to_owned()).collect()
}

/// A row, its WAL in the repository, and the position after it.
fn point(machine: &Machine, n: u32) -> String {
    machine.sql(&format!("CREATE TABLE IF NOT EXISTS t (n int); INSERT INTO t VALUES ({n})"));
    let lsn = machine.sql("SELECT pg_current_wal_flush_lsn()");
    machine.segment_stored();
    lsn
}

/// The rows of a restore with more arguments.
fn restored(scratch: &Scratch, name: &str, bucket: &Bucket, arguments: &[&str]) -> String {
    let mut machine = Machine::new(scratch, name, bucket);
    let data_dir = machine.data_dir();
    bucket.must(&[&["restore", "-D", data_dir.to_str().expect("text")], arguments].concat());
    machine.serve(&[]);
    wait_until("it is up", || machine.try_sql("SELECT NOT pg_is_in_recovery()").is_ok_and(|answer| answer == "t"));
    let rows = machine.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t");
    machine.kill();
    rows
}

#[test]
fn old_backups_and_their_wal_go_and_every_promised_point_stays() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    let mut ids = backups(&bucket);
    let mut points = Vec::new();
    for n in 1..=4 {
        if n == 3 {
            machine.vanish();
            machine.start(&["--rpo=20ms"]).ready();
        }
        points.push(point(&machine, n));
        ids.push(backup(&machine));
        points.push(point(&machine, n + 10));
    }
    bucket.must(&["pin", &ids[1], "--reason", "before the migration"]);
    let before = objects(&bucket);

    let dry = bucket.must(&["prune", "--keep-last=2", "--keep-points=0", "--prune-grace=0", "--dry-run"]);
    assert!(dry.contains("before the migration") && dry.contains("GOES"), "{dry}");
    assert_eq!(objects(&bucket), before, "a dry run changes nothing");
    bucket.must_fail(&["prune"], 2);

    let done = bucket.json(&["prune", "--keep-last=2", "--prune-grace=0"]);
    assert_eq!(backups(&bucket), [&ids[1], &ids[3], &ids[4]].map(String::clone));
    assert!(done["report"]["bytes"].as_u64().expect("bytes") > 1 << 20, "{done}");
    assert!(objects(&bucket).len() < before.len());
    // What a full look at everything says of it, and our reader of the format.
    bucket.must(&["verify", "--full"]);
    assert!(bucket.must(&["list"]).contains("WAL after it was pruned"), "{}", bucket.must(&["list"]));
    assert_eq!(bucket.json(&["prune", "--keep-last=2", "--prune-grace=0"])["report"]["objects"], 0, "nothing is left");

    machine.archived();
    assert_eq!(restored(&scratch, "newest", &bucket, &[]), "1,2,3,4,11,12,13,14");
    assert_eq!(restored(&scratch, "point", &bucket, &["--to-lsn", &points[6]]), "1,2,3,4,11,12,13");
    assert_eq!(restored(&scratch, "pinned", &bucket, &["--backup", &ids[1], "--immediate"]), "1");
    let gone = ["restore", "-D", "/tmp/nowhere", "--backup", &ids[2]];
    assert!(bucket.must_fail(&gone, 66).contains(&ids[2]));

    bucket.must(&["unpin", &ids[1]]);
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    assert_eq!(backups(&bucket), [ids[4].clone()]);
    bucket.must(&["verify", "--full"]);
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_deleted_backup_keeps_its_objects_for_whoever_is_reading_it() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    point(&machine, 1);
    let old = backups(&bucket);
    // One that shares nothing with the first.
    bucket.must(&["backup", "--full", "-D", machine.data_dir().to_str().expect("text")]);
    let first = bucket.json(&["prune", "--keep-last=1"]);
    assert_eq!(backups(&bucket).len(), 1);
    assert_eq!(first["report"]["objects"], 1, "the segment before the first backup, which nobody can read");
    assert!(first["report"]["bytes_later"].as_u64().expect("bytes") > 1 << 20, "{first}");
    bucket.must_fail(&["pin", &old[0], "--reason", "too late"], 66);
    let second = bucket.json(&["prune", "--keep-last=1", "--prune-grace=0"]);
    assert_eq!(second["report"]["bytes"], first["report"]["bytes_later"], "what was told before");
    bucket.must(&["verify", "--full"]);
}

#[test]
fn a_scheduled_prune_follows_the_machines_and_the_next_one_boots() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let keep = ["--init", "--rpo=0", "--backup-every=1s", "--keep-last=1", "--prune-grace=0"];
    for life in 1..=5 {
        let mut machine = Machine::new(&scratch, &format!("m{life}"), &bucket);
        machine.start(&keep).ready();
        machine.wait_for("pruned:");
        point(&machine, life);
        machine.sql("SELECT pg_current_wal_lsn()");
        machine.vanish();
    }
    let logs = |generation: u32| all_files(&bucket.path().join(format!("generations/{generation:08}/log"))).len();
    assert_eq!(logs(1), 1, "of the first life's log its seal is left");
    let mut last = Machine::new(&scratch, "last", &bucket);
    last.start(&["--rpo=0"]).ready();
    assert_eq!(last.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t"), "1,2,3,4,5");
    bucket.must(&["verify", "--full"]);
    assert_eq!(last.stop(), 0);
}

#[test]
fn what_is_locked_is_kept_pruned_and_restored_like_anything_else() {
    let scratch = Scratch::new();
    let bucket = Bucket::lockable().with_env("PERENNIAL_S3_LOCK", "1d");
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    assert!(machine.log().contains("the store's lock does not outlast"), "without full backups: {}", machine.log());
    assert!(!machine.log().contains("lock runs out"), "{}", machine.log());
    point(&machine, 1);
    let newest = backup(&machine);
    point(&machine, 2);
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    assert_eq!(backups(&bucket), [newest]);
    machine.archived();
    bucket.must(&["verify", "--full"]);
    assert_eq!(restored(&scratch, "b", &bucket, &[]), "1,2");
}

#[test]
fn what_was_written_before_anybody_asked_for_a_lock_is_locked_with_the_next_backup() {
    let scratch = Scratch::new();
    let bucket = Bucket::lockable();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    let at = |key: &str| {
        format!("{}/{}/{key}", from_run("PERENNIAL_TEST_S3"), bucket.url.strip_prefix("s3://").expect("S3"))
    };
    let is_locked = |key: &&str| signed("HEAD", &at(key)).contains("x-amz-object-lock-retain-until-date");
    let written_once = ["perennial.json", "generations/00000001/generation.json"];
    assert!(!written_once.iter().any(is_locked));
    let data_dir = machine.data_dir();
    let locking = bucket.clone().with_env("PERENNIAL_S3_LOCK", "1d");
    let said = locking.command(&["backup", "-D", data_dir.to_str().expect("text")]).output().expect("it runs");
    assert!(said.status.success() && !text(&said).contains("alarm"), "{}", text(&said));
    assert!(written_once.iter().all(is_locked), "{}", text(&said));
}

#[test]
fn what_the_store_does_not_let_go_is_told_and_goes_with_a_later_prune() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    point(&machine, 1);
    bucket.must(&["backup", "--full", "-D", machine.data_dir().to_str().expect("text")]);
    machine.archived();
    let packs = bucket.path().join("packs");
    let count = || all_files(&packs).len();
    let before = count();
    let may_delete = |yes: bool| {
        let mode = if yes { 0o700 } else { 0o500 };
        std::fs::set_permissions(&packs, std::fs::Permissions::from_mode(mode)).expect("set");
    };
    may_delete(false);
    let prune = ["prune", "--keep-last=1", "--prune-grace=0"];
    let said = bucket.must_fail(&prune, 77);
    assert!(said.contains("does not let") && said.contains("packs/"), "{said}");
    assert_eq!((backups(&bucket).len(), count()), (1, before), "all else was done");
    bucket.must(&["verify", "--full"]);
    bucket.must_fail(&prune, 77);
    may_delete(true);
    let done = bucket.json(&prune);
    assert!(done["report"]["refused"]["objects"] == 0 && count() < before, "{done}");
    assert_eq!(restored(&scratch, "newest", &bucket, &[]), "1");
    assert_eq!(machine.stop(), 0);
}

/// Rounds of the next story; `PERENNIAL_PRUNE_ROUNDS` asks for more, `PERENNIAL_PRUNE_SEED` for others.
const ROUNDS: u64 = 3;

fn asked(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Runs commands side by side; each is killed after a while, or left alone.
fn at_once(bucket: &Bucket, commands: &[Vec<String>], chance: &mut Chance) {
    let start = |words: &Vec<String>| {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = bucket.command(&words);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("started")
    };
    let mut running: Vec<_> = commands.iter().map(start).collect();
    for child in &mut running {
        if chance.below(2) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(chance.below(900)));
            child.kill().expect("killed");
        }
    }
    for mut child in running {
        child.wait().expect("ended");
    }
}

#[test]
fn pruning_beside_backups_restores_and_boots_that_are_killed_loses_nothing() {
    let (rounds, seed) = (asked("PERENNIAL_PRUNE_ROUNDS", ROUNDS), asked("PERENNIAL_PRUNE_SEED", 1));
    println!("PERENNIAL_PRUNE_SEED={seed} PERENNIAL_PRUNE_ROUNDS={rounds}");
    let mut chance = Chance(seed);
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    let first = backups(&bucket).remove(0);
    machine.sql("CREATE TABLE t (n int)");
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let data_dir = machine.data_dir().to_str().expect("text").to_owned();
    // A grace that is longer than any of the commands takes.
    let prune = ["prune", "--keep-last=2", "--keep-points=10s", "--prune-grace=5s"];
    let mut points: Vec<(std::time::Instant, String, u64)> = Vec::new();
    for round in 1..=rounds {
        machine.sql(&format!("INSERT INTO t VALUES ({round})"));
        points.push((std::time::Instant::now(), machine.sql("SELECT pg_current_wal_flush_lsn()"), round));
        machine.sql("CREATE TABLE IF NOT EXISTS filler (text text); INSERT INTO filler SELECT repeat('x', 500) FROM generate_series(1, 2000)");
        machine.archived();
        let into = scratch.dir(&format!("restored-{round}"));
        let restore = ["restore", "-D", into.to_str().expect("text")];
        at_once(
            &bucket,
            &[words(&["backup", "-D", &data_dir]), words(&prune), words(&restore), words(&prune)],
            &mut chance,
        );
        if chance.below(2) == 0 {
            // The machine dies while somebody prunes, and the next one boots meanwhile.
            let mut pruning = bucket.command(&prune).spawn().expect("started");
            machine.vanish();
            machine.start(&["--rpo=20ms"]).ready();
            pruning.wait().expect("ended");
        }
        bucket.must(&["verify", "--full"]);
        bucket.must(&["drill"]);
        std::fs::remove_dir_all(into).expect("removed");
    }
    bucket.must(&["backup", "-D", &data_dir]);
    machine.sql("INSERT INTO t VALUES (0)");
    machine.archived();
    let pruned = std::time::Instant::now();
    bucket.must(&prune);
    let all = (0..=rounds).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    assert_eq!(restored(&scratch, "newest", &bucket, &[]), all);
    // The very first one is older than the table.
    for id in backups(&bucket).into_iter().filter(|id| *id != first) {
        restored(&scratch, &id, &bucket, &["--backup", &id, "--immediate"]);
    }
    // Every point that was promised when it was pruned last.
    for (at, lsn, round) in points {
        if pruned.duration_since(at) < std::time::Duration::from_secs(9) {
            let rows = restored(&scratch, &format!("point-{round}"), &bucket, &["--to-lsn", &lsn]);
            assert!(rows.ends_with(&round.to_string()), "{rows}");
        }
    }
    assert_eq!(machine.stop(), 0);
}
