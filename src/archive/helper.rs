//! The fetch helper: one process per recovering server that knows the history, keeps its connections warm and fetches
//! ahead, so that each `wal fetch` is a question over a local socket and a rename.
//!
//! It is started by the first `wal fetch`, ends with the postmaster, and holds nothing that cannot be fetched again.
//! Paths are relative to the data directory, which is the working directory of both sides: a socket's path is short.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, OnceCell};
use tokio::task::JoinHandle;

use super::fetch::{FetchOptions, Fetched, LOOKS, Source, Wanted, download};
use super::follow::{Answer as Followed, Follower};
use crate::disk::{self, Lock};
use crate::error::{Error, IoContext, Kind, Result};
use crate::postgres::data_dir::OWN_DIR;
use crate::repository::Repository;
use crate::wal::{SegmentName, WalFileName};

/// Bytes of WAL fetched ahead (on disk, in our directory), and downloads at once.
const AHEAD_BYTES: u64 = 128 << 20;
const AHEAD_MAX: u64 = 32;
const DOWNLOADS: usize = 4;

/// Without a question for this long the helper ends; the next `wal fetch` starts another.
const IDLE: Duration = Duration::from_secs(300);

/// How long a client waits for a helper that is starting.
const START: Duration = Duration::from_secs(5);

fn socket_path() -> PathBuf {
    Path::new(OWN_DIR).join("fetch.sock")
}

fn cache_dir() -> PathBuf {
    Path::new(OWN_DIR).join("fetched")
}

fn tail_path() -> PathBuf {
    cache_dir().join("tail")
}

/// Between two tries for a standby, which waits for a repository that does not answer.
const AGAIN: Duration = Duration::from_secs(2);

/// A question to the helper, and its answer, are one JSON line each; while it waits it says so in more lines.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Question {
    name: String,
    destination: PathBuf,
    /// A helper that serves another history must not answer.
    history: String,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done,
    EndOfWal(String),
    OtherHistory,
    /// Why there is no answer yet.
    Waits(String),
    Failed {
        damaged: bool,
        message: String,
        hint: Option<String>,
    },
}

/// Identifies a history to both sides.
pub fn history_key(address: &str, options: FetchOptions) -> String {
    format!("{address} {options:?}")
}

/// Asks a helper, which may let us wait: `told` is called with the reason. `None` when no helper can be had, so that the
/// caller fetches by itself.
pub async fn ask(
    clock: &crate::clock::Clock,
    history: &str,
    (name, destination): (WalFileName, &Path),
    start: impl FnOnce() -> Result<()>,
    told: impl Fn(&str),
) -> Result<Option<Fetched>> {
    let mut stream = UnixStream::connect(socket_path()).await.ok();
    if stream.is_none() {
        start()?;
        let deadline = clock.monotonic() + START;
        while stream.is_none() && clock.monotonic() < deadline {
            clock.sleep(Duration::from_millis(5)).await;
            stream = UnixStream::connect(socket_path()).await.ok();
        }
    }
    let Some(mut stream) = stream else { return Ok(None) };
    let question =
        Question { name: name.to_string(), destination: destination.to_owned(), history: history.to_owned() };
    let Ok(mut line) = serde_json::to_vec(&question) else { return Ok(None) };
    line.push(b'\n');
    // A helper that dies in between leaves the question open: then we fetch by ourselves.
    if stream.write_all(&line).await.is_err() {
        return Ok(None);
    }
    let mut answers = BufReader::new(stream).lines();
    while let Ok(Some(answer)) = answers.next_line().await {
        match serde_json::from_str(&answer) {
            Ok(Answer::Done) => return Ok(Some(Fetched::Done)),
            Ok(Answer::EndOfWal(why)) => return Ok(Some(Fetched::EndOfWal(why))),
            Ok(Answer::Waits(why)) => told(&why),
            Ok(Answer::Failed { damaged, message, hint }) => {
                let kind = if damaged { Kind::Damaged } else { Kind::Unreachable };
                let error = Error::new(kind, message);
                return Err(hint.into_iter().fold(error, Error::hint));
            }
            Ok(Answer::OtherHistory) | Err(_) => break,
        }
    }
    Ok(None)
}

