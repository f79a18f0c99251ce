//! What asks this process to stop: signals, and the platform's notice.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Error, Result};

/// What a stop is called that the platform's notice asked for.
pub(super) const NOTICE: &str = "notice";

pub(super) enum Asked {
    Stop(&'static str),
    Reload,
}

/// The next signal, or the notice that the machine goes away, which is one too.
pub(super) async fn asked(
    signals: &mut Signals,
    notice: &mut (impl Future<Output = String> + Unpin),
    noticed: bool,
) -> Asked {
    tokio::select! {
        asked = signals.next() => asked,
        _ = notice, if !noticed => Asked::Stop(NOTICE),
    }
}

pub(super) struct Signals {
    term: Signal,
    int: Signal,
    quit: Signal,
    hup: Signal,
}

impl Signals {
    pub fn new() -> Result<Signals> {
        let listen = |kind| signal(kind).map_err(|e| Error::local("could not listen for signals", e));
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            int: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            hup: listen(SignalKind::hangup())?,
        })
    }

    pub async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.term.recv() => Asked::Stop("SIGTERM"),
            _ = self.int.recv() => Asked::Stop("SIGINT"),
            _ = self.quit.recv() => Asked::Stop("SIGQUIT"),
            _ = self.hup.recv() => Asked::Reload,
        }
    }

    /// Waits until a stop is asked for; its signal's name.
    pub async fn stop(&mut self) -> &'static str {
        loop {
            if let Asked::Stop(name) = self.next().await {
                return name;
            }
        }
    }
}
