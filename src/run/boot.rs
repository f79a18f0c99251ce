//! The boot decision: facts in, one decision out. Pure, so that every case is a line of a table.
//!
//! What is not proven never leads to a new cluster: a bucket that could not be looked at is an error long before this.

use std::fmt;

use crate::error::{Error, Kind};
use crate::model::{Generation, RepositoryId, SystemId, WriteId};
use crate::postgres::data_dir::{PARTIAL_HINT, what_is_partial};
use crate::repository::Claim;

/// What is in the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Directory {
    /// Nothing, or no directory.
    Vacant,
    /// A restore that did not finish.
    Unfinished,
    /// A copy that has some databases of its cluster only.
    Partial,
    /// A cluster that this program has run: whose; whether every later generation wrote nothing at all; and, if the
    /// repository has WAL that the directory lacks, why.
    Ours {
        repository_id: RepositoryId,
        generation: Generation,
        writer_id: WriteId,
        unwritten_since: bool,
        behind: Option<String>,
    },
    /// A cluster without our note: restored by hand (from which generation), or never supervised.
    Unclaimed { system_id: SystemId, origin: Option<Generation> },
    /// A copy that has followed this repository (`restore --standby`): the newest generation it was given anything of, and
    /// why it has no part in the newest history, if so.
    Standby { system_id: SystemId, origin: Generation, misfit: Option<String> },
    /// A standby of another server, or of another repository.
    Follower,
    /// Something else.
    Foreign,
    /// A server is running there already.
    Running { pid: i32 },
}

/// What is at the address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bucket {
    /// Proven: nothing at all.
    Empty,
    /// A repository no writer was ever started on.
    Unused { repository_id: RepositoryId },
    Used {
        repository_id: RepositoryId,
        newest: Claim,
        /// Whether a backup leads to the newest generation.
        restorable: bool,
        holder: Holder,
    },
}

/// What is known of the newest generation's writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// It stopped cleanly, was replaced, never opened a log, or has been silent for as long as this machine was told to wait.
    Gone,
    /// Its log may grow.
    MayLive,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub data_dir: String,
    pub address: String,
    pub directory: Directory,
    pub bucket: Bucket,
    /// `--init` and `--adopt` were given.
    pub init: bool,
    pub adopt: bool,
    /// `--discard-diverged`.
    pub discard: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Make a new cluster.
    Init,
    /// Bring the newest generation's state back.
    Restore {
        newest: Claim,
    },
    /// Go on with the directory.
    Resume {
        newest: Claim,
    },
    /// Bring a standby to the newest generation's state, and go on with it.
    Promote {
        newest: Claim,
        origin: Generation,
    },
    /// Go on with a directory that has no note: a child of `parent`.
    Adopt {
        newest: Option<Claim>,
        parent: Option<Generation>,
    },
    /// Another machine has begun and its first backup is not there yet.
    Wait {
        holder: Claim,
    },
    /// Another machine may be the database right now.
    Spare {
        holder: Claim,
    },
    /// The directory belongs to a history that is not the database's any more, and may be moved away.
    SetAside {
        generation: Generation,
        why: String,
    },
    Refuse(Refusal),
}

/// Why not, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub kind: Kind,
    pub why: String,
    pub hint: String,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::new(refusal.kind, refusal.why).hint(refusal.hint)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Init => f.write_str("the repository is new: making a new cluster"),
            Decision::Restore { newest } => {
                write!(
                    f,
                    "restoring the newest state, generation {} (started by {} at {})",
                    newest.generation,
                    newest.host,
                    newest.claimed_at.short()
                )
            }
            Decision::Resume { newest } => {
                write!(f, "going on with the local directory, generation {}", newest.generation)
            }
            Decision::Promote { newest, .. } => {
                write!(
                    f,
                    "promoting the standby in the local directory: it follows generation {} (started by {} at {})",
                    newest.generation,
                    newest.host,
                    newest.claimed_at.short()
                )
            }
            Decision::Adopt { .. } => f.write_str("taking the local directory over"),
            Decision::Wait { holder } => {
                write!(
                    f,
                    "waiting for the first backup of generation {} (started by {} at {})",
                    holder.generation,
                    holder.host,
                    holder.claimed_at.short()
                )
            }
            Decision::Spare { holder } => write!(
                f,
                "waiting as a spare: generation {} (started by {} at {}) may be alive",
                holder.generation,
                holder.host,
                holder.claimed_at.short()
            ),
            Decision::SetAside { why, .. } => write!(f, "setting the local directory aside: {why}"),
            Decision::Refuse(refusal) => write!(f, "refused: {}", refusal.why),
        }
    }
}

