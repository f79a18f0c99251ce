//! One suite of rules for every store, and what `init` makes of stores that break them.

use std::sync::Arc;
use std::time::Duration;

use perennial::clock::Clock;
use perennial::error::Kind;
use perennial::events::Events;
use perennial::model::{SystemId, Timeline, WriteId};
use perennial::repository::vault::Vault;
use perennial::repository::{Codec, NewWriter, Repository, WalObject, layout};
use perennial::storage::faulty::{Fault, Faulty};
use perennial::storage::{
    self, Adapter, Body, Created, Location, Lock, LockMode, Policy, Retrying, S3Settings, Store, StoreSettings,
    conformance,
};
use perennial::wal::WalFileName;

use crate::support::*;

fn lock_of(days: u64) -> Lock {
    let keep = Duration::from_secs(days * 86_400);
    Lock { keep, mode: LockMode::Compliance, is_passing: layout::is_passing }
}

fn store(url: &str, env: &[(String, String)]) -> Arc<dyn Store> {
    store_with_home(url, env, None)
}

pub fn store_with_home(url: &str, env: &[(String, String)], home: Option<&std::path::Path>) -> Arc<dyn Store> {
    opened(url, env, home, None)
}

fn opened(url: &str, env: &[(String, String)], home: Option<&std::path::Path>, lock: Option<Lock>) -> Arc<dyn Store> {
    let location: Location = url.parse().expect("an address");
    let variables = env.iter().cloned().collect();
    let s3 = S3Settings { variables, home: home.map(Into::into), storage_class: None, lock };
    let settings = StoreSettings { s3, azure: env.to_vec(), ..StoreSettings::default() };
    storage::open(&location, &settings, &Clock::system(), &Events::silent()).expect("opened")
}

#[tokio::test]
async fn memory_keeps_the_rules() {
    conformance::run(&Adapter::memory(), "c").await.expect("conforms");
}

#[tokio::test]
async fn an_encrypted_store_keeps_the_rules() {
    let identity = age::x25519::Identity::generate();
    let secret = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
    let recipient = identity.to_public().to_string().parse().expect("a recipient");
    let memory: Arc<dyn Store> = Arc::new(Adapter::memory());
    let identities = Arc::new(move || Ok(Some(secret.clone())));
    let vault: Arc<dyn Store> = Arc::new(Vault::new(Arc::clone(&memory), identities));
    let clock = Clock::system();
    Repository::make(Arc::clone(&vault), Codec::default(), &[recipient], &clock).await.expect("made");
    conformance::run(&*vault, "c").await.expect("conforms");
    vault.create("a", &body("plain")).await.expect("stored");
    let stored = memory.read("a", 0..100).await.expect("read").expect("there");
    assert!(!stored.bytes.windows(5).any(|five| five == b"plain"));
}

#[tokio::test]
async fn files_keep_the_rules() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = store(&format!("file://{}", directory.path().display()), &[]);
    conformance::run(&*store, "c").await.expect("conforms");
}

#[tokio::test]
async fn a_real_s3_server_keeps_the_rules() {
    let bucket = Bucket::s3();
    conformance::run(&*store(&bucket.url, &bucket.env), "c").await.expect("conforms");
}

#[tokio::test]
async fn what_is_locked_cannot_be_deleted_by_whoever_got_hold_of_the_keys() {
    let bucket = Bucket::lockable();
    let store = opened(&bucket.url, &bucket.env, None, Some(lock_of(30)));
    conformance::run(&*store, "c").await.expect("conforms");
    let endpoint = from_run("PERENNIAL_TEST_S3");
    let at = |key: &str| format!("{endpoint}/{}/{key}", bucket.url.strip_prefix("s3://").expect("S3"));
    let passing = layout::log_entry(perennial::model::Generation(1), 1);
    for key in [layout::DESCRIPTOR, &passing] {
        assert_eq!(store.create(key, &body("precious")).await.expect("stored"), Created::Now);
    }
    let said = signed("HEAD", &at(layout::DESCRIPTOR));
    let header = |name: &str| said.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::trim));
    assert_eq!(header("x-amz-object-lock-mode"), Some("compliance"), "{said}");
    assert!(header("x-amz-object-lock-retain-until-date").is_some(), "{said}");
    assert!(
        !signed("HEAD", &at(&passing)).contains("x-amz-object-lock-mode"),
        "an entry of a log is of use for seconds"
    );
    // A delete hides it, and its version stays.
    let version = header("x-amz-version-id").expect("a version").to_owned();
    store.delete(layout::DESCRIPTOR).await.expect("hidden");
    assert!(store.read(layout::DESCRIPTOR, 0..10).await.expect("read").is_none());
    let versioned = format!("{}?versionId={version}", at(layout::DESCRIPTOR));
    let refused = signed("DELETE", &versioned);
    assert!(refused.starts_with("http/1.1 403"), "{refused}");
    assert!(signed("GET", &versioned).ends_with("precious"));
}

