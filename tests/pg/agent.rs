//! A server that something else runs, with `perennial agent` beside it.

use nix::sys::signal::Signal;

use crate::support::clients::{Clients, ledger};
use crate::support::*;

const FENCED: i32 = 75;

/// A cluster with a server of its own, and a repository for it.
fn served(scratch: &Scratch, bucket: &Bucket) -> Machine {
    bucket.must(&["init"]);
    let mut machine = Machine::new(scratch, "a", bucket);
    machine.initdb();
    machine.serve(&[]);
    machine
}

#[test]
fn with_an_agent_beside_it_any_server_loses_nothing_at_rpo_zero() {
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let mut first = served(&scratch, &bucket);
    first.attend(&["--rpo=0"]).ready().with_backup();
    assert_eq!(first.sql("SHOW synchronous_standby_names"), "perennial");
    let clients = Clients::start(&first, 8, 0);
    clients.wait_for(200);
    first.vanish();
    let told = clients.end();
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--rpo=0"]).ready();
    let there = ledger(&next);
    let missing = told.iter().filter(|(_, id)| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} acknowledged commits", told.len());
    assert_eq!(next.stop(), 0);
}

#[test]
fn an_agent_that_stops_lets_commits_go_and_the_next_one_goes_on_without_a_gap() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut machine = served(&scratch, &bucket);
    machine.attend(&["--rpo=0"]).ready().with_backup();
    machine.sql("CREATE TABLE t (id int); INSERT INTO t VALUES (1)");
    assert_eq!(machine.stop(), 0);
    // Nobody is there to wait for, and what is written meanwhile waits for the next agent.
    machine.sql("INSERT INTO t VALUES (2)");
    machine.attend(&[]).ready();
    machine.sql("INSERT INTO t VALUES (3)");
    machine.archived();
    // The server restarts under the agent's eyes; then it goes down before the agent, which ends the log.
    machine.server_ends(Signal::SIGINT).serve(&[]);
    machine.sql("INSERT INTO t VALUES (4)");
    machine.archived();
    machine.server_ends(Signal::SIGINT);
    assert_eq!(machine.stop(), 0);
    assert!(machine.log().contains("released: everything"), "{}", machine.log());
    let mut next = Machine::new(&scratch, "b", &bucket);
    next.start(&["--takeover-after=60s"]).ready();
    assert_eq!(next.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t"), "1,2,3,4");
    assert_eq!(bucket.json(&["list"])["windows"].as_array().map(Vec::len), Some(1), "one window, no gap");
    assert_eq!(next.stop(), 0);
}

#[test]
fn the_agents_follow_a_promotion_and_the_old_primary_is_fenced_when_it_comes_back() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = served(&scratch, &bucket);
    let told = scratch.path().join("a/told");
    let shout = format!("--on-fenced=echo $PERENNIAL_FENCED > '{}'", told.display());
    first.attend(&[&shout]).ready().with_backup();
    first.sql("CREATE TABLE t (id int); INSERT INTO t VALUES (1)");

    let mut second = standby(&scratch, "b", &bucket, &first);
    second.attend(&["--takeover-after=0"]).wait_for("waiting until a primary runs");
    first.sql("INSERT INTO t VALUES (2)");
    let at = first.sql("SELECT pg_current_wal_lsn()");
    wait_until("the standby has it", || second.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{at}'")) == "t");
    first.archived();

    first.server_ends(Signal::SIGKILL);
    second.sql("SELECT pg_promote()");
    second.ready();
    second.sql("INSERT INTO t VALUES (3)");
    second.archived();

    // Whoever ran the first server starts it again: its agent finds that its log was ended, and says so.
    first.serve(&[]);
    first.sql("INSERT INTO t VALUES (99)");
    assert_eq!(first.ended(), FENCED);
    assert!(std::fs::read_to_string(&told).expect("it was told").contains("has taken over"));
    first.attend(&["--takeover-after=0"]);
    assert_eq!(first.ended(), FENCED, "it does not come back by itself: {}", first.log());

    second.sql("INSERT INTO t VALUES (4)");
    second.archived();
    second.vanish();
    let mut next = Machine::new(&scratch, "c", &bucket);
    next.start(&[]).ready();
    assert_eq!(next.sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM t"), "1,2,3,4");
    assert_eq!(next.stop(), 0);
}

#[test]
fn a_server_that_wants_tls_and_a_password_is_attended_too() {
    let scratch = Scratch::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
    let bucket = Bucket::directory(&scratch)
        .with_env("PGHOST", "127.0.0.1")
        .with_env("PGPORT", &port.to_string())
        .with_env("PGUSER", "keeper")
        .with_env("PGPASSWORD", "a pass:word")
        .with_env("PGDATABASE", "postgres")
        .with_env("PGSSLMODE", "verify-full")
        .with_env("PGSSLROOTCERT", &from_run("PERENNIAL_TEST_CA"));
    bucket.must(&["init"]);
    let mut machine = Machine::new(&scratch, "a", &bucket);
    machine.initdb();
    let data_dir = machine.data_dir();
    for (from, to) in [("PERENNIAL_TEST_CERT", "server.crt"), ("PERENNIAL_TEST_KEY", "server.key")] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::copy(from_run(from), data_dir.join(to)).expect("copied");
        std::fs::set_permissions(data_dir.join(to), std::fs::Permissions::from_mode(0o600)).expect("private");
        give(&data_dir.join(to));
    }
    let rules = "local all all trust\nhostssl all keeper 127.0.0.1/32 scram-sha-256\nhostssl replication keeper 127.0.0.1/32 scram-sha-256\n";
    std::fs::write(data_dir.join("pg_hba.conf"), rules).expect("written");
    let port = format!("port={port}");
    machine.serve(&["-c", "listen_addresses=127.0.0.1", "-c", &port, "-c", "ssl=on"]);
    machine.sql("SET password_encryption = 'scram-sha-256'; CREATE ROLE keeper SUPERUSER REPLICATION LOGIN PASSWORD 'a pass:word'");
    machine.attend(&["--rpo=0"]).ready().with_backup();
    machine.sql("CREATE TABLE t (id int)");
    let sessions = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'keeper'";
    assert_eq!(machine.sql(sessions), "t");
    let wrong = bucket.clone().with_env("PGPASSWORD", "wrong");
    let said = wrong.must_fail(&["backup", "-D", data_dir.to_str().expect("text")], 76);
    assert!(said.contains("password authentication failed"), "{said}");
    assert_eq!(machine.stop(), 0);
}

