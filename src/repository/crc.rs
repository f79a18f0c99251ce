//! CRC-32C of bytes that are joined, from those of their parts. A CRC is linear: what becomes of each of its bits once so many
//! bytes follow is worked out once for each of the lengths that matter. The library does that for each two that it joins.

use std::sync::LazyLock;

use super::region::{PAGE, REGION};

/// Joins parts of one length.
#[derive(Debug)]
pub struct Joiner([u32; 32]);

/// Of pages, and of whole regions.
pub static PAGES: LazyLock<Joiner> = LazyLock::new(|| Joiner::of(PAGE));
pub static REGIONS: LazyLock<Joiner> = LazyLock::new(|| Joiner::of(REGION as usize));

impl Joiner {
    fn of(length: usize) -> Joiner {
        Joiner(std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, length)))
    }

    /// The CRC of all bytes so far and of the next part.
    pub fn join(&self, so_far: u32, next: u32) -> u32 {
        let becomes = self.0.iter().enumerate();
        next ^ becomes.fold(0, |sum, (bit, becomes)| sum ^ becomes & 0u32.wrapping_sub(so_far >> bit & 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_crcs_are_those_of_the_joined_bytes() {
        let bytes: Vec<u8> = (0..5 * PAGE).map(|n| (n * n / 7) as u8).collect();
        let joined = bytes.chunks(PAGE).fold(0, |so_far, page| PAGES.join(so_far, crc32c::crc32c(page)));
        assert_eq!(joined, crc32c::crc32c(&bytes));
    }
}
