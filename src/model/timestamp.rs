//! Points in time, kept as PostgreSQL keeps them: microseconds.

use std::fmt;
use std::str::FromStr;

use super::{Malformed, serde_as_text};

/// Microseconds between the Unix epoch and PostgreSQL's (2000-01-01), `POSTGRES_EPOCH_JDATE` in datatype/timestamp.h.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// A moment, in microseconds since the Unix epoch. For people and for recovery targets; never for ordering writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// A stretch of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    Day,
    Week,
    Month,
    Year,
}

impl Timestamp {
    pub fn from_unix_micros(micros: i64) -> Timestamp {
        Timestamp(micros)
    }

    pub fn unix_micros(self) -> i64 {
        self.0
    }

    /// From a `TimestampTz` in a WAL record.
    pub fn from_postgres(micros: i64) -> Timestamp {
        Timestamp(micros.saturating_add(POSTGRES_EPOCH))
    }

    pub fn seconds_since(self, earlier: Timestamp) -> f64 {
        (self.0 - earlier.0) as f64 / 1e6
    }

    pub fn earlier_by(self, duration: std::time::Duration) -> Timestamp {
        Timestamp(self.0.saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }

    pub fn later_by(self, duration: std::time::Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }

    /// The day, ISO week, month or year it lies in (UTC), as people write them; they sort by time.
    pub fn period(self, period: Period) -> String {
        let form = match period {
            Period::Day => "%Y-%m-%d",
            Period::Week => "%G-W%V",
            Period::Month => "%Y-%m",
            Period::Year => "%Y",
        };
        self.as_jiff().strftime(form).to_string()
    }

    fn as_jiff(self) -> jiff::Timestamp {
        jiff::Timestamp::from_microsecond(self.0).unwrap_or_default()
    }

    /// As `recovery_target_time` takes it, microseconds and zone included.
    pub fn for_postgres(self) -> String {
        self.as_jiff().strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()
    }

    /// To the second, for tables.
    pub fn short(self) -> String {
        self.as_jiff().strftime("%Y-%m-%d %H:%M:%SZ").to_string()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_jiff().strftime("%Y-%m-%dT%H:%M:%S%.6fZ"))
    }
}

impl FromStr for Timestamp {
    type Err = Malformed;

    /// RFC 3339, or PostgreSQL's form with a blank; a zone is required, because a target an hour off is a wrong database.
    fn from_str(text: &str) -> Result<Timestamp, Malformed> {
        let text = text.trim();
        let with_full_zone = match text.rfind(['+', '-']) {
            Some(at) if at > 10 && text.len() - at == 3 => format!("{text}:00"),
            _ => text.to_owned(),
        };
        with_full_zone.parse::<jiff::Timestamp>().map(|t| Timestamp(t.as_microsecond())).map_err(|_| {
            Malformed::new(
                "time",
                text,
                "a date, a time and a zone, such as '2026-11-22 18:30:00+00' or 2026-11-22T18:30:00Z",
            )
        })
    }
}

serde_as_text!(Timestamp);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_needs_its_zone_and_keeps_its_microseconds() {
        let t: Timestamp = "2026-11-22 18:30:00.123456+00".parse().expect("PostgreSQL's form");
        assert_eq!(t.to_string(), "2026-11-22T18:30:00.123456Z");
        assert_eq!(t.for_postgres(), "2026-11-22 18:30:00.123456+00");
        assert_eq!("2026-11-22T19:30:00.123456+01:00".parse(), Ok(t));
        assert_eq!("2026-11-22 19:30:00.123456+01".parse(), Ok(t));
        assert_eq!(t.to_string().parse(), Ok(t));
        for bad in ["", "yesterday", "2026-11-22", "2026-11-22 18:30:00", "18:30Z"] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn postgresql_counts_from_2000() {
        assert_eq!(Timestamp::from_postgres(0).to_string(), "2000-01-01T00:00:00.000000Z");
    }
}
