//! Threads for the work of a backup, of lower priority: whatever the database, its WAL on its way and its clients need of
//! the processors goes first.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// `nice` of the threads: about a tenth of the share of an ordinary one.
const NICE: i32 = 10;

type Work = Box<dyn FnOnce() + Send>;

/// Ends with its last handle, once the work that was handed out is done.
pub struct Workers(mpsc::Sender<Work>);

/// The answer to come.
pub type Answer<T> = oneshot::Receiver<Result<T>>;

impl Workers {
    pub fn start(count: usize) -> Result<Workers> {
        let (sender, receiver) = mpsc::channel::<Work>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..count {
            let receiver = Arc::clone(&receiver);
            let work = move || {
                // Of this thread alone (setpriority(2) on Linux). Without it the backup is only less modest.
                let us = rustix::process::Pid::from_raw(nix::unistd::gettid().as_raw());
                let _ = rustix::process::setpriority_process(us, NICE);
                loop {
                    let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    match next {
                        Ok(work) => work(),
                        Err(_) => return,
                    }
                }
            };
            std::thread::Builder::new()
                .name("backup".to_owned())
                .spawn(work)
                .map_err(|e| Error::local("could not start a thread", e))?;
        }
        Ok(Workers(sender))
    }

    /// Hands work out. Nothing is refused: whoever hands it out sees to it that not too much waits (`copy::IN_FLIGHT_MAX`).
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Answer<T> {
        let (answer, receiver) = oneshot::channel();
        // Whoever does not wait any more has given the backup up.
        let _ = self.0.send(Box::new(move || drop(answer.send(work()))));
        receiver
    }
}

/// Waits for an answer.
pub async fn answer<T>(answer: Answer<T>) -> Result<T> {
    answer.await.map_err(|e| Error::internal("a reading thread ended").source(e))?
}
