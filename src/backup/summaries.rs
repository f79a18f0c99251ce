//! Whether WAL summaries tell all that has changed since the last backup, and what they tell. Where they do not, every
//! page is read and compared: that is always right, and costs the reading.

use std::sync::Arc;
use std::time::Duration;

use super::changes::{BLOCKS, Changes};
use super::parent::Parent;
use crate::clock::Clock;
use crate::error::Error;
use crate::events::{Event, Events, Level};
use crate::model::{Lsn, Timeline, Timestamp};
use crate::postgres::summaries::{Pace, Summarizer, Summary};
use crate::postgres::{Client, ControlFile, Version};
use crate::repository::manifest::BackupHead;

/// The summarizer is taken for stuck once it has read nothing for this long. Idle it sleeps for 30 seconds at most
/// (postmaster/walsummarizer.c), and a checkpoint wakes it.
const STUCK: Duration = Duration::from_secs(45);

/// However fast it is, it is waited for no longer than this.
const LONGEST: Duration = Duration::from_secs(600);

const FIRST_LOOK: Duration = Duration::from_millis(20);
const LOOK_MOST: Duration = Duration::from_secs(1);

/// A wait this long is told.
const TELL: Duration = Duration::from_secs(3);

/// Summaries that are read at most: as many as checkpoints in two months, at the usual five minutes.
const SUMMARIES_MAX: u32 = 20_000;

/// A backup's place: in WAL, and in a server's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub timeline: Timeline,
    pub start: Lsn,
    /// Where it ended; of one that begins, where it begins.
    pub stop: Lsn,
    /// The start of the server it was taken of.
    pub server_started: Option<Timestamp>,
    pub data_checksums: bool,
    /// Every page that it met damaged is known by name.
    pub damage_is_named: bool,
}

impl Moment {
    pub fn beginning(control: &ControlFile, start: Lsn, server_started: Timestamp) -> Moment {
        Moment {
            timeline: control.timeline,
            start,
            stop: start,
            server_started: Some(server_started),
            data_checksums: control.data_checksums,
            damage_is_named: true,
        }
    }

    fn of(head: &BackupHead) -> Moment {
        Moment {
            timeline: head.timeline,
            start: head.start_lsn,
            stop: head.stop_lsn,
            server_started: head.server_started,
            data_checksums: head.data_checksums,
            damage_is_named: head.damaged.len() as u64 == head.damaged_pages,
        }
    }
}

/// Why every page is read.
#[derive(Debug)]
struct Declined {
    why: String,
    /// Summaries should have told.
    loud: bool,
}

impl Declined {
    fn quietly(why: impl Into<String>) -> Declined {
        Declined { why: why.into(), loud: false }
    }

    fn loudly(why: impl Into<String>) -> Declined {
        Declined { why: why.into(), loud: true }
    }
}

/// The server did not answer as it should: the pages themselves always do.
impl From<Error> for Declined {
    fn from(error: Error) -> Declined {
        Declined::loudly(error.to_string())
    }
}

/// Lets `parent` know what has changed since, if WAL summaries tell; otherwise says why every page is read.
pub async fn ask(
    client: &Client,
    version: Version,
    parent: Option<&mut Parent>,
    now: &Moment,
    (clock, events): (&Clock, &Events),
) -> Option<String> {
    let Some(parent) = parent.filter(|parent| !parent.compared_only) else {
        return Some("it builds on no other backup".to_owned());
    };
    match gather(client, version, parent, now, (clock, events)).await {
        Ok(changes) => {
            parent.changes = Some(Arc::new(changes));
            None
        }
        Err(Declined { why, loud }) => {
            let level = if loud { Level::Warning } else { Level::Detail };
            events.emit(Event::Note { level, text: format!("every page is read: {why}") });
            Some(why)
        }
    }
}

async fn gather(
    client: &Client,
    version: Version,
    parent: &Parent,
    now: &Moment,
    (clock, events): (&Clock, &Events),
) -> Result<Changes, Declined> {
    if !version.has_wal_summaries {
        return Err(Declined::quietly(format!("PostgreSQL {} has no WAL summaries", version.major)));
    }
    let Some(before) = parent.head.as_deref().map(Moment::of) else {
        return Err(Declined::quietly("the last backup is no backup of a server"));
    };
    comparable(&before, now).map_err(Declined::quietly)?;
    if client.text("current_setting('summarize_wal')").await? != "on" {
        return Err(Declined::quietly("summarize_wal is off"));
    }
    caught_up(client, now, (clock, events)).await?;
    let (timeline, from, to) = (now.timeline, before.start, now.start);
    let summaries = client.summaries(timeline, from, to, SUMMARIES_MAX).await?;
    if let Some(missing) = first_gap(&summaries, from, to) {
        let number = summaries.len();
        return Err(Declined::loudly(format!(
            "WAL from {from} to {to} is not summarized from {missing} on ({number} summaries)"
        )));
    }
    let mut changes = Changes::default();
    for summary in &summaries {
        client.touched(timeline, *summary, BLOCKS, |touched| changes.note(touched)).await?;
    }
    let text = format!("{} WAL summaries tell what has changed since {from}", summaries.len());
    events.emit(Event::Note { level: Level::Detail, text });
    Ok(changes)
}