/// Runs the helper until the postmaster ends, nobody asks any more, or another helper is there already.
pub async fn serve(repository: Repository, options: FetchOptions, postmaster: i32, history: String) -> Result<()> {
    disk::create_dir(&cache_dir(), 0o700)?;
    let Some(_lock) = Lock::try_take(&Path::new(OWN_DIR).join("fetch.lock"))? else { return Ok(()) };
    clear(&cache_dir())?;
    disk::remove_if_there(&socket_path())?;
    let listener = UnixListener::bind(socket_path()).on("bind", socket_path())?;
    let clock = repository.clock().clone();
    let helper = Arc::new(Helper {
        repository,
        options,
        history,
        source: OnceCell::new(),
        follower: OnceCell::new(),
        ahead: Mutex::default(),
        tail: Mutex::default(),
    });
    let parent = watch_process(postmaster)?;
    loop {
        tokio::select! {
            accepted = clock.within(IDLE, listener.accept()) => match accepted {
                Some(Ok((stream, _))) => drop(tokio::spawn(Arc::clone(&helper).answer(stream))),
                // Somebody still waits for an answer.
                None if Arc::strong_count(&helper) > 1 => (),
                _ => break,
            },
            _ = parent.readable() => break,
        }
    }
    disk::remove_if_there(&socket_path())?;
    clear(&cache_dir())
}

/// A descriptor that becomes readable when the process ends.
fn watch_process(pid: i32) -> Result<AsyncFd<OwnedFd>> {
    let gone = || Error::postgres(format!("the postmaster {pid} has gone"));
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(gone)?;
    let descriptor = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).map_err(|_| gone())?;
    // SAFETY: an `OwnedFd` gives one and the same open descriptor for as long as it lives, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register(descriptor) }.map_err(|e| Error::local("could not watch the postmaster", e))
}

fn clear(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory).on("list directory", directory)? {
        disk::remove_if_there(&entry.on("list directory", directory)?.path())?;
    }
    Ok(())
}

struct Helper {
    repository: Repository,
    options: FetchOptions,
    history: String,
    source: OnceCell<Mutex<Source>>,
    /// Instead of a source, for a standby.
    follower: OnceCell<Mutex<Follower>>,
    ahead: Mutex<Ahead>,
    /// The segment that was put together from a log's entries last. Recovery asks for its last segment twice, and that
    /// may be thousands of requests.
    tail: Mutex<Option<Wanted>>,
}

/// Segments fetched ahead or being fetched, by name. Each task yields the path once the file is whole, and what it holds.
#[derive(Default)]
struct Ahead {
    tasks: HashMap<SegmentName, JoinHandle<Result<(PathBuf, Wanted)>>>,
    permits: Option<Arc<tokio::sync::Semaphore>>,
}

impl Helper {
    async fn answer(self: Arc<Self>, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let (mut read, mut line) = (BufReader::new(read), String::new());
        if read.read_line(&mut line).await.is_err() {
            return;
        }
        let answer = match serde_json::from_str::<Question>(&line) {
            Ok(question) if question.history == self.history => {
                let fetched = if self.options.follow {
                    tokio::select! {
                        fetched = self.fetch_when_it_is_there(&question, &mut write) => fetched,
                        // Nobody waits any more: what was asked for must not be put there later.
                        () = hung_up(&mut read) => return,
                    }
                } else {
                    self.fetch(&question).await
                };
                match fetched {
                    Ok(Fetched::Done) => Answer::Done,
                    Ok(Fetched::EndOfWal(why)) => Answer::EndOfWal(why),
                    Err(error) => Answer::Failed {
                        damaged: error.kind() == Kind::Damaged,
                        message: error.to_string(),
                        hint: error.hint_text().map(str::to_owned),
                    },
                }
            }
            _ => Answer::OtherHistory,
        };
        send(&mut write, &answer).await;
    }

