//! One life as the writer: under one generation, and those that follow gaps.

use std::time::Duration;

use tokio::sync::watch;

use super::join::Joined;
use super::let_go;
use crate::archive::stream::{Order, Progress, watch_lag};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::events::{Event, Events};
use crate::model::Lsn;
use crate::postgres::{PostmasterFile, ServerStatus};
use crate::repository::Writer;
use crate::run::signals::{Asked, NOTICE, Signals, asked};
use crate::run::streaming::{Expected, Streaming};
use crate::run::supervisor::LAG_LEAST;
use crate::run::supervisor::LAST_WORDS;
use crate::run::{Options, Start, ending, hold, notices, schedule, telling};
use crate::status::Board;

/// How long a server that was told to stop with us may take to say that it does.
const STOPPING_SOON: Duration = Duration::from_millis(500);

/// How a life as the writer ended.
pub(super) enum End {
    /// The server became something else, or what went wrong may pass: look again.
    Again(Error),
    /// A stop was asked for.
    Stopped,
}

pub(super) struct Life<'a> {
    pub options: &'a Options,
    pub joined: Joined,
    pub board: &'a Board,
    pub clock: &'a Clock,
    pub events: &'a Events,
}

impl Life<'_> {
    pub async fn live(&self, signals: &mut Signals) -> Result<End> {
        let Life { options, joined, board, clock, events } = self;
        let expected = Expected::On(joined.timeline);
        let mut streaming = Streaming::start(options, &joined.pusher, joined.start, expected);
        let _followed = telling::follow(board, streaming.progress.clone());
        let care = self.care(streaming.progress.clone(), streaming.writer.clone());
        let notice = notices::until_leaving(options.notices.as_deref(), clock, events);
        let mut noticed = false;
        tokio::pin!(care, notice);
        let end = loop {
            tokio::select! {
                ended = &mut streaming.task => {
                    let error = match ended {
                        Ok(Ok(_)) => Error::internal("the stream ended by itself"),
                        Ok(Err(error)) => error,
                        Err(error) => Error::internal("the stream's task ended").source(error),
                    };
                    break self.ended(error, false, *streaming.progress.borrow());
                }
                error = &mut care => {
                    streaming.order(Order::Leave);
                    let _ = clock.within(options.grace, &mut streaming.task).await;
                    break self.ended(error, true, *streaming.progress.borrow());
                }
                what = asked(signals, &mut notice, noticed) => match what {
                    // The server is not ours to stop, and goes on until somebody does: so do we.
                    Asked::Stop(NOTICE) => {
                        noticed = true;
                        streaming.order(Order::Hurry);
                    }
                    Asked::Stop(name) => {
                        events.emit(Event::Stopping { why: format!("{} received", name.to_lowercase()) });
                        self.leave(streaming).await;
                        break Ok(End::Stopped);
                    }
                    Asked::Reload => (),
                }
            }
        };
        telling::not_ready(board, options)?;
        end
    }

    /// What is done while the stream runs; returns only with what went wrong.
    async fn care(&self, mut progress: watch::Receiver<Progress>, writer: watch::Receiver<Writer>) -> Error {
        let Life { options, joined, board, clock, events } = self;
        if progress.wait_for(|progress| progress.connected && progress.opened).await.is_err() {
            return std::future::pending().await;
        }
        if let Err(error) = self.begin().await {
            return error;
        }
        let limit = (options.rpo * 3).max(LAG_LEAST);
        let lag = watch_lag(progress.clone(), limit, (*clock).clone(), (*events).clone());
        let anew = joined.start == Start::Now;
        tokio::select! {
            ended = schedule::follow(options, &joined.pusher, writer, anew, (events, board)) => match ended {
                Err(error) => error,
                Ok(()) => Error::internal("the schedule ended by itself"),
            },
            () = hold::watch(options, progress, board, (clock, events)) => std::future::pending().await,
            () = lag => std::future::pending().await,
        }
    }

    /// The log is open: commits wait for it if they are to, and whoever asks is told so.
    async fn begin(&self) -> Result<()> {
        let Life { options, joined, board, clock, events } = self;
        hold::set(options, options.rpo.is_zero(), clock).await?;
        if options.rpo.is_zero() {
            hold::confirmed(options, clock).await?;
        }
        board.degraded(false);
        telling::ready(board, options)?;
        let port = PostmasterFile::of_starting(&options.data_dir)?.map_or(0, |file| file.port);
        events.emit(Event::Ready { port, generation: joined.pusher.writer.claim.generation });
        Ok(())
    }

    /// `for_good`: what was refused once would be refused again.
    fn ended(&self, error: Error, for_good: bool, progress: Progress) -> Result<End> {
        if error.kind() == Kind::Fenced {
            let local = progress.server.max(progress.received);
            self.events.emit(Event::Fenced { local, durable: progress.durable });
            return Err(error);
        }
        if for_good && error.kind() == Kind::Refused { Err(error) } else { Ok(End::Again(error)) }
    }

    /// Whether the server is down, or on its way down and there within the grace period: a machine or a container that
    /// stops tells both of us at the same time.
    async fn has_ended_with_us(&self) -> bool {
        let began = self.clock.monotonic();
        loop {
            // A file that cannot be read proves nothing.
            let Ok(file) = PostmasterFile::of_starting(&self.options.data_dir) else { return false };
            let Some(file) = file.filter(|file| file.is_alive(&self.options.data_dir)) else { return true };
            let patience = if file.status == ServerStatus::Stopping { self.options.grace / 2 } else { STOPPING_SOON };
            if self.clock.monotonic() - began > patience {
                return false;
            }
            self.clock.sleep(STOPPING_SOON / 10).await;
        }
    }

    /// Stops writing: what was received is brought in; commits do not wait for us any more; and the log of a server that
    /// has ended is ended too.
    async fn leave(&self, streaming: Streaming) {
        let deadline = self.clock.monotonic() + self.options.grace;
        streaming.order(Order::Hurry);
        let alive = !self.has_ended_with_us().await;
        if alive {
            let_go(self.options, self.clock, self.events).await;
        }
        streaming.order(if alive { Order::Leave } else { Order::Finish });
        let durable = || -> Lsn { streaming.progress.borrow().durable };
        let left = || deadline.saturating_sub(self.clock.monotonic()).max(LAST_WORDS);
        let outcome = self.clock.within(left(), streaming.task).await;
        let error = match outcome {
            Some(Ok(Ok(log))) if !alive => {
                let beside = (&*self.options.beside, deadline);
                let release = ending::release(log, &self.joined.pusher, true, beside, self.events);
                match self.clock.within(left(), release).await {
                    Some(Ok(())) => return,
                    Some(Err(error)) => error.to_string(),
                    None => format!("the grace period of {} s is over", self.options.grace.as_secs()),
                }
            }
            Some(Ok(Ok(_))) => {
                self.events
                    .info(format!("WAL up to {} is in the repository; the server goes on without us", durable()));
                return;
            }
            Some(Ok(Err(error))) => error.to_string(),
            Some(Err(error)) => error.to_string(),
            None => format!("the grace period of {} s is over", self.options.grace.as_secs()),
        };
        self.events.emit(Event::WalLeftBehind { durable: durable(), error });
    }
}
