//! Exit codes, one for each kind of failure. docs/reference/exit-codes.md is this table; a test compares them.

use crate::error::Kind;

pub const DONE: i32 = 0;

/// `wal fetch` only: the file is proven not to exist, recovery has reached the end of WAL.
pub const END_OF_WAL: i32 = 1;

/// Kind, code, and what it means. Where sysexits.h has a code for it, it is that one.
pub const TABLE: &[(Kind, i32, &str)] = &[
    (Kind::Usage, 2, "the command line or the configuration file is wrong"),
    (
        Kind::Damaged,
        65,
        "something that is there is not what was written: a checksum, a length or a format does not hold",
    ),
    (Kind::NotFound, 66, "proven not to be there: a repository, a backup, a recovery target, a file"),
    (Kind::Unreachable, 69, "the store or the server did not answer, or cannot now; says nothing about what is there"),
    (Kind::Internal, 70, "a mistake in this program; please report it"),
    (Kind::Refused, 73, "doing it could lose data or mislead, so it was not done"),
    (Kind::Local, 74, "the local disk or operating system failed"),
    (Kind::Fenced, 75, "another writer has taken over; this one must not write any more"),
    (Kind::Postgres, 76, "PostgreSQL refused, failed or ended in a way it should not have"),
    (Kind::Denied, 77, "credentials are missing, wrong, expired or without the right to do this"),
    (Kind::Conflict, 78, "the same name with other content: two histories would get mixed up"),
];

pub fn code(kind: Kind) -> i32 {
    TABLE.iter().find(|(of, ..)| *of == kind).map_or(70, |(_, code, _)| *code)
}

/// PostgreSQL takes codes up to 125 from `restore_command` for "no such file" and ends recovery. Every failure must be
/// above, and none may be 143, which it takes for a SIGTERM.
pub fn for_recovery(code: i32) -> i32 {
    code + 128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_kinds_share_a_code_and_recovery_never_mistakes_a_failure_for_the_end() {
        let mut codes: Vec<i32> = TABLE.iter().map(|(_, code, _)| *code).collect();
        codes.sort();
        codes.dedup();
        assert_eq!(codes.len(), TABLE.len());
        for code in codes {
            assert!((1..126).contains(&code), "archive_command must be called again after {code}");
            assert!((126..256).contains(&for_recovery(code)) && for_recovery(code) != 143, "{code}");
        }
        assert_eq!(code(Kind::Fenced), 75);
    }
}
