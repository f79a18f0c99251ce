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
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, OnceCell};
use tokio::task::JoinHandle;

use super::fetch::{FetchOptions, Fetched, Source, Wanted, download};
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

/// A question to the helper, and its answer, are one JSON line each.
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
    Failed { damaged: bool, message: String, hint: Option<String> },
}

/// Identifies a history to both sides.
pub fn history_key(address: &str, options: FetchOptions) -> String {
    format!("{address} {options:?}")
}

/// Asks a helper. `None` when none can be had, so that the caller fetches by itself.
pub async fn ask(
    clock: &crate::clock::Clock,
    history: &str,
    name: WalFileName,
    destination: &Path,
    start: impl FnOnce() -> Result<()>,
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
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer).await.is_err() {
        return Ok(None);
    }
    match serde_json::from_str(&answer) {
        Ok(Answer::Done) => Ok(Some(Fetched::Done)),
        Ok(Answer::EndOfWal(why)) => Ok(Some(Fetched::EndOfWal(why))),
        Ok(Answer::Failed { damaged, message, hint }) => {
            let kind = if damaged { Kind::Damaged } else { Kind::Unreachable };
            let error = Error::new(kind, message);
            Err(hint.into_iter().fold(error, Error::hint))
        }
        Ok(Answer::OtherHistory) | Err(_) => Ok(None),
    }
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
        ahead: Mutex::default(),
        tail: Mutex::default(),
    });
    let parent = watch_process(postmaster)?;
    loop {
        tokio::select! {
            accepted = clock.within(IDLE, listener.accept()) => match accepted {
                Some(Ok((stream, _))) => drop(tokio::spawn(Arc::clone(&helper).answer(stream))),
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
        let mut line = String::new();
        if BufReader::new(read).read_line(&mut line).await.is_err() {
            return;
        }
        let answer = match serde_json::from_str::<Question>(&line) {
            Ok(question) if question.history == self.history => match self.fetch(&question).await {
                Ok(Fetched::Done) => Answer::Done,
                Ok(Fetched::EndOfWal(why)) => Answer::EndOfWal(why),
                Err(error) => Answer::Failed {
                    damaged: error.kind() == Kind::Damaged,
                    message: error.to_string(),
                    hint: error.hint_text().map(str::to_owned),
                },
            },
            _ => Answer::OtherHistory,
        };
        if let Ok(mut line) = serde_json::to_vec(&answer) {
            line.push(b'\n');
            let _ = write.write_all(&line).await;
        }
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
        let fetched_ahead = self.ahead.lock().await.tasks.remove(&segment);
        if let Some(task) = fetched_ahead
            && let Ok(Ok((path, wanted))) = task.await
        {
            self.fetch_ahead(segment).await?;
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
        drop(source);
        if fetched == Fetched::Done {
            if let Some(wanted) = wanted {
                self.keep(wanted, &question.destination).await;
            }
            self.fetch_ahead(segment).await?;
        }
        Ok(fetched)
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
    async fn fetch_ahead(&self, from: SegmentName) -> Result<()> {
        let source = self.source().await?.lock().await;
        let size = source.segment_size();
        let count = (AHEAD_BYTES / size.bytes()).clamp(1, AHEAD_MAX) as usize;
        let wanted = source.following(from, count);
        drop(source);
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
fn place(from: &Path, to: &Path) -> Result<()> {
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