pub fn decide(facts: &Facts) -> Decision {
    match (&facts.directory, &facts.bucket) {
        (Directory::Running { pid }, _) => refuse(
            Kind::Refused,
            format!("a server (process {pid}) is running in {}", facts.data_dir),
            "stop it first (a standby, too: pg_ctl stop); to protect a server that something else runs, use perennial agent".to_owned(),
        ),
        (Directory::Partial, _) => {
            refuse(Kind::Refused, what_is_partial(facts.data_dir.as_ref()), PARTIAL_HINT.to_owned())
        }
        // Before any claim: it could not write, and the database that can would be stopped for nothing.
        (Directory::Follower, _) => refuse(
            Kind::Refused,
            format!("{} is a standby, and not one that follows {}", facts.data_dir, facts.address),
            "promote it first (pg_ctl promote, then stop it), or use an empty directory".to_owned(),
        ),
        (Directory::Foreign, _) => refuse(
            Kind::Refused,
            format!("{} is not empty and not a PostgreSQL data directory", facts.data_dir),
            "name a new or empty directory with -D".to_owned(),
        ),
        (Directory::Vacant, Bucket::Empty | Bucket::Unused { .. }) if facts.init => Decision::Init,
        (Directory::Vacant | Directory::Unfinished, Bucket::Empty | Bucket::Unused { .. }) => nothing_to_restore(facts),
        (Directory::Vacant | Directory::Unfinished, Bucket::Used { newest, holder: Holder::MayLive, .. }) => {
            Decision::Spare { holder: newest.clone() }
        }
        (Directory::Vacant | Directory::Unfinished, Bucket::Used { newest, restorable: true, .. }) => {
            Decision::Restore { newest: newest.clone() }
        }
        (Directory::Vacant | Directory::Unfinished, Bucket::Used { newest, .. }) => Decision::Wait { holder: newest.clone() },
        (Directory::Ours { repository_id, .. }, bucket) if bucket.repository_id() != Some(*repository_id) => refuse(
            Kind::Refused,
            format!("{} belongs to repository {repository_id}, which is not the one at {}", facts.data_dir, facts.address),
            "check the address; to protect this cluster in another repository, remove pgsql_tmp_perennial from the directory and add --adopt or --init".to_owned(),
        ),
        (Directory::Ours { generation, writer_id, unwritten_since, behind, .. }, bucket) => {
            let mine = Mine { generation: *generation, writer_id: *writer_id, unwritten_since: *unwritten_since };
            ours(facts, mine, behind.as_deref(), bucket)
        }
        (Directory::Standby { system_id, origin, misfit }, bucket) => match bucket {
            Bucket::Used { newest, holder, .. } if newest.system_id == *system_id => {
                standby(facts, *origin, misfit.as_deref(), (newest, *holder))
            }
            // As any other copy.
            _ => unclaimed(facts, *system_id, Some(*origin), bucket),
        },
        (Directory::Unclaimed { system_id, origin }, bucket) => unclaimed(facts, *system_id, *origin, bucket),
    }
}

/// It takes over as an empty machine would, and needs no backup for it.
fn standby(facts: &Facts, origin: Generation, misfit: Option<&str>, (newest, holder): (&Claim, Holder)) -> Decision {
    match (misfit, holder) {
        (Some(why), _) => {
            let why = format!("{} is a standby that cannot go on: {why}", facts.data_dir);
            diverged(facts, origin, Kind::Refused, why)
        }
        (None, Holder::MayLive) => Decision::Spare { holder: newest.clone() },
        (None, Holder::Gone) => Decision::Promote { newest: newest.clone(), origin },
    }
}

fn nothing_to_restore(facts: &Facts) -> Decision {
    refuse(
        Kind::NotFound,
        format!(
            "{} holds no database: {}",
            facts.address,
            if facts.bucket == Bucket::Empty { "the place is empty" } else { "no server was ever started on it" }
        ),
        "check the address; if this is to be a new database, add --init".to_owned(),
    )
}

/// Whose the directory is.
#[derive(Clone, Copy)]
struct Mine {
    generation: Generation,
    writer_id: WriteId,
    unwritten_since: bool,
}