    /// A standby goes on serving while the repository does not answer: neither the end of WAL nor a failure is said then.
    async fn fetch_when_it_is_there(&self, question: &Question, write: &mut OwnedWriteHalf) -> Result<Fetched> {
        loop {
            match self.follow(question).await {
                Err(error) if matches!(error.kind(), Kind::Unreachable | Kind::Denied) => {
                    send(write, &Answer::Waits(error.to_string())).await;
                    self.repository.clock().sleep(AGAIN).await;
                }
                fetched => return fetched,
            }
        }
    }

    async fn follow(&self, question: &Question) -> Result<Fetched> {
        let name: WalFileName = question.name.parse()?;
        let destination = &question.destination;
        let open = || async {
            let source = Source::open(self.repository.clone(), self.options).await?;
            Follower::open(source, Path::new("."), &cache_dir()).await.map(Mutex::new)
        };
        let mut follower = self.follower.get_or_try_init(open).await?.lock().await;
        let WalFileName::Segment(segment) = name else { return follower.give_other(name, destination).await };
        for _ in 0..LOOKS {
            let Followed::Give(wanted) = follower.answer(segment).await? else {
                return Ok(Fetched::EndOfWal(format!("there is no more of {name} yet")));
            };
            let ahead = self.fetched_ahead(segment).await.filter(|(_, of)| *of == wanted).map(|(path, _)| path);
            match follower.give(segment, wanted, ahead, destination).await {
                // Entries were collected since the listing: the segment is whole by now.
                Err(error) if error.kind() == Kind::Damaged && error.is_retryable() => follower.look().await?,
                given => {
                    given?;
                    self.fetch_ahead(follower.source(), segment).await?;
                    return Ok(Fetched::Done);
                }
            }
        }
        Err(Error::damaged(format!("{name}: entries of the log that hold it are missing, and no whole segment has it")))
    }

    async fn source(&self) -> Result<&Mutex<Source>> {
        self.source.get_or_try_init(|| open_source(self.repository.clone(), self.options)).await
    }

    async fn fetch(&self, question: &Question) -> Result<Fetched> {
        let name: WalFileName = question.name.parse()?;
        let source = self.source().await?;
        let WalFileName::Segment(segment) = name else {
            return source.lock().await.fetch(name, &question.destination).await;
        };
        if let Some((path, wanted)) = self.fetched_ahead(segment).await {
            self.fetch_ahead(&*source.lock().await, segment).await?;
            self.keep(wanted, &path).await;
            place(&path, &question.destination)?;
            return Ok(Fetched::Done);
        }
        if self.again(segment, &question.destination).await? {
            return Ok(Fetched::Done);
        }
        // Not fetched ahead, or that failed: the question decides, with an error of its own.
        let mut source = source.lock().await;
        let fetched = source.fetch(name, &question.destination).await?;
        // By the listing it was fetched by: nobody can look again meanwhile.
        let wanted = source.locate(name)?;
        if fetched == Fetched::Done {
            if let Some(wanted) = wanted {
                self.keep(wanted, &question.destination).await;
            }
            self.fetch_ahead(&source, segment).await?;
        }
        Ok(fetched)
    }

    /// The file of a segment that was fetched ahead, and what it holds.
    async fn fetched_ahead(&self, segment: SegmentName) -> Option<(PathBuf, Wanted)> {
        let task = self.ahead.lock().await.tasks.remove(&segment)?;
        task.await.ok()?.ok()
    }