/// A standby of `first`, up and following it.
fn standby(scratch: &Scratch, name: &str, bucket: &Bucket, first: &Machine) -> Machine {
    let mut second = Machine::new(scratch, name, bucket);
    let mut copy = first.client("pg_basebackup");
    let copied = copy.args(["-R", "-X", "stream", "-c", "fast", "-D"]).arg(second.data_dir()).status();
    assert!(copied.expect("pg_basebackup runs").success());
    second.serve(&[]);
    second
}

#[test]
fn a_copy_of_a_living_servers_disk_is_refused_and_the_server_lives_on() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = served(&scratch, &bucket);
    first.attend(&[]).ready().with_backup();
    first.sql("CREATE TABLE t (id int); INSERT INTO t VALUES (1)");
    first.server_ends(Signal::SIGINT);
    let mut copy = Machine::new(&scratch, "b", &bucket);
    let copied = std::process::Command::new("cp").arg("-a").args([first.data_dir(), copy.data_dir()]).status();
    assert!(copied.expect("cp runs").success());
    first.serve(&[]);
    first.sql("INSERT INTO t VALUES (2)");
    first.archived();
    copy.serve(&[]).attend(&["--takeover-after=0"]);
    assert_eq!(copy.ended(), 73, "{}", copy.log());
    assert!(copy.log().contains("does not continue the repository"), "{}", copy.log());
    first.sql("INSERT INTO t VALUES (3)");
    first.archived();
    assert_eq!(bucket.json(&["list"])["generations"].as_array().map(Vec::len), Some(1), "nobody claimed");
    assert_eq!(first.stop(), 0);
}

#[test]
fn a_promotion_that_would_lose_acknowledged_commits_is_refused_at_rpo_zero() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    let mut first = served(&scratch, &bucket);
    first.attend(&["--rpo=0"]).ready().with_backup();
    let mut second = standby(&scratch, "b", &bucket, &first);
    second.server_ends(Signal::SIGINT);
    // Acknowledged, because it is in the bucket; the standby that is promoted next never saw it.
    first.sql("CREATE TABLE t (id int); INSERT INTO t VALUES (1)");
    first.vanish();
    second.serve(&[]).sql("SELECT pg_promote()");
    second.attend(&["--rpo=0", "--takeover-after=0"]);
    assert_eq!(second.ended(), 73, "{}", second.log());
    assert!(second.log().contains("no acknowledged commit may be lost"), "{}", second.log());
    let mut next = Machine::new(&scratch, "c", &bucket);
    next.start(&["--rpo=0"]).ready();
    assert_eq!(next.sql("SELECT count(*) FROM t"), "1");
    assert_eq!(next.stop(), 0);
}