fn ours(facts: &Facts, mine: Mine, behind: Option<&str>, bucket: &Bucket) -> Decision {
    let generation = mine.generation;
    let Bucket::Used { newest, .. } = bucket else {
        return refuse(
            Kind::Damaged,
            format!("{} belongs to generation {generation}, but {} has no generation", facts.data_dir, facts.address),
            "bring the objects under generations/ back from a copy or an older version of the bucket".to_owned(),
        );
    };
    let is_newest = newest.generation == generation && newest.writer_id == mine.writer_id;
    // A generation that never wrote passes its parent through.
    let passes_through = mine.unwritten_since && newest.generation > generation;
    if !(is_newest || passes_through) {
        let why = format!(
            "{} belongs to generation {generation}; since then {} has started generation {} (at {}), which is the database now",
            facts.data_dir,
            newest.host,
            newest.generation,
            newest.claimed_at.short()
        );
        return diverged(facts, generation, Kind::Fenced, why);
    }
    match behind {
        Some(why) => {
            let why = format!("{} is older than what it wrote to the repository: {why}", facts.data_dir);
            diverged(facts, generation, Kind::Refused, why)
        }
        None => Decision::Resume { newest: newest.clone() },
    }
}

/// A directory whose history is not the database's any more: kept, and only set aside when that was asked for.
pub fn diverged(facts: &Facts, generation: Generation, kind: Kind, why: String) -> Decision {
    if facts.discard {
        return Decision::SetAside { generation, why };
    }
    refuse(
        kind,
        why,
        "to follow the repository, add --discard-diverged: the directory is renamed and the newest state restored"
            .to_owned(),
    )
}

fn unclaimed(facts: &Facts, system_id: SystemId, origin: Option<Generation>, bucket: &Bucket) -> Decision {
    match bucket {
        Bucket::Empty | Bucket::Unused { .. } if facts.init || facts.adopt => {
            Decision::Adopt { newest: None, parent: None }
        }
        Bucket::Empty | Bucket::Unused { .. } => refuse(
            Kind::Refused,
            format!(
                "{} is a cluster that was not run by perennial before, and {} is new",
                facts.data_dir, facts.address
            ),
            "to protect it in this repository from now on, add --adopt".to_owned(),
        ),
        Bucket::Used { newest, .. } if newest.system_id != system_id => refuse(
            Kind::Refused,
            format!(
                "{} is another cluster (system identifier {system_id}) than the one at {} ({})",
                facts.data_dir, facts.address, newest.system_id
            ),
            "give each cluster a repository of its own".to_owned(),
        ),
        Bucket::Used { newest, .. } if facts.adopt => {
            Decision::Adopt { newest: Some(newest.clone()), parent: origin.or(Some(newest.generation)) }
        }
        Bucket::Used { newest, .. } => refuse(
            Kind::Refused,
            format!(
                "{} is a copy of this cluster that was not started by perennial; the newest generation is {}, started by {} at {}",
                facts.data_dir,
                newest.generation,
                newest.host,
                newest.claimed_at.short()
            ),
            "to make the copy the database from now on, add --adopt; to get the newest state, use an empty directory"
                .to_owned(),
        ),
    }
}

/// A machine that has waited long enough.
pub fn gave_up_waiting(holder: &Claim) -> Refusal {
    Refusal {
        kind: Kind::Refused,
        why: format!(
            "generation {} was started by {} at {} and has no restorable backup",
            holder.generation,
            holder.host,
            holder.claimed_at.short()
        ),
        hint: "if that machine still runs, its first backup will make this work; if it is gone, nothing can be restored: start over under another prefix".to_owned(),
    }
}

fn refuse(kind: Kind, why: String, hint: String) -> Decision {
    Decision::Refuse(Refusal { kind, why, hint })
}