#[tokio::test]
async fn a_lock_is_renewed_and_never_cut_short() {
    let bucket = Bucket::lockable();
    let endpoint = from_run("PERENNIAL_TEST_S3");
    let at = format!("{endpoint}/{}/{}", bucket.url.strip_prefix("s3://").expect("S3"), layout::DESCRIPTOR);
    let with = |days: u64| opened(&bucket.url, &bucket.env, None, Some(lock_of(days)));
    let until = || {
        let said = signed("HEAD", &at);
        let header = said.lines().find_map(|line| line.strip_prefix("x-amz-object-lock-retain-until-date: "));
        header.map(|until| until.trim().to_owned())
    };
    opened(&bucket.url, &bucket.env, None, None).create(layout::DESCRIPTOR, &body("precious")).await.expect("stored");
    assert_eq!(until(), None);
    // Also what was written before anybody asked for a lock.
    with(2).renew(layout::DESCRIPTOR).await.expect("locked");
    let first = until().expect("locked");
    with(4).renew(layout::DESCRIPTOR).await.expect("renewed");
    let second = until().expect("locked");
    assert!(second > first, "{first} {second}");
    with(1).renew(layout::DESCRIPTOR).await.expect("left alone");
    assert_eq!(until().as_ref(), Some(&second));
    let bare = Bucket::s3();
    let store = opened(&bare.url, &bare.env, None, None);
    store.create(layout::DESCRIPTOR, &body("x")).await.expect("stored");
    let error = opened(&bare.url, &bare.env, None, Some(lock_of(9))).renew(layout::DESCRIPTOR).await;
    assert!(error.expect_err("it cannot").hint_text().into_iter().any(|hint| hint.contains("Object Lock")));
}

#[tokio::test]
async fn what_is_written_once_is_locked_anew() {
    let bucket = Bucket::lockable();
    let endpoint = from_run("PERENNIAL_TEST_S3");
    let until = |key: &str| {
        let said = signed("HEAD", &format!("{endpoint}/{}/{key}", bucket.url.strip_prefix("s3://").expect("S3")));
        let header = said.lines().find_map(|line| line.strip_prefix("x-amz-object-lock-retain-until-date: "));
        header.map(|until| until.trim().to_owned())
    };
    let clock = Clock::system();
    // Whether it is locked does not matter: as before anybody asked for a lock.
    let bare = opened(&bucket.url, &bucket.env, None, None);
    let (repository, _) = Repository::init(bare, Codec::default(), &clock).await.expect("made");
    let new = NewWriter {
        writer_id: WriteId(clock.random()),
        system_id: SystemId(7),
        pg_major: 15,
        segment_size: (1 << 24).try_into().expect("a size"),
        host: String::new(),
    };
    let generation = repository.try_claim(None, None, &new).await.expect("asked").expect("claimed").generation;
    let name = WalFileName::History(Timeline(2));
    let identity = (WriteId(clock.random()), clock.now());
    let history = WalObject::small(name, SystemId(7), b"1\t0/5000000\tno reason\n", Codec::default(), identity);
    repository.put_wal(generation, &history.expect("made"), &[]).await.expect("put");
    let [claim, history] = [layout::claim(generation), layout::wal_file(generation, name)];
    let store = opened(&bucket.url, &bucket.env, None, Some(lock_of(2)));
    let locking = Repository::open(Arc::clone(&store), &clock).await.expect("opened");
    let error = locking.renew_locks(&claim).await.expect_err("it is not locked").to_string();
    assert!(error.contains("does not say that it has one"), "{error}");
    assert_eq!(until(layout::DESCRIPTOR), None);
    store.create("packs/1", &body("of a full backup")).await.expect("stored");
    locking.renew_locks("packs/1").await.expect("renewed");
    for key in [layout::DESCRIPTOR, &claim, &history] {
        assert!(until(key).is_some_and(|until| until > clock.now().short().replace(' ', "T")), "{key}");
    }
}

