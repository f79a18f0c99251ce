//! Which backups stay, and why. Pure.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use crate::model::{BackupId, Lsn, Period, Timestamp};

/// What the operator wants to keep. Each rule adds; a backup that no rule names goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest.
    pub last: u32,
    /// Those that ended within this time.
    pub within: Option<Duration>,
    /// The newest of each of so many days, weeks, months and years that have one (UTC).
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub yearly: u32,
    /// Every point of this time stays reachable; WAL from before it stays only as far as kept backups need it themselves.
    pub points: Option<Duration>,
}

impl Keep {
    /// No rule at all: nobody has said that anything may go.
    pub fn is_empty(&self) -> bool {
        *self == Keep::default()
    }
}

/// A backup as the rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: BackupId,
    pub start: Lsn,
    pub stop: Lsn,
    pub started_at: Timestamp,
    pub stopped_at: Timestamp,
    pub way: Way,
    pub pins: Vec<String>,
}

/// Where a backup leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Towards the newest state, without a hole up to here.
    Main { through: Lsn },
    /// To a state that was left behind by a takeover or a restore to an earlier point, or nowhere. When that was.
    LeftBehind { at: Timestamp },
}

/// Where and when the history left WAL behind that somebody may want back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Departure {
    pub fork: Lsn,
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    Newest,
    Last,
    Within,
    Period(String),
    /// Points that must stay reachable are reached from it.
    Points,
    /// What a takeover or a restore left behind is kept for a while: somebody may want it back.
    LeftBehind,
    Pinned(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Newest => f.write_str("newest"),
            Reason::Last => f.write_str("last"),
            Reason::Within => f.write_str("within"),
            Reason::Period(name) => f.write_str(name),
            Reason::Points => f.write_str("points"),
            Reason::LeftBehind => f.write_str("left behind lately"),
            Reason::Pinned(why) => write!(f, "pinned: {why}"),
        }
    }
}

/// A backup and why it stays; without a reason it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub id: BackupId,
    pub reasons: Vec<Reason>,
}

