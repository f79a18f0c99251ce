//! What goes wrong has its own message, its own exit code and a next step; and nothing is ever made on a doubt.

use crate::support::*;

const DENIED: i32 = 77;
const NOT_FOUND: i32 = 66;
const UNREACHABLE: i32 = 69;
const REFUSED: i32 = 73;
const USAGE: i32 = 2;

/// A boot that must fail: nothing may be made of the directory.
fn boot(bucket: &Bucket, more: &[&str], code: i32) -> String {
    let scratch = Scratch::new();
    let data = scratch.path().join("data");
    let said = bucket.must_fail(&[&["run", "-D", data.to_str().expect("text")], more].concat(), code);
    assert!(!data.join("PG_VERSION").exists(), "a cluster was made on a doubt: {said}");
    assert!(said.contains("hint:"), "no next step: {said}");
    said
}

#[test]
fn an_empty_prefix_is_not_made_into_a_database_unless_asked() {
    assert!(boot(&Bucket::s3(), &[], NOT_FOUND).contains("--init"));
    let scratch = Scratch::new();
    assert!(boot(&Bucket::directory(&scratch), &[], NOT_FOUND).contains("--init"));
}

#[test]
fn a_bucket_that_does_not_exist_is_named() {
    let bucket = Bucket::s3();
    let mistyped = Bucket { url: bucket.url.replace("perennial-test", "perennial-tset"), ..bucket };
    assert!(boot(&mistyped, &["--init"], NOT_FOUND).contains("bucket does not exist"));
}

#[test]
fn wrong_credentials_are_told_apart_from_missing_rights() {
    let wrong = Bucket::s3().with_env("AWS_SECRET_ACCESS_KEY", "wrong");
    assert!(boot(&wrong, &["--init"], DENIED).contains("does not accept these credentials"));
    let stranger =
        Bucket::s3().with_env("AWS_ACCESS_KEY_ID", "stranger").with_env("AWS_SECRET_ACCESS_KEY", "stranger-secret");
    assert!(boot(&stranger, &["--init"], DENIED).contains("access is denied"));
}

#[test]
fn a_place_that_is_something_else_is_left_alone() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    std::fs::write(bucket.path().join("precious.txt"), b"x").expect("written");
    assert!(boot(&bucket, &["--init"], REFUSED).contains("precious.txt"));
}

#[test]
fn mistakes_on_the_command_line_are_usage_errors() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    for arguments in [
        &["run"][..],
        &["restore", "-D", "/x", "--to-lsn", "nonsense"],
        &["restore", "-D", "/x", "--to-time", "2026-11-22 18:30:00"],
        &["restore", "-D", "/x", "--to-xid", "5", "--immediate"],
        &["run", "-D", "/x", "--rpo", "soon"],
        &["list", "--repo", "ftp://x"],
        &["nonsense"],
    ] {
        bucket.must_fail(arguments, USAGE);
    }
}

#[test]
fn an_endpoint_that_does_not_answer_is_unreachable_and_nothing_is_made() {
    // A port that was free a moment ago: the connection is refused at once, and again, until patience ends.
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let bucket = Bucket::at_endpoint(&format!("http://127.0.0.1:{port}"), "s3://perennial-test/x")
        .with_env("PERENNIAL_PATIENCE", "2s");
    assert!(boot(&bucket, &["--init"], UNREACHABLE).contains("cannot be reached"));
}

#[test]
fn a_store_that_answers_503_is_unreachable_and_nothing_is_made() {
    let busy = Answering::start(
        "503 Service Unavailable",
        "<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>",
    );
    let bucket = Bucket::at_endpoint(&busy.endpoint, "s3://perennial-test/x").with_env("PERENNIAL_PATIENCE", "2s");
    assert!(boot(&bucket, &["--init"], UNREACHABLE).contains("SlowDown"));
}

#[test]
fn a_proxy_that_answers_404_for_the_store_is_not_an_empty_bucket() {
    let proxy = Answering::start("404 Not Found", "<html>no such host</html>");
    let bucket = Bucket::at_endpoint(&proxy.endpoint, "s3://perennial-test/x").with_env("PERENNIAL_PATIENCE", "2s");
    boot(&bucket, &["--init"], UNREACHABLE);
}

#[test]
fn expired_credentials_and_a_wrong_region_have_messages_of_their_own() {
    let expired = Answering::start(
        "400 Bad Request",
        "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
    );
    assert!(
        boot(&Bucket::at_endpoint(&expired.endpoint, "s3://perennial-test/x"), &["--init"], DENIED).contains("expired")
    );
    let elsewhere = Answering::start(
        "301 Moved Permanently",
        "<Error><Code>PermanentRedirect</Code><Message>Use the other endpoint.</Message></Error>",
    );
    assert!(
        boot(&Bucket::at_endpoint(&elsewhere.endpoint, "s3://perennial-test/x"), &["--init"], REFUSED)
            .contains("region")
    );
}

#[test]
fn the_address_comes_from_the_instances_metadata_when_nothing_else_names_it() {
    let scratch = Scratch::new();
    let repository = Bucket::directory(&scratch);
    let metadata = Answering::start("200 OK", &repository.url);
    let mut command = repository.command(&["run", "-D", "/tmp/never-made"]);
    command.env_remove("PERENNIAL_REPO").env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint);
    let output = command.output().expect("runs");
    assert_eq!(output.status.code(), Some(NOT_FOUND), "{}", text(&output));
    assert!(
        text(&output).contains(&format!("the instance's metadata names the repository: {}", repository.url)),
        "{}",
        text(&output)
    );
}

#[test]
fn a_restore_command_that_cannot_be_understood_is_not_the_end_of_wal() {
    let scratch = Scratch::new();
    let bucket = Bucket::directory(&scratch);
    for words in [
        &["wal", "fetch", "000000010000000000000001", "x", "--flag-of-another-version"][..],
        &["wal", "fetch", "000000010000000000000001"],
        &["--unknown", "wal", "fetch", "000000010000000000000001", "x"],
    ] {
        let code = bucket.command(words).output().expect("runs").status.code().expect("a code");
        assert!(code >= 126, "{words:?}: PostgreSQL would take {code} for the end of WAL and promote");
    }
}
