//! Looking at a part of everything, another one each time, so that in some days all of it has been read. Which objects belong
//! to a part is decided by their names alone: no list of what was read has to be kept.

use std::time::Duration;

use super::verify::{Depth, Finding, verify};
use crate::error::Result;
use crate::events::{Event, Events};
use crate::model::{Share, Timestamp};
use crate::repository::codec::Sha256;
use crate::repository::{Repository, Verification};

/// One of the parts that a repository is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    pub part: u32,
    pub parts: u32,
}

impl Sample {
    /// Each day (UTC) has its part.
    pub fn of_day(share: Share, at: Timestamp) -> Sample {
        const DAY: i64 = 86_400_000_000;
        let (day, parts) = (at.unix_micros().div_euclid(DAY), share.parts());
        Sample { part: day.rem_euclid(i64::from(parts)) as u32, parts }
    }

    /// The part after the last one, whenever that was looked at.
    pub fn after(share: Share, last: Option<Sample>) -> Sample {
        let parts = share.parts();
        let part = last.filter(|last| last.parts == parts).map_or(0, |last| (last.part + 1) % parts);
        Sample { part, parts }
    }

    /// Whether the object of this key belongs to the part: each belongs to exactly one.
    pub fn takes(&self, key: &str) -> bool {
        let [a, b, c, d, e, f, g, h, ..] = Sha256::of(key.as_bytes()).0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) % u64::from(self.parts) == u64::from(self.part)
    }
}

/// Findings that a record names.
const NAMED: usize = 100;

/// Looks at the part that follows the last one, and records and tells what came of it.
pub async fn verify_next(repository: &Repository, share: Share, events: &Events) -> Result<()> {
    let (clock, last) = (repository.clock(), repository.last_verification().await?);
    let sample = Sample::after(share, last.map(|last| Sample { part: last.part, parts: last.parts }));
    let (at, began) = (clock.now(), clock.monotonic());
    let report = verify(repository, Depth::Sample(sample), events).await?;
    let elapsed = clock.monotonic() - began;
    let said = |finding: &Finding| format!("{}: {}", finding.problem, finding.consequence);
    let record = Verification {
        part: sample.part,
        parts: sample.parts,
        backups: report.backups as u64,
        packs: report.packs as u64,
        segments: report.segments as u64,
        bytes: report.bytes,
        seconds: elapsed.as_secs_f64(),
        findings: report.findings.iter().take(NAMED).map(said).collect(),
        ..Verification::begun(repository, at)
    };
    repository.put_verification(&record).await?;
    tell(&report.findings, (sample, report.bytes, elapsed), events);
    Ok(())
}

/// One alarm for all damage, with the first of it. A gap was told when it came about.
fn tell(findings: &[Finding], (sample, bytes, elapsed): (Sample, u64, Duration), events: &Events) {
    for gap in findings.iter().filter(|finding| !finding.damaged) {
        events.warning(format!("{}: {}", gap.problem, gap.consequence));
    }
    let mut damage = findings.iter().filter(|finding| finding.damaged);
    match damage.next() {
        None => events.emit(Event::VerifyDone { part: sample.part, parts: sample.parts, bytes, elapsed }),
        Some(first) => events.emit(Event::VerifyFailed {
            problem: first.problem.clone(),
            consequence: first.consequence.clone(),
            cure: first.cure.clone(),
            more: damage.count() as u64,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(day: i64) -> Timestamp {
        Timestamp::from_unix_micros((day * 86_400 + 12 * 3600) * 1_000_000)
    }

    fn share(text: &str) -> Share {
        text.parse().expect("a share")
    }

    #[test]
    fn within_a_cycle_of_days_every_object_is_read_exactly_once() {
        let keys: Vec<String> = (0..2000).map(|n| format!("packs/{n:032x}")).collect();
        for (text, parts) in [("100%", 1), ("50%", 2), ("30%", 4), ("5%", 20), ("1%", 100)] {
            for first in [0, 7, 20_000, -3] {
                let days = first..first + parts;
                let mut read = vec![0; keys.len()];
                for day in days {
                    let sample = Sample::of_day(share(text), on(day));
                    let taken = keys.iter().enumerate().filter(|(_, key)| sample.takes(key));
                    let taken: Vec<usize> = taken.map(|(number, _)| number).collect();
                    let expected = keys.len() / parts as usize;
                    assert!(taken.len() < expected * 2 + 20, "{text}: {} of {expected} on day {day}", taken.len());
                    taken.into_iter().for_each(|number| read[number] += 1);
                }
                assert!(read.iter().all(|times| *times == 1), "{text} from day {first}");
            }
        }
        let day = |n| Sample::of_day(share("5%"), on(n));
        assert_ne!(day(1), day(2));
        assert_eq!(day(1), day(21));
    }

    #[test]
    fn by_schedule_each_part_comes_after_the_last_one_and_a_new_share_begins_anew() {
        let mut sample = Sample::after(share("30%"), None);
        let mut seen = vec![sample.part];
        for _ in 0..4 {
            sample = Sample::after(share("30%"), Some(sample));
            seen.push(sample.part);
        }
        assert_eq!(seen, [0, 1, 2, 3, 0]);
        assert_eq!(Sample::after(share("5%"), Some(Sample { part: 3, parts: 4 })), Sample { part: 0, parts: 20 });
    }

    #[test]
    fn the_part_of_an_object_never_changes_between_versions() {
        let part = |key: &str| (0..20).find(|part| Sample { part: *part, parts: 20 }.takes(key));
        assert_eq!(part("packs/00000000000000000000000000000000"), Some(PART_OF_ZERO));
    }

    /// The first eight bytes of the key's SHA-256, modulo 20 (`printf %s KEY | sha256sum`).
    const PART_OF_ZERO: u32 = 3;
}