impl Verdict {
    pub fn stays(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// How long what was left behind is kept at least.
pub const LEFT_BEHIND: Duration = Duration::from_secs(7 * 86_400);

/// The rules' answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub verdicts: Vec<Verdict>,
    /// On the way to the newest state all WAL from here on stays; `None` when no backup leads there.
    pub points_from: Option<Lsn>,
}

/// Applies the rules. `now` is the time by the clock that stamped the backups.
/// `grace`: WAL stays as long, for whoever began to restore a point while it was promised.
pub fn decide(
    candidates: &[Candidate],
    departures: &[Departure],
    keep: &Keep,
    grace: Duration,
    now: Timestamp,
) -> Plan {
    let mut newest_first: Vec<&Candidate> = candidates.iter().collect();
    newest_first.sort_by_key(|candidate| (std::cmp::Reverse(candidate.stopped_at), candidate.id));
    let main: Vec<&Candidate> =
        newest_first.iter().copied().filter(|candidate| matches!(candidate.way, Way::Main { .. })).collect();
    let mut reasons = Reasons(candidates.iter().map(|candidate| (candidate.id, Vec::new())).collect());

    // Whatever the rules say, the newest state must stay restorable.
    let reach = |candidate: &&&Candidate| match candidate.way {
        Way::Main { through } => (through, candidate.stopped_at),
        Way::LeftBehind { .. } => (Lsn(0), candidate.stopped_at),
    };
    reasons.add(newest_first.iter().max_by_key(reach).copied(), Reason::Newest);
    main.iter().take(keep.last as usize).for_each(|candidate| reasons.add(Some(candidate), Reason::Last));
    if let Some(within) = keep.within {
        let since = now.earlier_by(within);
        main.iter()
            .filter(|candidate| candidate.stopped_at >= since)
            .for_each(|candidate| reasons.add(Some(candidate), Reason::Within));
    }
    let calendar = [
        (Period::Day, keep.daily),
        (Period::Week, keep.weekly),
        (Period::Month, keep.monthly),
        (Period::Year, keep.yearly),
    ];
    for (period, count) in calendar {
        let mut seen = BTreeSet::new();
        for candidate in &main {
            let name = candidate.stopped_at.period(period);
            if seen.len() < count as usize && seen.insert(name.clone()) {
                reasons.add(Some(candidate), Reason::Period(name));
            }
        }
    }
    let ruled: Vec<Lsn> =
        main.iter().filter(|candidate| reasons.has_any(candidate.id)).map(|candidate| candidate.start).collect();
    let points = keep.points.map(|points| bases(&main, now.earlier_by(points)));
    points.iter().flatten().for_each(|candidate| reasons.add(Some(candidate), Reason::Points));
    let left_behind_since = now.earlier_by(age_of_left_behind(keep));
    // What was left behind is reached from the newest backup before it was.
    let recent = departures.iter().filter(|departure| departure.at >= left_behind_since);
    let before: Vec<&Candidate> = recent
        .filter_map(|departure| main.iter().find(|candidate| candidate.stop <= departure.fork).copied())
        .collect();
    before.iter().for_each(|candidate| reasons.add(Some(candidate), Reason::LeftBehind));
    for candidate in &newest_first {
        if matches!(candidate.way, Way::LeftBehind { at } if candidate.stopped_at.max(at) >= left_behind_since) {
            reasons.add(Some(candidate), Reason::LeftBehind);
        }
        candidate.pins.iter().for_each(|why| reasons.add(Some(candidate), Reason::Pinned(why.clone())));
    }
    let points_from = match keep.points {
        Some(points) => bases(&main, now.earlier_by(points + grace)).iter().map(|candidate| candidate.start).min(),
        None => ruled.into_iter().min(),
    };
    let points_from = before.iter().map(|candidate| candidate.start).chain(points_from).min();
    Plan { verdicts: reasons.0.into_iter().map(|(id, reasons)| Verdict { id, reasons }).collect(), points_from }
}

/// For how long WAL and backups that were left behind stay.
pub fn age_of_left_behind(keep: &Keep) -> Duration {
    [keep.points, keep.within].into_iter().flatten().fold(LEFT_BEHIND, Duration::max)
}

/// From which backups every point since `since` can be reached: for each stretch of WAL without a hole the newest that was
/// whole before, or the oldest one.
fn bases<'c>(main: &[&'c Candidate], since: Timestamp) -> Vec<&'c Candidate> {
    // By WAL first: a standby that lags may end its backup of one stretch after the next has begun.
    let through = |way: Way| if let Way::Main { through } = way { through } else { Lsn(0) };
    let mut oldest_first: Vec<&Candidate> = main.to_vec();
    oldest_first.sort_by_key(|candidate| (through(candidate.way), candidate.stopped_at));
    let mut bases = Vec::new();
    let stretches: Vec<&[&Candidate]> = oldest_first.chunk_by(|a, b| a.way == b.way).collect();
    for (place, stretch) in stretches.iter().enumerate() {
        // A stretch ended before the next one's first backup began.
        let ended = stretches.get(place + 1).and_then(|next| next.first()).map(|next| next.started_at);
        if ended.is_some_and(|ended| ended <= since) {
            continue;
        }
        let before = stretch.iter().rev().find(|candidate| candidate.stopped_at <= since);
        bases.extend(before.or(stretch.first()).copied());
    }
    bases
}

struct Reasons(Vec<(BackupId, Vec<Reason>)>);

impl Reasons {
    fn add(&mut self, candidate: Option<&Candidate>, reason: Reason) {
        let Some(candidate) = candidate else { return };
        let of = self.0.iter_mut().find(|(id, _)| *id == candidate.id);
        if let Some((_, reasons)) = of {
            reasons.push(reason);
        }
    }

