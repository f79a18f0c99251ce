//! What an application keeps beside its database, such as the index of a wiki's search, comes back with it, and never knows
//! of pages that the database does not have.

use std::path::{Path, PathBuf};

use crate::support::*;

/// An application that writes a page, and once it is committed, a file for it into its index.
struct Wiki<'a> {
    machine: &'a Machine,
    index: PathBuf,
}

impl Wiki<'_> {
    fn write(&self, pages: std::ops::RangeInclusive<u32>) {
        self.machine.sql("CREATE TABLE IF NOT EXISTS page (n int)");
        std::fs::create_dir_all(self.index.join("segments")).expect("made");
        for n in pages {
            self.machine.sql(&format!("INSERT INTO page VALUES ({n})"));
            self.index(n);
        }
        give(&self.index);
        give(&self.index.join("segments"));
    }

    fn index(&self, n: u32) {
        let file = self.index.join(format!("segments/{n:05}"));
        std::fs::write(file, format!("page {n} ").repeat(2000)).expect("written");
    }
}

/// The pages an index knows of. Each file must be whole.
fn indexed(index: &Path) -> Vec<u32> {
    let mut pages: Vec<u32> = Vec::new();
    for file in all_files(&index.join("segments")) {
        let n: u32 = file.file_name().expect("a name").to_str().expect("text").parse().expect("a number");
        assert_eq!(std::fs::read_to_string(&file).expect("read"), format!("page {n} ").repeat(2000));
        pages.push(n);
    }
    pages.sort_unstable();
    pages
}

fn numbers(to: u32) -> Vec<u32> {
    (1..=to).collect()
}

fn with(index: &Path) -> String {
    format!("--with=index={}", index.display())
}

fn pages(machine: &Machine) -> String {
    machine.sql("SELECT count(*) FROM page")
}

#[test]
fn the_index_is_back_beside_the_database_and_not_ahead_of_it() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let indexes: Vec<PathBuf> = ["a", "b", "c"].map(|name| scratch.dir(&format!("index of {name}"))).to_vec();
    let mut first = Machine::new(&scratch, "a", &bucket);
    first.start(&["--init", "--rpo=50ms", &with(&indexes[0])]).ready().with_backup();
    let wiki = Wiki { machine: &first, index: indexes[0].clone() };
    wiki.write(1..=20);
    std::os::unix::fs::symlink("segments/00020", indexes[0].join("newest")).expect("linked");
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    std::fs::set_permissions(indexes[0].join("segments/00007"), read_only).expect("set");
    let data_dir = first.data_dir();
    bucket.must(&["backup", "-D", data_dir.to_str().expect("text"), &with(&indexes[0])]);
    wiki.write(21..=30);
    first.archived();
    first.vanish();
    std::fs::remove_dir_all(&indexes[0]).expect("removed");

    // The image of the new machine has an index that knows of pages nobody has.
    std::fs::create_dir_all(indexes[1].join("segments")).expect("made");
    std::fs::write(indexes[1].join("segments/00099"), "of another life").expect("written");
    give(&indexes[1]);
    let mut second = Machine::new(&scratch, "b", &bucket);
    second.start(&["--rpo=50ms", &with(&indexes[1])]).ready();
    assert_eq!(pages(&second), "30");
    assert_eq!(indexed(&indexes[1]), numbers(20));
    assert_eq!(std::fs::read_link(indexes[1].join("newest")).expect("a link"), Path::new("segments/00020"));
    let aside: Vec<String> = std::fs::read_dir(scratch.path())
        .expect("listed")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .filter(|name| name.contains("replaced"))
        .collect();
    assert_eq!(aside.len(), 1, "{aside:?}");

    // The application makes up for what its index lacks; a clean stop loses nothing of it then.
    let wiki = Wiki { machine: &second, index: indexes[1].clone() };
    (21..=30).for_each(|n| wiki.index(n));
    wiki.write(31..=40);
    assert_eq!(second.stop(), 0);
    let log = second.log();
    second.wipe();
    let mut third = Machine::new(&scratch, "c", &bucket);
    third.start(&["--rpo=50ms", &with(&indexes[2])]).ready();
    assert_eq!((pages(&third).as_str(), indexed(&indexes[2])), ("40", numbers(40)), "{log}");
    // Gone while the database was down: it is put back beside the same disk.
    assert_eq!(third.stop(), 0);
    std::fs::remove_dir_all(&indexes[2]).expect("removed");
    third.start(&["--rpo=50ms", &with(&indexes[2])]).ready();
    assert_eq!(indexed(&indexes[2]), numbers(40));
    assert_eq!(third.stop(), 0);
    bucket.must(&["verify", "--full"]);
}

