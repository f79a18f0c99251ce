//! Telling others how the server is: the board over HTTP and a socket, and a file that is there while it is ready.

use std::path::{Path, PathBuf};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Options;
use crate::archive::stream::Progress;
use crate::disk;
use crate::error::Result;
use crate::events::Events;
use crate::postgres::data_dir::OWN_DIR;
use crate::status::{self, Board, Phase, Wal};

/// The socket on which `perennial status -D DIR` asks, and the file that says "ready".
const SOCKET: &str = "supervisor.sock";
const READY: &str = "ready";

pub fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join(OWN_DIR).join(SOCKET)
}

/// The file that is there while clients are served.
pub fn ready_path(data_dir: &Path) -> PathBuf {
    data_dir.join(OWN_DIR).join(READY)
}

/// Tasks that end with this.
pub(super) struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// Begins to answer.
pub(super) fn tell(options: &Options, board: &Board, events: &Events) -> Result<Tasks> {
    disk::create_dir(&options.data_dir.join(OWN_DIR), 0o700)?;
    disk::remove_if_there(&ready_path(&options.data_dir))?;
    let (path, told, own) = (socket_path(&options.data_dir), events.clone(), board.clone());
    // A socket's path has a limit that the data directory's may exceed: then only HTTP is left.
    let socket = tokio::spawn(async move {
        if let Err(error) = status::serve_on_socket(own, &path).await {
            told.info(format!("`perennial status -D` cannot ask this process: {error}"));
        }
    });
    let mut tasks = vec![socket];
    if let Some(address) = options.http.clone() {
        let (told, own) = (events.clone(), board.clone());
        tasks.push(tokio::spawn(async move {
            if let Err(error) = status::serve(own, &address).await {
                told.warning(error.to_string());
            }
        }));
    }
    Ok(Tasks(tasks))
}

/// Keeps the board up to what the stream says.
pub(super) fn follow(board: &Board, mut progress: watch::Receiver<Progress>) -> Tasks {
    let board = board.clone();
    let follow = async move {
        loop {
            let Progress { connected, received, durable, server, waiting_since, entries, .. } =
                *progress.borrow_and_update();
            board.wal(Wal { server, received, durable, waiting_since, connected, entries });
            if progress.changed().await.is_err() {
                return;
            }
        }
    };
    Tasks(vec![tokio::spawn(follow)])
}

pub(super) fn ready(board: &Board, options: &Options) -> Result<()> {
    board.phase(Phase::Ready);
    disk::write_note(&ready_path(&options.data_dir), b"")
}

pub(super) fn not_ready(board: &Board, options: &Options) -> Result<()> {
    board.phase(Phase::Stopping);
    disk::remove_if_there(&ready_path(&options.data_dir))
}
