//! Becoming the writer: waiting for a primary, looking at what there is, deciding, claiming.

use std::sync::Arc;
use std::time::Duration;

use super::decide::{self, Decision, Facts, Newest};
use crate::archive::push::Pusher;
use crate::archive::resume;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events, Level};
use crate::model::{Generation, Timeline};
use crate::postgres::data_dir::{self, OWN_DIR};
use crate::postgres::replication::Identity;
use crate::postgres::{Client, ControlFile, PostmasterFile, Replication, ServerStatus, version_of};
use crate::repository::log::{LogView, Position};
use crate::repository::{Repository, Writer};
use crate::run::boot::Holder;
use crate::run::claimant::Claimant;
use crate::run::facts::{self, Watched};
use crate::run::{Options, Start, hold, patience_between_looks};
use crate::storage::Store;

/// How often a server is looked at that is down or a standby: local reads, and a query when it is up.
const LOOK: Duration = Duration::from_millis(500);

/// A generation that is ours, and the server it is for.
pub(super) struct Joined {
    pub pusher: Pusher,
    pub start: Start,
    pub timeline: Timeline,
}

/// Waits until the server is a primary that may be written for, and claims.
pub(super) async fn join(
    store: Arc<dyn Store>,
    options: &Options,
    watched: &mut Watched,
    (clock, events): (&Clock, &Events),
) -> Result<Joined> {
    let mut told = None;
    loop {
        data_dir::refuse_partial(&options.data_dir)?;
        let identity = until_primary(options, clock, events).await?;
        let repository = Repository::open(Arc::clone(&store), clock).await?;
        let facts = gather(&repository, options, identity, watched).await?;
        let decision = decide::decide(&facts);
        if told.as_ref() != Some(&decision) {
            events.emit(Event::Decided { decision: decision.to_string() });
            told = Some(decision.clone());
        }
        if let Decision::Refuse(refusal) = decision {
            return Err(refusal.into());
        }
        if options.rpo.is_zero() && !hold::can_degrade(options) {
            // From here on nothing is acknowledged that nobody keeps.
            hold::set(options, true, clock).await?;
        }
        if let Decision::Spare { .. } = decision {
            clock.sleep(patience_between_looks(options)).await;
            continue;
        }
        let claimant = Claimant { options, clock, events };
        if let Some(joined) = claim(repository, claimant, &facts, decision).await? {
            return Ok(joined);
        }
    }
}

/// Acts on a decision; `None` when another was faster.
async fn claim(
    repository: Repository,
    claimant: Claimant<'_>,
    facts: &Facts,
    decision: Decision,
) -> Result<Option<Joined>> {
    let (options, events) = (claimant.options, claimant.events);
    let wrote = facts.newest.as_ref().and_then(|newest| newest.wrote);
    let continues = matches!(decision, Decision::Continue { .. });
    let (newest, forked_at) = match decision {
        Decision::Begin { newest } => (newest, None),
        Decision::Follow { newest, at, .. } => (Some(newest), Some(at)),
        Decision::Continue { newest } => (Some(newest), None),
        Decision::Spare { .. } | Decision::Refuse(_) => return Ok(None),
    };
    if let (true, Some((writer, _))) = (continues, wrote) {
        // Before the claim: a copy of this disk must not stop the writer it was copied from.
        same_to_the_byte(&repository, &repository.log(writer).await?, options).await?;
    }
    let newest = newest.map(|newest| newest.generation);
    let Some(writer) = claimant.claim(&repository, newest, newest).await? else { return Ok(None) };
    let sealed = claimant.seal_older(&repository, writer.claim.generation).await?;
    let last = sealed.into_iter().find(|view| view.end().is_some());
    let end = last.as_ref().and_then(LogView::end).or(wrote.map(|(_, end)| end));
    let start = match (&last, end, forked_at) {
        (Some(last), ..) if continues => {
            same_to_the_byte(&repository, last, options).await?;
            end.map_or(Start::Now, Start::Continue)
        }
        // What lies between the log's end and the fork is in no log: the history begins anew, with a base backup.
        (_, Some(end), Some(at)) if at > end.lsn => Start::Now,
        (_, Some(end), Some(at)) => {
            if at < end.lsn {
                let text = format!(
                    "the server was promoted at {at}: WAL from there to {} was acknowledged under an older generation and is not in its history",
                    end.lsn
                );
                events.emit(Event::Note { level: Level::Alarm, text });
            }
            Start::Fork
        }
        _ => Start::Now,
    };
    let pusher = Pusher { repository, writer, data_dir: options.data_dir.clone(), events: events.clone() };
    Ok(Some(Joined { pusher, start, timeline: facts.history.timeline }))
}

