//! May the agent of a running server write its history on? Facts in, one decision out; pure.
//!
//! Whoever runs the server has decided which one is the primary. The timeline tells whether that was after the newest
//! generation: a promotion always starts one.

use std::fmt;

use crate::error::Kind;
use crate::model::{Generation, Lsn, SystemId, Timeline};
use crate::repository::Claim;
use crate::repository::log::Position;
use crate::run::boot::{Holder, Refusal};
use crate::wal::History;

/// The newest generation of the repository, and how far its log goes (`None`: it was never opened).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    pub claim: Claim,
    pub end: Option<Position>,
    pub holder: Holder,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub system_id: SystemId,
    /// The running server's timeline and where it came from.
    pub history: History,
    /// The generation this data directory wrote under last.
    pub ours: Option<Generation>,
    pub newest: Option<Newest>,
    /// `--adopt`.
    pub adopt: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The history begins with this server as it is now, with a base backup.
    Begin {
        newest: Option<Claim>,
    },
    /// This directory wrote last, and goes on.
    Continue {
        newest: Claim,
    },
    /// The server was promoted at `at`, out of the newest generation's history, which goes on to `end`.
    Follow {
        newest: Claim,
        at: Lsn,
        end: Lsn,
    },
    /// Another writer may live.
    Spare {
        holder: Claim,
    },
    Refuse(Refusal),
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Begin { newest: None } => write!(f, "the repository is new: its history begins with this server"),
            Decision::Begin { newest: Some(newest) } => {
                write!(f, "adopting the server as it is: a new history after generation {}", newest.generation)
            }
            Decision::Continue { newest } => write!(f, "going on where generation {} ended", newest.generation),
            Decision::Follow { newest, at, end } if at < end => write!(
                f,
                "the server was promoted at {at}: {} bytes of generation {}'s WAL, up to {end}, are not in its history",
                end.bytes_since(*at),
                newest.generation
            ),
            Decision::Follow { newest, at, .. } => {
                write!(f, "the server was promoted at {at}, after generation {}", newest.generation)
            }
            Decision::Spare { holder } => write!(
                f,
                "waiting: the agent of generation {} (on {} since {}) may be alive",
                holder.generation,
                holder.host,
                holder.claimed_at.short()
            ),
            Decision::Refuse(refusal) => write!(f, "refused: {}", refusal.why),
        }
    }
}

pub fn decide(facts: &Facts) -> Decision {
    let Some(Newest { claim, end, holder }) = &facts.newest else { return Decision::Begin { newest: None } };
    if claim.system_id != facts.system_id {
        return Decision::Refuse(Refusal {
            kind: Kind::Refused,
            why: format!("the server is system {}, the repository holds system {}", facts.system_id, claim.system_id),
            hint: "give each cluster a repository of its own".to_owned(),
        });
    }
    let newest = claim.clone();
    // A claim that wrote nothing has no history to be compared with.
    let Some(end) = end else {
        return match (facts.ours == Some(claim.generation), holder) {
            (false, Holder::MayLive) => Decision::Spare { holder: newest },
            _ => Decision::Begin { newest: Some(newest) },
        };
    };
    if facts.ours == Some(claim.generation) && end.timeline == facts.history.timeline {
        return Decision::Continue { newest };
    }
    let promoted = facts.history.end_of(end.timeline).flatten();
    let follows = promoted.map(|at| Decision::Follow { newest: newest.clone(), at, end: end.lsn });
    match follows.or(facts.adopt.then(|| Decision::Begin { newest: Some(newest.clone()) })) {
        Some(_) if *holder == Holder::MayLive && facts.ours != Some(claim.generation) => {
            Decision::Spare { holder: newest }
        }
        Some(decision) => decision,
        None => Decision::Refuse(other_history(&newest, end.timeline, facts.history.timeline)),
    }
}

fn other_history(newest: &Claim, theirs: Timeline, ours: Timeline) -> Refusal {
    Refusal {
        kind: Kind::Fenced,
        why: format!(
            "the server is on timeline {ours}, which does not come after timeline {theirs} of generation {}, written by {} since {}",
            newest.generation,
            newest.host,
            newest.claimed_at.short()
        ),
        hint: "this server was replaced, or is a copy; if it is the database all the same, start once with --adopt"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Timestamp, WriteId};
    use crate::wal::{SegmentSize, Switch};

    fn claim(generation: u32) -> Claim {
        Claim {
            kind: String::new(),
            format: 1,
            writer_id: WriteId([0; 16]),
            generation: Generation(generation),
            parent: None,
            system_id: SystemId(7),
            pg_major: 15,
            segment_size: SegmentSize::try_from(16 << 20).expect("a size"),
            claimed_at: Timestamp::from_unix_micros(0),
            host: "a".to_owned(),
        }
    }

    fn facts(
        timeline: u32,
        switches: &[(u32, u64)],
        end: Option<(u32, u64)>,
        holder: Holder,
        ours: Option<u32>,
    ) -> Facts {
        let switches = switches.iter().map(|(of, at)| Switch { timeline: Timeline(*of), at: Lsn(*at) }).collect();
        let end = end.map(|(timeline, lsn)| Position { timeline: Timeline(timeline), lsn: Lsn(lsn) });
        Facts {
            system_id: SystemId(7),
            history: History { timeline: Timeline(timeline), switches },
            ours: ours.map(Generation),
            newest: Some(Newest { claim: claim(4), end, holder }),
            adopt: false,
        }
    }

    #[test]
    fn a_server_that_was_promoted_from_the_history_writes_it_on_once_the_old_writer_is_silent() {
        let promoted = |holder| decide(&facts(3, &[(1, 50), (2, 90)], Some((2, 100)), holder, None));
        assert_eq!(promoted(Holder::Gone), Decision::Follow { newest: claim(4), at: Lsn(90), end: Lsn(100) });
        assert_eq!(promoted(Holder::MayLive), Decision::Spare { holder: claim(4) });
    }

    #[test]
    fn the_same_server_goes_on_without_waiting_for_itself() {
        let same = decide(&facts(2, &[(1, 50)], Some((2, 100)), Holder::MayLive, Some(4)));
        assert_eq!(same, Decision::Continue { newest: claim(4) });
        let promoted_again = decide(&facts(3, &[(1, 50), (2, 100)], Some((2, 100)), Holder::MayLive, Some(4)));
        assert!(matches!(promoted_again, Decision::Follow { .. }));
    }

    #[test]
    fn a_server_that_was_replaced_or_is_a_copy_is_refused_unless_it_is_adopted() {
        let stale = facts(1, &[], Some((2, 100)), Holder::Gone, Some(3));
        let copy = facts(2, &[(1, 50)], Some((2, 100)), Holder::Gone, None);
        let sibling = facts(3, &[(1, 50)], Some((2, 100)), Holder::Gone, None);
        for mut facts in [stale, copy, sibling] {
            assert!(matches!(decide(&facts), Decision::Refuse(refusal) if refusal.kind == Kind::Fenced));
            facts.adopt = true;
            assert_eq!(decide(&facts), Decision::Begin { newest: Some(claim(4)) });
        }
    }

    #[test]
    fn another_cluster_is_refused_whatever_is_said() {
        let mut other = facts(1, &[], None, Holder::Gone, None);
        (other.system_id, other.adopt) = (SystemId(8), true);
        assert!(matches!(decide(&other), Decision::Refuse(_)));
    }
}