    fn has_any(&self, id: BackupId) -> bool {
        self.0.iter().any(|(of, reasons)| *of == id && !reasons.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Generation;

    const DAY: u64 = 86_400;

    /// A backup that ended at noon of day `day`.
    fn backup(day: u64) -> Candidate {
        let start = Lsn(day * 1000);
        let noon = Timestamp::from_unix_micros(((day * DAY + DAY / 2) * 1_000_000) as i64);
        Candidate {
            id: BackupId { generation: Generation(1), start, nonce: day as u16 },
            start,
            stop: Lsn(start.0 + 100),
            started_at: noon.earlier_by(Duration::from_secs(60)),
            stopped_at: noon,
            way: Way::Main { through: Lsn(1_000_000_000) },
            pins: Vec::new(),
        }
    }

    fn at(day: u64) -> Timestamp {
        Timestamp::from_unix_micros((day * DAY * 1_000_000) as i64)
    }

    fn days(plan: &Plan) -> Vec<u16> {
        plan.verdicts.iter().filter(|verdict| verdict.stays()).map(|verdict| verdict.id.nonce).collect()
    }

    #[test]
    fn the_newest_stays_whatever_the_rules_say() {
        let all: Vec<_> = (1..=5).map(backup).collect();
        let keep = Keep { within: Some(Duration::from_secs(1)), ..Keep::default() };
        let plan = decide(&all, &[], &keep, Duration::ZERO, at(100));
        assert_eq!(days(&plan), [5]);
        assert_eq!(plan.points_from, Some(Lsn(5000)));
    }

    #[test]
    fn rules_add_up() {
        let all: Vec<_> = (1..=400).map(backup).collect();
        let keep = Keep { last: 2, daily: 3, weekly: 2, monthly: 2, yearly: 2, ..Keep::default() };
        let plan = decide(&all, &[], &keep, Duration::ZERO, at(401));
        // Day 400 is Friday, 1971-02-05; the week before ended on day 395, January on 395, the year 1970 on 364.
        assert_eq!(days(&plan), [364, 395, 398, 399, 400]);
        let of_400 = &plan.verdicts.iter().find(|verdict| verdict.id.nonce == 400).expect("there").reasons;
        assert!(of_400.contains(&Reason::Period("1971-W05".to_owned())), "{of_400:?}");
        assert_eq!(plan.points_from, Some(Lsn(364_000)), "without a rule for points all WAL since the oldest stays");
    }

    #[test]
    fn every_point_of_the_last_days_needs_one_backup_before_them() {
        let all: Vec<_> = (1..=30).map(backup).collect();
        let keep = Keep { points: Some(Duration::from_secs(7 * DAY)), monthly: 12, ..Keep::default() };
        let plan = decide(&all, &[], &keep, Duration::ZERO, at(31));
        assert_eq!(days(&plan), [23, 30], "day 23's is the newest that was whole at the beginning of day 24");
        assert_eq!(plan.points_from, Some(Lsn(23_000)));
        let young = decide(&all[28..], &[], &keep, Duration::ZERO, at(31));
        assert_eq!(young.points_from, Some(Lsn(29_000)), "none is old enough: the oldest");
        let graceful = decide(&all, &[], &keep, Duration::from_secs(DAY), at(31));
        assert_eq!(days(&graceful), [23, 30]);
        assert_eq!(graceful.points_from, Some(Lsn(22_000)), "whoever restores a point of a day ago finds its WAL");
    }

    #[test]
    fn a_standby_that_lags_behind_a_hole_does_not_cut_the_stretch_after_it_in_two() {
        let mut all: Vec<_> = (1..=3).map(backup).collect();
        // By the clock between the two others, by its WAL before them.
        all[1].way = Way::Main { through: Lsn(500) };
        let keep = Keep { points: Some(Duration::from_secs(DAY)), ..Keep::default() };
        let plan = decide(&all, &[], &keep, Duration::ZERO, at(3).later_by(Duration::from_secs(DAY / 4 * 3)));
        assert!(days(&plan).contains(&1), "the points since day 2 are reached from the first: {plan:?}");
    }

    #[test]
    fn each_stretch_between_holes_keeps_its_own_backup_while_its_points_are_wanted() {
        let mut all: Vec<_> = (1..=30).map(backup).collect();
        for (day, candidate) in (1u64..).zip(&mut all) {
            candidate.way = Way::Main {
                through: Lsn(if day <= 10 {
                    10_500
                } else if day <= 26 {
                    26_500
                } else {
                    40_000
                }),
            };
        }
        let keep = Keep { points: Some(Duration::from_secs(7 * DAY)), ..Keep::default() };
        assert_eq!(days(&decide(&all, &[], &keep, Duration::ZERO, at(31))), [23, 27, 30]);
    }

    #[test]
    fn pins_and_what_was_left_behind_lately_stay() {
        let mut all: Vec<_> = (1..=30).map(backup).collect();
        all[2].pins.push("before the migration".to_owned());
        all[3].way = Way::LeftBehind { at: at(26) };
        all[4].way = Way::LeftBehind { at: at(20) };
        all[28].way = Way::LeftBehind { at: at(20) };
        let keep = Keep { last: 1, ..Keep::default() };
        let plan = decide(&all, &[], &keep, Duration::ZERO, at(31));
        assert_eq!(days(&plan), [3, 4, 29, 30], "day 4's was left five days ago, day 5's ten");
        assert_eq!(plan.points_from, Some(Lsn(30_000)), "a pin keeps a backup, not all WAL since");
    }

    #[test]
    fn what_a_restore_left_behind_lately_can_still_be_reached() {
        let all: Vec<_> = (1..=30).map(backup).collect();
        let keep = Keep { last: 1, ..Keep::default() };
        let left = |day| [Departure { fork: Lsn(10_500), at: at(day) }];
        let plan = decide(&all, &left(29), &keep, Duration::ZERO, at(31));
        assert_eq!(days(&plan), [10, 30]);
        assert_eq!(plan.points_from, Some(Lsn(10_000)), "with the WAL up to where it was left");
        assert_eq!(days(&decide(&all, &left(20), &keep, Duration::ZERO, at(31))), [30]);
    }
}
