//! Having the disk vouch for what it was given while more is written.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// A thread syncs the file system each time this much was written, unless it is at it still.
const STEP: u64 = 128 << 20;

/// Syncs on the way. Many a disk, a cloud's volume above all, takes bytes as fast as they come and needs its time when it is
/// asked to keep them: asked at the end only, everybody waits for that.
#[derive(Debug, Default)]
pub struct Flusher {
    written: AtomicU64,
    thread: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl Flusher {
    /// Takes note of bytes written to `file`. What went wrong when earlier ones were synced is told here or by [`end`]: a
    /// later sync does not say it again.
    ///
    /// [`end`]: Flusher::end
    pub fn wrote(&self, file: &File, bytes: u64) -> io::Result<()> {
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes < STEP {
            return Ok(());
        }
        let Ok(mut thread) = self.thread.try_lock() else { return Ok(()) };
        if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Ok(());
        }
        join(thread.take())?;
        self.written.store(0, Ordering::Relaxed);
        let file = file.try_clone()?;
        let sync = move || Ok(rustix::fs::syncfs(&file)?);
        *thread = Some(std::thread::Builder::new().name("sync".to_owned()).spawn(sync)?);
        Ok(())
    }

    /// Waits for the last sync. What was written since is not synced.
    pub fn end(&self) -> io::Result<()> {
        join(self.thread.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

fn join(thread: Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    let ended = thread.map(JoinHandle::join);
    ended.unwrap_or(Ok(Ok(()))).unwrap_or_else(|_| Err(io::Error::other("the syncing thread ended")))
}