#[test]
fn an_index_of_the_past_goes_with_a_database_of_the_past_and_old_ones_are_deleted() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let index = scratch.dir("index");
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.start(&["--init", "--rpo=20ms"]).ready().with_backup();
    let data_dir = machine.data_dir();
    let wiki = Wiki { machine: &machine, index: index.clone() };
    for n in 1..=3 {
        wiki.write(n * 10 - 9..=n * 10);
        bucket.must(&["backup", "-D", data_dir.to_str().expect("text"), &with(&index)]);
        machine.sql(&format!("SELECT pg_create_restore_point('after {n}')"));
    }
    machine.archived();
    machine.segment_stored();
    let list = bucket.json(&["list"]);
    let besides = list["beside"].as_array().expect("a list");
    assert_eq!(besides.len(), 3, "{list}");

    let restored = |name: &str, target: &[&str]| {
        let (to, back) = (scratch.dir(name), scratch.dir(&format!("{name} index")));
        let there = ["restore", "-D", to.to_str().expect("text")];
        let said = bucket.must(&[&there[..], target, &[&with(&back)]].concat());
        (indexed(&back), said)
    };
    assert_eq!(restored("one", &["--to-name", "after 1"]).0, numbers(10));
    assert_eq!(restored("two", &["--to-name", "after 2"]).0, numbers(20));
    assert_eq!(restored("now", &[]).0, numbers(30));

    // Nothing of the database lies beside it.
    for inside in [data_dir.join("index"), scratch.path().to_owned(), machine.home.clone()] {
        bucket.must_fail(&["backup", "-D", data_dir.to_str().expect("text"), &with(&inside)], 2);
    }
    bucket.must(&["prune", "--keep-last=1", "--prune-grace=0"]);
    assert_eq!(bucket.json(&["list"])["beside"].as_array().expect("a list").len(), 1);
    bucket.must(&["verify", "--full"]);
    assert_eq!(restored("kept", &[]).0, numbers(30));

    // A snapshot that is damaged keeps neither the database nor an older one from coming back.
    wiki.write(31..=31);
    bucket.must(&["backup", "-D", data_dir.to_str().expect("text"), &with(&index)]);
    machine.archived();
    let newest = bucket.json(&["list"])["beside"].as_array().expect("a list").last().expect("one").clone();
    let of = bucket.path().join(format!("backups/{}/beside", newest["backup"].as_str().expect("an id")));
    let object = all_files(&of).pop().expect("an object");
    let mut content = std::fs::read(&object).expect("read");
    let end = content.len() - 5;
    content[end] ^= 1;
    std::fs::write(&object, content).expect("written");
    let (to, back) = (scratch.dir("damaged"), scratch.dir("damaged index"));
    let restore = ["restore", "-D", to.to_str().expect("text"), &with(&back)];
    let output = bucket.command(&restore).output().expect("runs");
    assert!(output.status.success() && text(&output).contains("ALARM"), "{}", text(&output));
    assert_eq!(indexed(&back), numbers(30));

    // One that was not put back whole, and was worked in since, is set aside and not emptied.
    std::fs::write(back.join(".perennial-restoring"), "").expect("written");
    std::fs::write(back.join("work"), "of weeks").expect("written");
    std::fs::remove_dir_all(&to).expect("removed");
    bucket.must(&restore);
    let aside = std::fs::read_dir(scratch.path()).expect("listed").filter_map(|entry| {
        let path = entry.expect("an entry").path();
        path.file_name()?.to_str()?.starts_with("damaged index.replaced").then_some(path)
    });
    assert!(aside.into_iter().any(|path| path.join("work").is_file()));

    // In a directory that is not ours nothing can be renamed: its content goes aside within it, and no damaged snapshot on
    // the way takes it along.
    let (others, own) = (scratch.path().join("others"), scratch.path().join("others/index"));
    std::fs::create_dir_all(&own).expect("made");
    std::fs::write(own.join("work"), "of weeks").expect("written");
    give(&own);
    std::fs::set_permissions(&others, std::os::unix::fs::PermissionsExt::from_mode(0o555)).expect("set");
    std::fs::remove_dir_all(&to).expect("removed");
    bucket.must(&["restore", "-D", to.to_str().expect("text"), &with(&own)]);
    assert_eq!(indexed(&own), numbers(30));
    assert!(all_files(&own).iter().any(|file| file.ends_with("work")));
    assert_eq!(machine.stop(), 0);
}