/// Whether WAL between the two backups tells all that has happened to the files.
///
/// A server that was down may have come back with pages that were changed in place (pg_checksums, pg_rewind), or as a copy
/// of itself; without checksums hints are set behind WAL's back; and a damaged page is to be met again.
fn comparable(before: &Moment, now: &Moment) -> Result<(), &'static str> {
    if !(before.data_checksums && now.data_checksums) {
        return Err("without page checksums not every change is in WAL");
    }
    if before.server_started.is_none() || before.server_started != now.server_started {
        return Err("the server was started since the last backup");
    }
    if before.timeline != now.timeline {
        return Err("the timeline is another one than at the last backup");
    }
    if before.stop > now.start {
        return Err("the last backup ended after this one began");
    }
    if !before.damage_is_named {
        return Err("the last backup met more damaged pages than it names");
    }
    Ok(())
}

/// Waits until WAL is summarized up to where the backup begins. A summary ends right before a checkpoint's first record
/// (`SummarizeXlogRecord`), so there is one that ends exactly there.
async fn caught_up(client: &Client, now: &Moment, (clock, events): (&Clock, &Events)) -> Result<(), Declined> {
    let began = clock.monotonic();
    let (mut pace, mut look, mut told) = (Pace::new(began), FIRST_LOOK, false);
    loop {
        let state = client.summarizer().await?;
        if state.timeline == now.timeline.0 && state.summarized >= now.start {
            return Ok(());
        }
        let Summarizer { summarized, pending, .. } = state;
        let waited = clock.monotonic() - began;
        if pace.idle(pending, clock.monotonic()) > STUCK || waited > LONGEST {
            return Err(Declined::loudly(format!(
                "the WAL summarizer did not come to {} in {} s: it has summarized up to {summarized}, and read up to {pending}",
                now.start,
                waited.as_secs()
            )));
        }
        if waited > TELL && !std::mem::replace(&mut told, true) {
            events.info(format!("backup: waiting for WAL to be summarized from {summarized} to {}", now.start));
        }
        clock.sleep(look).await;
        look = (look * 2).min(LOOK_MOST);
    }
}

/// The first position that none of the summaries covers, which are in the order of their starts.
fn first_gap(summaries: &[Summary], from: Lsn, to: Lsn) -> Option<Lsn> {
    let mut covered = from;
    for summary in summaries {
        if summary.start > covered {
            break;
        }
        covered = covered.max(summary.end);
    }
    (covered < to).then_some(covered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_in_the_summaries_is_found() {
        let gap = |spans: &[(u64, u64)]| {
            let summary = |&(start, end)| Summary { start: Lsn(start), end: Lsn(end) };
            let summaries: Vec<_> = spans.iter().map(summary).collect();
            first_gap(&summaries, Lsn(100), Lsn(200)).map(|lsn| lsn.0)
        };
        assert_eq!(gap(&[(100, 200)]), None);
        assert_eq!(gap(&[(50, 120), (120, 180), (180, 250)]), None);
        assert_eq!(gap(&[(100, 150), (120, 130), (150, 200)]), None, "one within another");
        assert_eq!(gap(&[]), Some(100));
        assert_eq!(gap(&[(101, 200)]), Some(100), "begins too late");
        assert_eq!(gap(&[(100, 199)]), Some(199), "ends too early");
        assert_eq!(gap(&[(100, 150), (151, 200)]), Some(150));
        assert_eq!(gap(&[(100, 150), (160, 170), (150, 200)]), Some(150), "out of order: rather read than believe");
    }

    #[test]
    fn only_backups_of_the_same_run_of_a_server_are_compared_by_wal() {
        let started = Some(Timestamp::from_unix_micros(1_000_000));
        let before = Moment {
            timeline: Timeline(3),
            start: Lsn(100),
            stop: Lsn(150),
            server_started: started,
            data_checksums: true,
            damage_is_named: true,
        };
        let now = Moment { start: Lsn(200), stop: Lsn(200), ..before };
        assert_eq!(comparable(&before, &now), Ok(()));
        assert_eq!(comparable(&before, &Moment { start: Lsn(150), ..now }), Ok(()), "one right after the other");
        let later = Some(Timestamp::from_unix_micros(1_000_001));
        for (what, before, now) in [
            ("a restart", before, Moment { server_started: later, ..now }),
            ("a backup of an older release", Moment { server_started: None, ..before }, now),
            ("neither says", Moment { server_started: None, ..before }, Moment { server_started: None, ..now }),
            ("no checksums then", Moment { data_checksums: false, ..before }, now),
            ("no checksums now", before, Moment { data_checksums: false, ..now }),
            ("another timeline", before, Moment { timeline: Timeline(4), ..now }),
            ("at the same time", Moment { stop: Lsn(201), ..before }, now),
            ("much damage", Moment { damage_is_named: false, ..before }, now),
        ] {
            assert!(comparable(&before, &now).is_err(), "{what}");
        }
    }
}
