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

/// The newest claim of the repository, and the newest generation that wrote anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    pub claim: Claim,
    /// The claim was made for this data directory.
    pub mine: bool,
    /// Whether its writer may live, for all that was seen of its log.
    pub holder: Holder,
    /// Later claims have no history to be compared with; `None`: nobody ever wrote.
    pub wrote: Option<(Generation, Position)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub system_id: SystemId,
    /// The running server's timeline and where it came from.
    pub history: History,
    pub newest: Option<Newest>,
    /// `--adopt`.
    pub adopt: bool,
    /// No acknowledged commit may be lost.
    pub nothing_lost: bool,
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
    let Some(Newest { claim, mine, holder, wrote }) = &facts.newest else { return Decision::Begin { newest: None } };
    if claim.system_id != facts.system_id {
        return Decision::Refuse(Refusal {
            kind: Kind::Refused,
            why: format!("the server is system {}, the repository holds system {}", facts.system_id, claim.system_id),
            hint: "give each cluster a repository of its own".to_owned(),
        });
    }
    let newest = claim.clone();
    let decision = match wrote {
        None => Decision::Begin { newest: Some(newest) },
        Some((_, end)) => after(facts, newest, *mine, *end),
    };
    let waits = *holder == Holder::MayLive && !mine;
    match decision {
        Decision::Begin { .. } | Decision::Follow { .. } if waits => Decision::Spare { holder: claim.clone() },
        decision => decision,
    }
}

/// What comes after a history that ends at `end`.
fn after(facts: &Facts, newest: Claim, same_disk: bool, end: Position) -> Decision {
    if facts.adopt {
        return Decision::Begin { newest: Some(newest) };
    }
    if same_disk && end.timeline == facts.history.timeline {
        return Decision::Continue { newest };
    }
    match facts.history.end_of(end.timeline).flatten() {
        Some(at) if at < end.lsn && facts.nothing_lost => Decision::Refuse(Refusal {
            kind: Kind::Refused,
            why: format!(
                "the server was promoted at {at}, but commits up to {} were acknowledged under generation {}",
                end.lsn, newest.generation
            ),
            hint: "no acknowledged commit may be lost (--rpo 0): restore the newest state (perennial run, or restore), or give these commits up with --adopt".to_owned(),
        }),
        Some(at) => Decision::Follow { newest, at, end: end.lsn },
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
        wrote: Option<(u32, u64)>,
        holder: Holder,
        ours: Option<u32>,
    ) -> Facts {
        let switches = switches.iter().map(|(of, at)| Switch { timeline: Timeline(*of), at: Lsn(*at) }).collect();
        let end = |(timeline, lsn)| (Generation(4), Position { timeline: Timeline(timeline), lsn: Lsn(lsn) });
        let mine = ours == Some(4);
        Facts {
            system_id: SystemId(7),
            history: History { timeline: Timeline(timeline), switches },
            newest: Some(Newest { claim: claim(4), mine, holder, wrote: wrote.map(end) }),
            adopt: false,
            nothing_lost: false,
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
    fn a_claim_that_wrote_nothing_does_not_hide_what_was_written_before() {
        let mut stale = facts(1, &[], Some((2, 100)), Holder::Gone, Some(1));
        if let Some(newest) = &mut stale.newest {
            newest.claim = claim(5);
        }
        assert!(matches!(decide(&stale), Decision::Refuse(refusal) if refusal.kind == Kind::Fenced));
        let living = facts(1, &[], None, Holder::MayLive, None);
        assert_eq!(decide(&living), Decision::Spare { holder: claim(4) });
    }

    #[test]
    fn a_promotion_that_lacks_acknowledged_commits_is_refused_where_none_may_be_lost() {
        let mut behind = facts(3, &[(1, 50), (2, 90)], Some((2, 100)), Holder::Gone, None);
        behind.nothing_lost = true;
        assert!(matches!(decide(&behind), Decision::Refuse(refusal) if refusal.kind == Kind::Refused));
        behind.adopt = true;
        assert_eq!(decide(&behind), Decision::Begin { newest: Some(claim(4)) });
        let mut whole = facts(3, &[(1, 50), (2, 100)], Some((2, 100)), Holder::Gone, None);
        whole.nothing_lost = true;
        assert!(matches!(decide(&whole), Decision::Follow { .. }));
    }

    #[test]
    fn another_cluster_is_refused_whatever_is_said() {
        let mut other = facts(1, &[], None, Holder::Gone, None);
        (other.system_id, other.adopt) = (SystemId(8), true);
        assert!(matches!(decide(&other), Decision::Refuse(_)));
    }
}
