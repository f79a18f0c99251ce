//! Most of the disk is still there: only what differs is fetched.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::support::*;

/// How much of a restore was there already, as it says itself.
fn kept(said: &str) -> (f64, f64) {
    let line = said.lines().find(|line| line.contains("are there already")).expect(said);
    let words: Vec<&str> = line.split_whitespace().collect();
    let of = words.iter().position(|word| *word == "of").expect("of");
    let bytes = |number: &str, unit: &str| {
        let factor = match unit {
            "B" => 1.0,
            "kB" => 1e3,
            "MB" => 1e6,
            "GB" => 1e9,
            _ => panic!("{said}"),
        };
        number.parse::<f64>().expect("a number") * factor
    };
    (bytes(words[of - 2], words[of - 1]), bytes(words[of + 1], words[of + 2]))
}

fn largest(directory: &Path) -> PathBuf {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    all_files(directory).into_iter().max_by_key(size).expect("a file")
}

fn verified(machine: &Machine) {
    let mut verify = std::process::Command::new(machine.postgres.program("pg_verifybackup"));
    let output = as_server_user(verify.arg("-n").arg(machine.data_dir()).current_dir("/")).output().expect("runs");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_disk_that_lost_a_little_gets_back_a_little() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let space = scratch.dir("space");
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql(&format!("CREATE TABLESPACE side LOCATION '{}'", space.display()));
    machine.sql("CREATE TABLE large AS SELECT n, md5(n::text) FROM generate_series(1, 1500000) n");
    machine.sql("CREATE TABLE aside TABLESPACE side AS SELECT n FROM generate_series(1, 100000) n");
    // Otherwise whoever reads the table first sets hints, and how many pages of these reach the disk is a matter of time.
    machine.sql("VACUUM (FREEZE) large");
    let data_dir = machine.data_dir();
    bucket.must(&["backup", "-D", data_dir.to_str().expect("text")]);
    machine.sql("INSERT INTO large SELECT n, 'later' FROM generate_series(1, 100) n");
    let rows = "SELECT count(*), sum(hashtext(large::text)), (SELECT sum(n) FROM aside) FROM large";
    let before = machine.sql(rows);
    machine.archived();
    machine.kill();

    // 2 % of the largest file are overwritten, one file is gone, one too long, and one is nobody's.
    let file = largest(&data_dir.join("base"));
    let size = std::fs::metadata(&file).expect("there").len();
    let open = std::fs::File::options().write(true).open(&file).expect("opened");
    open.write_all_at(&vec![0x5a; (size / 50) as usize], size / 3 / 8192 * 8192).expect("overwritten");
    let side = largest(&space);
    std::fs::File::options().write(true).open(&side).expect("opened").set_len(100 << 20).expect("grown");
    std::fs::remove_file(data_dir.join("global/pg_filenode.map")).expect("removed");
    std::fs::write(data_dir.join("base/1/123456789"), "nobody's").expect("written");
    // A file of the cluster has a second name, which is not ours; an older major's files lie beside ours.
    let safe = scratch.path().join("second name");
    let other = data_dir.join("base/1/1259");
    std::fs::hard_link(&other, &safe).expect("linked");
    std::fs::File::options()
        .write(true)
        .open(&other)
        .expect("opened")
        .write_all_at(b"damaged", 5000)
        .expect("overwritten");
    let damaged = std::fs::read(&safe).expect("read");
    let older = space.join("PG_9.6_201608131/5");
    std::fs::create_dir_all(&older).expect("made");
    std::fs::write(older.join("1"), "the cluster before the upgrade").expect("written");
    std::fs::set_permissions(data_dir.join("pg_ident.conf"), std::os::unix::fs::PermissionsExt::from_mode(0o400))
        .expect("set");

    let restore = ["restore", "-D", data_dir.to_str().expect("text"), "--delta"];
    assert!(bucket.must_fail(&restore, 73).contains("tablespace"), "whose tablespace that is, nobody has said");
    let named = format!("--tablespace={}={}", space.display(), space.display());
    let restore = [&restore[..], &[&named]].concat();
    let output = bucket.command(&restore).output().expect("runs");
    assert!(output.status.success(), "{}", text(&output));
    let (there, all) = kept(&text(&output));
    assert!(there > all * 0.93, "only {there} of {all} were kept");
    assert!(!data_dir.join("base/1/123456789").exists());
    assert!(std::fs::read(&safe).expect("read") == damaged && older.join("1").is_file());
    // pg_verifybackup would take it for a stranger's.
    std::fs::remove_dir_all(space.join("PG_9.6_201608131")).expect("removed");
    verified(&machine);
    machine.serve(&[]);
    wait_until("it is up", || machine.try_sql("SELECT NOT pg_is_in_recovery()").is_ok_and(|answer| answer == "t"));
    assert_eq!(machine.sql(rows), before);
    machine.kill();
}

#[test]
fn a_restore_that_was_killed_goes_on_where_it_was() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    machine.sql("CREATE TABLE large AS SELECT n, md5(n::text) FROM generate_series(1, 1000000) n");
    bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    let rows = "SELECT count(*), sum(hashtext(large::text)) FROM large";
    let before = machine.sql(rows);
    machine.archived();
    machine.vanish();

    // Whoever is faster: it, or we.
    let killed = ["b", "c", "d", "e"].into_iter().map(|name| Machine::new(&scratch, name, &bucket)).find(|machine| {
        killed_on_its_way(machine);
        machine.data_dir().join("perennial.restoring").exists()
    });
    let mut next = killed.expect("one restore was killed before it had ended");
    next.start(&[]).ready();
    let (there, _) = kept(&next.log());
    assert!(there > 1e6, "{}", next.log());
    assert_eq!(next.sql(rows), before);
    assert_eq!(next.stop(), 0);
}

fn killed_on_its_way(machine: &Machine) {
    let (bucket, data_dir) = (&machine.bucket, machine.data_dir());
    let mut restore = bucket.command(&["restore", "-D", data_dir.to_str().expect("text")]);
    let mut restore =
        restore.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("runs");
    // What has its place on the disk: a file is as long as its last region from the moment that is written.
    let blocks = |file: &std::path::PathBuf| file.metadata().map_or(0, |metadata| metadata.blocks());
    let written = || all_files(&data_dir).iter().map(blocks).sum::<u64>() * 512;
    wait_until("some of it is written", || written() > 16 << 20 || restore.try_wait().expect("waited").is_some());
    restore.kill().expect("killed");
    restore.wait().expect("waited");
}

#[test]
fn differences_are_not_fetched_over_a_directory_that_is_something_else() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init"]).ready().with_backup();
    assert_eq!(machine.stop(), 0);
    let other = Machine::new(&scratch, "other", &bucket);
    other.initdb();
    let photos = scratch.dir("photos");
    std::fs::write(photos.join("one"), "precious").expect("written");
    for directory in [other.data_dir(), photos.clone()] {
        bucket.must_fail(&["restore", "--delta", "-D", directory.to_str().expect("text")], 73);
    }
    assert!(photos.join("one").is_file() && other.data_dir().join("global/pg_control").is_file());
}