impl Bucket {
    fn repository_id(&self) -> Option<RepositoryId> {
        match self {
            Bucket::Empty => None,
            Bucket::Unused { repository_id } | Bucket::Used { repository_id, .. } => Some(*repository_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Timestamp;
    use crate::wal::SegmentSize;

    const REPOSITORY: RepositoryId = RepositoryId([1; 16]);
    const OTHER: RepositoryId = RepositoryId([2; 16]);
    const SYSTEM: SystemId = SystemId(42);

    fn claim(generation: u32) -> Claim {
        Claim {
            kind: String::new(),
            format: 1,
            writer_id: WriteId([generation as u8; 16]),
            generation: Generation(generation),
            parent: None,
            system_id: SYSTEM,
            pg_major: 15,
            segment_size: SegmentSize::try_from(16 << 20).expect("16 MB"),
            claimed_at: Timestamp::from_unix_micros(0),
            host: "machine-a".to_owned(),
        }
    }

    fn used(newest: u32, restorable: bool) -> Bucket {
        Bucket::Used { repository_id: REPOSITORY, newest: claim(newest), restorable, holder: Holder::Gone }
    }

    fn ours(generation: u32) -> Directory {
        Directory::Ours {
            repository_id: REPOSITORY,
            generation: Generation(generation),
            writer_id: WriteId([generation as u8; 16]),
            unwritten_since: false,
            behind: None,
        }
    }

    fn decided(directory: Directory, bucket: Bucket, flags: &str) -> Decision {
        decide(&Facts {
            data_dir: "/data".to_owned(),
            address: "s3://b/db".to_owned(),
            directory,
            bucket,
            init: flags.contains("init"),
            adopt: flags.contains("adopt"),
            discard: flags.contains("discard"),
        })
    }

    fn is_refused(decision: &Decision, kind: Kind) -> bool {
        matches!(decision, Decision::Refuse(refusal) if refusal.kind == kind && !refusal.hint.is_empty())
    }

    #[test]
    fn a_new_cluster_is_made_only_when_asked_and_only_where_nothing_is() {
        let unused = Bucket::Unused { repository_id: REPOSITORY };
        for bucket in [Bucket::Empty, unused] {
            assert_eq!(decided(Directory::Vacant, bucket.clone(), "init"), Decision::Init);
            assert!(is_refused(&decided(Directory::Vacant, bucket.clone(), ""), Kind::NotFound));
            assert!(is_refused(&decided(Directory::Unfinished, bucket, "init"), Kind::NotFound));
        }
        // Identical images may always carry --init: once there is a database, it is restored.
        assert_eq!(decided(Directory::Vacant, used(3, true), "init"), Decision::Restore { newest: claim(3) });
        assert_eq!(decided(Directory::Vacant, used(3, false), "init"), Decision::Wait { holder: claim(3) });
    }

    #[test]
    fn an_empty_or_unfinished_directory_is_restored() {
        for directory in [Directory::Vacant, Directory::Unfinished] {
            assert_eq!(decided(directory.clone(), used(3, true), ""), Decision::Restore { newest: claim(3) });
            assert_eq!(decided(directory, used(1, false), ""), Decision::Wait { holder: claim(1) });
        }
    }

    #[test]
    fn a_directory_goes_on_only_as_the_newest_generation() {
        assert_eq!(decided(ours(3), used(3, true), ""), Decision::Resume { newest: claim(3) });
        assert_eq!(decided(ours(3), used(3, false), ""), Decision::Resume { newest: claim(3) });
        assert!(is_refused(&decided(ours(2), used(3, true), "init adopt"), Kind::Fenced));
        assert!(matches!(decided(ours(2), used(3, true), "discard"), Decision::SetAside { .. }));
        // The same number, claimed by somebody else.
        let mut rival = claim(3);
        rival.writer_id = WriteId([9; 16]);
        let bucket = Bucket::Used { repository_id: REPOSITORY, newest: rival, restorable: true, holder: Holder::Gone };
        assert!(is_refused(&decided(ours(3), bucket, ""), Kind::Fenced));
    }

    #[test]
    fn a_claimant_that_never_wrote_takes_nothing_from_anybody() {
        let mut directory = ours(2);
        if let Directory::Ours { unwritten_since, .. } = &mut directory {
            *unwritten_since = true;
        }
        assert_eq!(decided(directory, used(4, true), ""), Decision::Resume { newest: claim(4) });
    }

    #[test]
    fn a_spare_waits_while_the_writer_may_live_and_an_own_directory_does_not() {
        let living =
            || Bucket::Used { repository_id: REPOSITORY, newest: claim(3), restorable: true, holder: Holder::MayLive };
        assert_eq!(decided(Directory::Vacant, living(), "init"), Decision::Spare { holder: claim(3) });
        assert_eq!(decided(Directory::Unfinished, living(), ""), Decision::Spare { holder: claim(3) });
        assert_eq!(
            decided(ours(3), living(), ""),
            Decision::Resume { newest: claim(3) },
            "the writer was this machine"
        );
    }

    #[test]
    fn a_disk_that_went_back_in_time_is_not_started() {
        let directory = Directory::Ours {
            repository_id: REPOSITORY,
            generation: Generation(3),
            writer_id: WriteId([3; 16]),
            unwritten_since: false,
            behind: Some("…".to_owned()),
        };
        assert!(is_refused(&decided(directory, used(3, true), "adopt"), Kind::Refused));
    }

    #[test]
    fn a_directory_is_never_mixed_into_another_repository() {
        let foreign = Bucket::Used { repository_id: OTHER, newest: claim(3), restorable: true, holder: Holder::Gone };
        assert!(is_refused(&decided(ours(3), foreign, "init adopt"), Kind::Refused));
        assert!(is_refused(&decided(ours(3), Bucket::Empty, "init adopt"), Kind::Refused));
        assert!(is_refused(&decided(ours(3), Bucket::Unused { repository_id: REPOSITORY }, "init"), Kind::Damaged));
        let other_cluster = Directory::Unclaimed { system_id: SystemId(7), origin: None };
        assert!(is_refused(&decided(other_cluster, used(3, true), "adopt init"), Kind::Refused));
    }

    #[test]
    fn a_copy_becomes_the_database_only_when_asked_and_keeps_its_descent() {
        let copy = |origin| Directory::Unclaimed { system_id: SYSTEM, origin };
        assert!(is_refused(&decided(copy(None), used(3, true), "init"), Kind::Refused));
        let parent_of = |decision| match decision {
            Decision::Adopt { parent, .. } => parent,
            other => panic!("{other:?}"),
        };
        assert_eq!(parent_of(decided(copy(Some(Generation(1))), used(3, true), "adopt")), Some(Generation(1)));
        assert_eq!(parent_of(decided(copy(None), used(3, true), "adopt")), Some(Generation(3)));
        assert_eq!(parent_of(decided(copy(None), Bucket::Empty, "adopt")), None);
    }

    #[test]
    fn a_part_of_a_cluster_is_refused_whatever_is_said() {
        for bucket in [Bucket::Empty, used(3, true), used(3, false)] {
            let decision = decided(Directory::Partial, bucket, "init adopt discard");
            assert!(is_refused(&decision, Kind::Refused), "{decision}");
            assert!(decision.to_string().contains("--database"), "{decision}");
        }
    }

    #[test]
    fn a_standby_of_something_else_claims_nothing() {
        for bucket in [Bucket::Empty, used(3, true), used(3, false)] {
            assert!(is_refused(&decided(Directory::Follower, bucket, "init adopt discard"), Kind::Refused));
        }
    }

    #[test]
    fn a_standby_takes_over_when_the_writer_has_gone_and_only_along_its_own_history() {
        let standby = |misfit: Option<&str>| Directory::Standby {
            system_id: SYSTEM,
            origin: Generation(2),
            misfit: misfit.map(str::to_owned),
        };
        let promoted = Decision::Promote { newest: claim(3), origin: Generation(2) };
        assert_eq!(decided(standby(None), used(3, true), ""), promoted);
        assert_eq!(decided(standby(None), used(3, false), "adopt init"), promoted, "it needs no backup");
        let living =
            || Bucket::Used { repository_id: REPOSITORY, newest: claim(3), restorable: true, holder: Holder::MayLive };
        assert_eq!(decided(standby(None), living(), "adopt"), Decision::Spare { holder: claim(3) });
        for bucket in [used(3, true), living()] {
            assert!(is_refused(&decided(standby(Some("…")), bucket.clone(), "adopt init"), Kind::Refused));
            assert!(matches!(decided(standby(Some("…")), bucket, "discard"), Decision::SetAside { .. }));
        }
        let other = Directory::Standby { system_id: SystemId(7), origin: Generation(2), misfit: None };
        assert!(is_refused(&decided(other, used(3, true), "adopt"), Kind::Refused));
        let unused = Bucket::Unused { repository_id: REPOSITORY };
        assert!(is_refused(&decided(standby(None), unused, ""), Kind::Refused));
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        for bucket in [Bucket::Empty, used(1, true)] {
            assert!(is_refused(&decided(Directory::Foreign, bucket.clone(), "init adopt"), Kind::Refused));
            assert!(is_refused(&decided(Directory::Running { pid: 1 }, bucket, "init adopt"), Kind::Refused));
        }
    }
}
