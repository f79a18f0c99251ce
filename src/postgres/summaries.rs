//! WAL summaries (PostgreSQL 17 and later): which blocks of which relations WAL has touched, as the server's summarizer has
//! written it down. Asked for in SQL ("WAL Summarization Information Functions" in the manual); the form of the files is the
//! server's own affair.

use std::time::Duration;

use futures::TryStreamExt;
use tokio_postgres::types::{PgLsn, ToSql};

use super::client::{Client, sql_error};
use crate::error::{Error, Result};
use crate::model::{Lsn, Timeline};

/// The parameter that makes a server summarize its WAL.
pub const SETTING: &str = "summarize_wal";

/// `on`, as nobody else spells it: where it stands in `postgresql.auto.conf` a supervisor of ours has put it there.
pub const OURS: &str = "yes";

/// A relation's storage, as its paths and WAL name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Relation {
    pub tablespace: u32,
    /// Zero for what all databases share.
    pub database: u32,
    /// Zero in a summary stands for all relations of the database in this tablespace.
    pub number: u32,
}

/// `pg_default` and `pg_global` (catalog/pg_tablespace.dat).
const DEFAULT: u32 = 1663;
const GLOBAL: u32 = 1664;

impl Relation {
    /// Whose main fork a file below the data directory belongs to; `None` for other forks and other files.
    pub fn of_path(path: &str) -> Option<Relation> {
        let parts: Vec<&str> = path.split('/').collect();
        let (tablespace, database, name) = match parts[..] {
            ["global", name] => (GLOBAL, 0, name),
            ["base", database, name] => (DEFAULT, database.parse().ok()?, name),
            ["pg_tblspc", tablespace, _, database, name] => (tablespace.parse().ok()?, database.parse().ok()?, name),
            _ => return None,
        };
        let number = name.split('.').next()?.parse().ok()?;
        Some(Relation { tablespace, database, number })
    }
}

/// WAL from `start` to `end` is summarized in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub start: Lsn,
    pub end: Lsn,
}

/// How far the summarizer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summarizer {
    /// Zero before it has begun.
    pub timeline: u32,
    /// Up to here there are summaries.
    pub summarized: Lsn,
    /// Up to here WAL has been read for the next one.
    pub pending: Lsn,
}

/// Whether a summarizer gets on. One that fails reads the same WAL again and again: only what is new counts.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    furthest: Lsn,
    since: Duration,
}

impl Pace {
    pub fn new(now: Duration) -> Pace {
        Pace { furthest: Lsn(0), since: now }
    }

    /// For how long it has read nothing new.
    pub fn idle(&mut self, pending: Lsn, now: Duration) -> Duration {
        if pending > self.furthest {
            *self = Pace { furthest: pending, since: now };
        }
        now.saturating_sub(self.since)
    }
}

/// One word of a summary on the main fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    pub relation: Relation,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// It was made, dropped or cut off: the shortest it has been, in blocks. What lies behind is new, if it is there.
    CutTo(u32),
    /// Blocks of this stretch were written to. A stretch is as many blocks as were asked for.
    Stretch(u32),
}

impl Client {
    /// How far the summarizer is; with `summarize_wal` off, how far it was.
    pub async fn summarizer(&self) -> Result<Summarizer> {
        const SQL: &str = "SELECT summarized_tli, summarized_lsn, pending_lsn FROM pg_get_wal_summarizer_state()";
        let failed = |e: tokio_postgres::Error| sql_error(SQL, &e);
        let row = self.inner.query_one(SQL, &[]).await.map_err(failed)?;
        let timeline: i64 = row.try_get(0).map_err(failed)?;
        let (summarized, pending): (PgLsn, PgLsn) = (row.try_get(1).map_err(failed)?, row.try_get(2).map_err(failed)?);
        Ok(Summarizer {
            timeline: u32::try_from(timeline).unwrap_or(0),
            summarized: Lsn(summarized.into()),
            pending: Lsn(pending.into()),
        })
    }