    /// Answers with the copy of the tail, if it was this very piece of this very log.
    async fn again(&self, segment: SegmentName, destination: &Path) -> Result<bool> {
        let wanted = self.source().await?.lock().await.locate(WalFileName::Segment(segment))?;
        let tail = self.tail.lock().await;
        if tail.is_none() || *tail != wanted {
            return Ok(false);
        }
        let copy = tail_path().with_extension("copy");
        std::fs::copy(tail_path(), &copy).on("copy to", &copy)?;
        place(&copy, destination).map(|()| true)
    }

    /// Keeps a copy of a segment that came from a log. Not a link: PostgreSQL writes into what it was given. Without one
    /// the next question is answered by the repository.
    async fn keep(&self, wanted: Wanted, path: &Path) {
        if matches!(wanted, Wanted::Log { .. }) {
            let mut tail = self.tail.lock().await;
            *tail = std::fs::copy(path, tail_path()).is_ok().then_some(wanted);
        }
    }

    /// Starts downloads of what recovery will ask for next, and drops what lies behind it.
    async fn fetch_ahead(&self, source: &Source, from: SegmentName) -> Result<()> {
        let size = source.segment_size();
        let count = (AHEAD_BYTES / size.bytes()).clamp(1, AHEAD_MAX) as usize;
        let mut wanted = source.following(from, count);
        // Of a log a standby is given what there is when it asks, and not what there was before.
        wanted.retain(|(_, wanted)| !self.options.follow || matches!(wanted, Wanted::Object { .. }));
        let mut ahead = self.ahead.lock().await;
        let stale: Vec<SegmentName> =
            ahead.tasks.keys().filter(|name| !wanted.iter().any(|(wanted, _)| wanted == *name)).copied().collect();
        for name in stale {
            ahead.tasks.remove(&name).iter().for_each(JoinHandle::abort);
            disk::remove_if_there(&cache_dir().join(name.to_string()))?;
        }
        let permits = Arc::clone(ahead.permits.get_or_insert_with(|| Arc::new(tokio::sync::Semaphore::new(DOWNLOADS))));
        for (name, wanted) in wanted {
            let start = || tokio::spawn(fetch_to_cache(self.repository.clone(), wanted, name, Arc::clone(&permits)));
            ahead.tasks.entry(name).or_insert_with(start);
        }
        Ok(())
    }
}

async fn send(write: &mut OwnedWriteHalf, answer: &Answer) {
    if let Ok(mut line) = serde_json::to_vec(answer) {
        line.push(b'\n');
        let _ = write.write_all(&line).await;
    }
}

/// Until the other side has gone: it says nothing more.
async fn hung_up(read: &mut (impl AsyncRead + Unpin)) {
    while matches!(read.read(&mut [0; 64]).await, Ok(count) if count > 0) {}
}

async fn open_source(repository: Repository, options: FetchOptions) -> Result<Mutex<Source>> {
    Source::open(repository, options).await.map(Mutex::new)
}

async fn fetch_to_cache(
    repository: Repository,
    wanted: Wanted,
    name: SegmentName,
    permits: Arc<tokio::sync::Semaphore>,
) -> Result<(PathBuf, Wanted)> {
    let _permit = permits.acquire().await.map_err(|e| Error::internal("downloads ended").source(e))?;
    let path = cache_dir().join(name.to_string());
    download(&repository, wanted, WalFileName::Segment(name), &path).await?;
    Ok((path, wanted))
}

/// Moves a fetched file to where PostgreSQL wants it; across filesystems by a copy beside it.
#[allow(clippy::disallowed_methods, reason = "a fetched file need not survive a crash: recovery asks again")]
pub(super) fn place(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(e) if e.kind() == std::io::ErrorKind::CrossesDevices => {
            let beside = to.with_extension("tmp");
            std::fs::copy(from, &beside).on("copy to", &beside)?;
            std::fs::rename(&beside, to).on("rename to", to)?;
            disk::remove_if_there(from)
        }
        renamed => renamed.on("rename to", to),
    }
}
