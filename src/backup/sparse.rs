//! Packs of which the last backup uses little any more. An object is never rewritten: what is used of such a pack is stored
//! anew by the next backup, which so needs the pack no more, and once the older backups have gone it goes as a whole. Pure.

use std::collections::BTreeSet;

/// A pack is left behind once what is used of it can be stored anew in less than a quarter of its size.
const SHARE: u64 = 4;

/// No backup stores more anew for this than a tenth of all that the last one uses.
const BUDGET: u64 = 10;

/// A pack as the last backup uses it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Bytes of the pack.
    pub size: u64,
    /// Bytes that it takes at most to store all regions anew that have a frame in it: a region of which but a patch is there
    /// counts as a whole.
    pub anew: u64,
}

/// Which packs to leave behind, by number: those first that free the most for what they cost. `total` is what it would take
/// to store everything anew.
pub fn left_behind(packs: &[Used], total: u64) -> BTreeSet<u32> {
    let sparse = |(_, pack): &(u32, &Used)| pack.anew.saturating_mul(SHARE) < pack.size;
    let mut sparse: Vec<(u32, &Used)> = (0..).zip(packs).filter(sparse).collect();
    let cost = |a: &Used, b: &Used| u128::from(a.anew) * u128::from(b.size);
    sparse.sort_by(|(a_number, a), (b_number, b)| cost(a, b).cmp(&cost(b, a)).then(a_number.cmp(b_number)));
    let mut left = total / BUDGET;
    let fits = |(_, pack): &(u32, &Used)| {
        let rest = left.checked_sub(pack.anew);
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    sparse.into_iter().filter(fits).map(|(number, _)| number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [u32; 0] = [];

    fn left(packs: &[(u64, u64)], total: u64) -> Vec<u32> {
        let packs: Vec<Used> = packs.iter().map(|(size, anew)| Used { size: *size, anew: *anew }).collect();
        left_behind(&packs, total).into_iter().collect()
    }

    #[test]
    fn packs_of_which_little_is_used_are_left_behind_the_emptiest_first_and_not_all_at_once() {
        assert_eq!(left(&[], 0), NONE);
        // Just a quarter, less than that, nothing, more than all of it (patches of large regions).
        assert_eq!(left(&[(100, 25), (100, 24), (100, 0), (100, 900)], 1000), [1, 2]);
        // The store does not have it: its size is not known.
        assert_eq!(left(&[(0, 0), (0, 5)], 1000), NONE);
        // Of the same emptiness the first ones, as far as a tenth of all goes; a smaller one still fits.
        assert_eq!(left(&[(1000, 60), (1000, 60), (1000, 50), (100, 10)], 1000), [2, 3]);
        assert_eq!(left(&[(1000, 60), (1000, 60), (1000, 30), (100, 10)], 1000), [0, 2, 3]);
        assert_eq!(left(&[(1000, 60); 5], 1200), [0, 1]);
        assert_eq!(left(&[(u64::MAX, u64::MAX / 8), (u64::MAX, u64::MAX / 9)], u64::MAX), NONE);
    }
}