    /// Summaries of a timeline's WAL between two positions, in order; `most` of them at most.
    pub async fn summaries(&self, timeline: Timeline, from: Lsn, to: Lsn, most: u32) -> Result<Vec<Summary>> {
        const SQL: &str = "SELECT start_lsn, end_lsn FROM pg_available_wal_summaries()
                           WHERE tli = $1 AND end_lsn > $2 AND start_lsn < $3 ORDER BY start_lsn LIMIT $4";
        let failed = |e: tokio_postgres::Error| sql_error(SQL, &e);
        let (timeline, most) = (i64::from(timeline.0), i64::from(most));
        let rows = self.inner.query(SQL, &[&timeline, &PgLsn::from(from.0), &PgLsn::from(to.0), &most]).await;
        let summary = |row: &tokio_postgres::Row| {
            let (start, end): (PgLsn, PgLsn) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Summary { start: Lsn(start.into()), end: Lsn(end.into()) })
        };
        rows.map_err(failed)?.iter().map(summary).collect::<Result<_, _>>().map_err(failed)
    }

    /// Reads a summary, handing over each thing it says of main forks. Other forks are passed over: changes of the map of
    /// free space are not in WAL, and those of the visibility map are not all in summaries (bits that are cleared along with
    /// a heap's record, or with the end of a heap that is cut off, name no block of the map).
    pub async fn touched(
        &self,
        timeline: Timeline,
        summary: Summary,
        stretch: u32,
        mut note: impl FnMut(Touched) -> Result<()>,
    ) -> Result<()> {
        // The server makes stretches of blocks: a row for each block would be a hundred times as many.
        const SQL: &str = "SELECT reltablespace, reldatabase, relfilenode, is_limit_block,
                                  CASE WHEN is_limit_block THEN relblocknumber ELSE relblocknumber / $4 END
                           FROM pg_wal_summary_contents($1, $2, $3) WHERE relforknumber = 0 GROUP BY 1, 2, 3, 4, 5";
        let failed = |e: tokio_postgres::Error| sql_error(SQL, &e);
        let (timeline, stretch) = (i64::from(timeline.0), i64::from(stretch));
        let (start, end) = (PgLsn::from(summary.start.0), PgLsn::from(summary.end.0));
        let parameters: [&(dyn ToSql + Sync); 4] = [&timeline, &start, &end, &stretch];
        let rows = self.inner.query_raw(SQL, parameters).await.map_err(failed)?;
        let mut rows = std::pin::pin!(rows);
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let column = |at: usize| row.try_get::<_, u32>(at).map_err(failed);
            let relation = Relation { tablespace: column(0)?, database: column(1)?, number: column(2)? };
            let number: i64 = row.try_get(4).map_err(failed)?;
            let number = u32::try_from(number)
                .map_err(|_| Error::postgres(format!("a WAL summary names block {number}, which no relation has")))?;
            let what = match row.try_get(3).map_err(failed)? {
                true => What::CutTo(number),
                false => What::Stretch(number),
            };
            note(Touched { relation, what })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_main_forks_path_names_its_relation() {
        let relation = |tablespace, database, number| Some(Relation { tablespace, database, number });
        assert_eq!(Relation::of_path("base/5/16384"), relation(1663, 5, 16384));
        assert_eq!(Relation::of_path("base/5/16384.12"), relation(1663, 5, 16384));
        assert_eq!(Relation::of_path("global/1262"), relation(1664, 0, 1262));
        assert_eq!(Relation::of_path("pg_tblspc/16385/PG_17_202406281/5/16400"), relation(16385, 5, 16400));
        for other in
            ["base/5/16384_vm", "base/5/16384_fsm.1", "base/5/16384_init", "base/5/PG_VERSION", "16384", "pg_xact/0000"]
        {
            assert_eq!(Relation::of_path(other), None, "{other}");
        }
    }

    #[test]
    fn a_summarizer_that_reads_the_same_again_does_not_get_on() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(Duration::ZERO);
        assert_eq!(pace.idle(Lsn(0), second * 9), second * 9, "it has not begun");
        assert_eq!(pace.idle(Lsn(5), second * 40), Duration::ZERO);
        assert_eq!(pace.idle(Lsn(5), second * 45), second * 5);
        assert_eq!(pace.idle(Lsn(2), second * 50), second * 10, "it failed, and began anew");
        assert_eq!(pace.idle(Lsn(5), second * 60), second * 20);
        assert_eq!(pace.idle(Lsn(6), second * 61), Duration::ZERO);
    }
}