async fn same_to_the_byte(repository: &Repository, view: &LogView, options: &Options) -> Result<()> {
    match resume::diverges(repository, view, &options.data_dir).await? {
        None => Ok(()),
        Some(why) => Err(Error::refused(format!("the server does not continue the repository: {why}")).hint(
            "its disk was put back in time or copied, or another wrote under its name; if it is the database all the same, start once with --adopt",
        )),
    }
}

/// Waits until a primary runs in the data directory.
async fn until_primary(options: &Options, clock: &Clock, events: &Events) -> Result<Identity> {
    let mut told = false;
    loop {
        match look(options, clock).await {
            Ok(Some(identity)) => return Ok(identity),
            Ok(None) => {
                if !std::mem::replace(&mut told, true) {
                    events.info(format!("waiting until a primary runs in {}", options.data_dir.display()));
                }
            }
            Err(error) if error.is_retryable() => (),
            Err(error) => return Err(error),
        }
        clock.sleep(LOOK).await;
    }
}

/// The primary that runs there; `None` for a standby, or nobody.
async fn look(options: &Options, clock: &Clock) -> Result<Option<Identity>> {
    let up = |file: &PostmasterFile| file.status == ServerStatus::Ready && file.is_alive(&options.data_dir);
    if !PostmasterFile::of_starting(&options.data_dir)?.is_some_and(|file| up(&file)) {
        return Ok(None);
    }
    let client = Client::connect(&options.connect, &options.data_dir).await?;
    if client.text("pg_is_in_recovery()").await? == "true" {
        return Ok(None);
    }
    let identity = Replication::connect(&options.connect, &options.data_dir, clock).await?.identify().await?;
    if on_disk(options)? != identity.timeline {
        // A server that was promoted a moment ago: its control file follows with the next checkpoint, and tells us.
        client.execute("CHECKPOINT").await?;
    }
    Ok(Some(identity))
}

fn on_disk(options: &Options) -> Result<Timeline> {
    Ok(ControlFile::read(&options.data_dir, version_of(&options.data_dir)?)?.newest_timeline())
}

async fn gather(
    repository: &Repository,
    options: &Options,
    identity: Identity,
    watched: &mut Watched,
) -> Result<Facts> {
    let own_dir = options.data_dir.join(OWN_DIR);
    let claim = match repository.newest_generation().await? {
        Some(newest) => Some(repository.claim(newest).await?),
        None => None,
    };
    facts::finish_claim(&own_dir, Some(repository), claim.as_ref())?;
    let same = |writer: &Writer| writer.descriptor.repository_id == repository.descriptor().repository_id;
    let noted = Writer::load(&own_dir)?.filter(same);
    let newest = match claim {
        Some(claim) => {
            let view = repository.log(claim.generation).await?;
            let silent = watched.is_silent(&view, repository.clock().monotonic(), options.takeover_after);
            let holder = if view.seal.is_some() || silent { Holder::Gone } else { Holder::MayLive };
            let mine = noted.as_ref().is_some_and(|noted| noted.claim.writer_id == claim.writer_id);
            let wrote = last_written(repository, claim.generation).await?;
            Some(Newest { claim, mine, holder, wrote })
        }
        None => None,
    };
    let (system_id, history) = (identity.system_id, data_dir::history_of(&options.data_dir, identity.timeline)?);
    Ok(Facts { system_id, history, newest, adopt: options.adopt, nothing_lost: options.rpo.is_zero() })
}

/// The newest generation that wrote anything, and where its WAL ends. A claim alone says nothing of a history.
async fn last_written(repository: &Repository, newest: Generation) -> Result<Option<(Generation, Position)>> {
    for generation in (1..=newest.0).rev().map(Generation) {
        if let Some(end) = repository.log(generation).await?.end() {
            return Ok(Some((generation, end)));
        }
        // Without a log it may have archived by `wal push`.
        let index = repository.wal_index(&repository.lineage(generation, Some(generation)).await?).await?;
        let last = index.newest_timeline().and_then(|timeline| {
            let (number, _) = index.segments(timeline).next_back()?;
            Some((timeline, number))
        });
        if let Some((timeline, number)) = last {
            let size = repository.claim(generation).await?.segment_size;
            return Ok(Some((generation, Position { timeline, lsn: size.start_of(number + 1) })));
        }
    }
    Ok(None)
}
