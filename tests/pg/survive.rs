//! The main job: a machine dies with its disk under load, and the next one has every archived transaction.

use std::io::Write;
use std::process::Stdio;

use crate::support::*;

/// Clients that write into a ledger, so that what must be there can be counted.
struct Load(std::process::Child);

impl Load {
    fn start(machine: &Machine, scratch: &Scratch) -> Load {
        machine.sql("CREATE TABLE IF NOT EXISTS ledger (id bigserial PRIMARY KEY, at timestamptz DEFAULT clock_timestamp(), note text)");
        let script = scratch.path().join("ledger.sql");
        let mut file = std::fs::File::create(&script).expect("a script");
        writeln!(file, "INSERT INTO ledger (note) VALUES (repeat('x', 200));").expect("written");
        let mut command = machine.client("pgbench");
        command.args(["-n", "-c", "4", "-j", "2", "-T", "600", "-f"]).arg(&script).arg("postgres");
        Load(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pgbench runs"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes under load, with a base backup in the middle; returns the ledger as it was when its WAL had been archived.
fn live(machine: &mut Machine, scratch: &Scratch) -> String {
    let load = Load::start(machine, scratch);
    let rows = |machine: &Machine| machine.sql("SELECT count(*) FROM ledger").parse::<u64>().expect("a number");
    wait_until("the load writes", || rows(machine) > 200);
    machine.bucket.must(&["backup", "-D", machine.data_dir().to_str().expect("text")]);
    let during = rows(machine);
    wait_until("the load goes on after the backup", || rows(machine) > during + 200);
    drop(load);
    let writers = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'";
    wait_until("the last transactions have ended", || machine.sql(writers) == "0");
    let before = ledger(machine);
    machine.archived();
    before
}

fn ledger(machine: &Machine) -> String {
    machine.sql("SELECT count(*), max(id), sum(hashtext(id::text || at::text)) FROM ledger")
}

fn a_machine_dies_under_load(bucket: Bucket, postgres: Postgres, more: &[&str]) {
    let scratch = Scratch::new();
    let mut first = Machine::with(&scratch, "a", &bucket, postgres.clone());
    first.start(&[&["--init"], more].concat()).ready().with_backup();
    let before = live(&mut first, &scratch);
    first.vanish();

    let mut second = Machine::with(&scratch, "b", &bucket, postgres);
    second.start(&[]).ready();
    assert_eq!(ledger(&second), before, "every archived transaction is back");
    second.sql("INSERT INTO ledger (note) VALUES ('life goes on')");
    assert_eq!(second.stop(), 0);
}

#[test]
fn a_machine_dies_under_load_and_the_next_one_has_every_archived_transaction_on_s3() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::debian(), &[]);
}

#[test]
fn the_same_over_tls_with_a_private_authority() {
    a_machine_dies_under_load(Bucket::s3_tls(), Postgres::debian(), &[]);
}

#[test]
fn the_same_on_postgresql_13() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::major(13), &[]);
}

#[test]
fn the_same_on_postgresql_14() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::major(14), &[]);
}

#[test]
fn the_same_on_postgresql_16() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::major(16), &[]);
}

#[test]
fn the_same_on_postgresql_17() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::major(17), &[]);
}

#[test]
fn the_same_on_postgresql_18() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::major(18), &[]);
}

#[test]
fn the_same_with_segments_of_64_mb() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::debian(), &["--initdb-option=--wal-segsize=64"]);
}

#[test]
fn the_same_with_segments_of_1_mb() {
    a_machine_dies_under_load(Bucket::s3(), Postgres::debian(), &["--initdb-option=--wal-segsize=1"]);
}

/// The README's first command. It is its users' first minute with us, and was broken once without a test seeing it.
#[test]
fn the_demo_tells_its_story_and_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let demo = bucket.command(&["demo"]).env("TMPDIR", scratch.dir("tmp")).output().expect("runs");
    assert!(demo.status.success(), "{}", text(&demo));
    let told = String::from_utf8_lossy(&demo.stdout);
    assert_eq!(told.matches(": the same").count(), 2, "{told}");
    let left: Vec<_> =
        std::fs::read_dir(scratch.path().join("tmp")).expect("listed").flatten().map(|e| e.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}