#[tokio::test]
async fn a_bucket_that_locks_nothing_says_so() {
    let bucket = Bucket::s3();
    let store = opened(&bucket.url, &bucket.env, None, Some(lock_of(1)));
    let error = store.create("packs/1", &body("x")).await.expect_err("it cannot");
    assert!(error.hint_text().into_iter().any(|hint| hint.contains("Object Lock")), "{error}");
}

#[tokio::test]
async fn a_real_s3_server_over_tls_keeps_the_rules() {
    let bucket = Bucket::s3_tls();
    conformance::run(&*store(&bucket.url, &bucket.env), "c").await.expect("conforms");
}

#[tokio::test]
async fn an_azure_server_keeps_the_rules() {
    let bucket = Bucket::azure();
    conformance::run(&*store(&bucket.url, &bucket.env), "c").await.expect("conforms");
}

/// Short waits: the faults are ours, not a network's.
fn hasty(inner: Arc<dyn Store>) -> Retrying {
    let ms = std::time::Duration::from_millis;
    let policy = Policy { patience: ms(2000), first_wait: ms(1), longest_wait: ms(5), ..Policy::default() };
    Retrying::new(inner, policy, Clock::system(), Events::silent())
}

pub fn body(text: &str) -> Body {
    Body::from(text.as_bytes().to_vec())
}

#[tokio::test]
async fn a_write_whose_answer_was_lost_is_known_to_be_ours() {
    let faulty = Faulty::new(Arc::new(Adapter::memory()));
    let store = hasty(Arc::new(faulty.clone()));
    faulty.queue(&[Fault::AnswerLost, Fault::Refused]);
    assert_eq!(store.create("key", &body("write id 1")).await.expect("settled"), Created::Now);
}

#[tokio::test]
async fn a_write_whose_answer_was_lost_and_that_a_rival_overtook_is_known_to_be_lost() {
    let memory: Arc<dyn Store> = Arc::new(Adapter::memory());
    let faulty = Faulty::new(Arc::clone(&memory));
    let store = hasty(Arc::new(faulty.clone()));
    memory.create("key", &body("write id of a rival")).await.expect("created");
    faulty.queue(&[Fault::Refused, Fault::None]);
    assert_eq!(store.create("key", &body("write id 1")).await.expect("settled"), Created::AlreadyThere);
}

#[tokio::test]
async fn an_outage_is_an_error_and_never_absence() {
    let faulty = Faulty::new(Arc::new(Adapter::memory()));
    let store = hasty(Arc::new(faulty.clone()));
    faulty.queue(&[Fault::Refused; 10_000]);
    let error = store.read("key", 0..10).await.expect_err("not an answer");
    assert_eq!(error.kind(), Kind::Unreachable);
    let error = Repository::open(Arc::new(store), &Clock::system()).await.expect_err("not an answer");
    assert_eq!(error.kind(), Kind::Unreachable);
}

#[tokio::test]
async fn a_refusal_is_not_retried() {
    let faulty = Faulty::new(Arc::new(Adapter::memory()));
    let store = hasty(Arc::new(faulty.clone()));
    faulty.queue(&[Fault::Denied]);
    assert_eq!(store.read("key", 0..10).await.expect_err("denied").kind(), Kind::Denied);
    assert!(store.read("key", 0..10).await.expect("the next request works").is_none());
}

#[tokio::test]
async fn a_store_that_ignores_conditions_is_refused_by_init() {
    let mut faulty = Faulty::new(Arc::new(Adapter::memory()));
    faulty.ignores_conditions = true;
    let error = Repository::init(Arc::new(faulty), Codec::default(), &Clock::system()).await.expect_err("refused");
    assert_eq!(error.kind(), Kind::Refused);
    assert!(error.to_string().contains("If-None-Match"), "{error}");
}

#[tokio::test]
async fn an_init_that_was_cut_off_is_not_in_the_way_of_the_next() {
    let store: Arc<dyn Store> = Arc::new(Adapter::memory());
    for left in ["perennial.probe/0123456789abcdef0123456789abcdef", "perennial.probe"] {
        store.create(left, &Body::from(b"perennial probe".to_vec())).await.expect("stored");
    }
    let (_, created) = Repository::init(store, Codec::default(), &Clock::system()).await.expect("made");
    assert_eq!(created, Created::Now);
}
