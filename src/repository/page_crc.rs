//! CRC-32C of a region from those of its pages: each moved to its place, they add up to that of the whole.

use std::sync::LazyLock;

use super::region::{PAGE, REGION};

/// Pages of a region.
pub const PAGES: usize = REGION as usize / PAGE;

/// What so many pages of zeros behind it make of a CRC, as a matrix over bits: its columns. Moving by this is some hundred
/// times cheaper than combining anew for every page.
static MOVES: LazyLock<Vec<[u32; 32]>> = LazyLock::new(|| {
    let mut moves = vec![std::array::from_fn(|bit| 1 << bit)];
    let page: [u32; 32] = std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, PAGE));
    for pages in 0..PAGES {
        let next = moves[pages].map(|column| apply(&page, column));
        moves.push(next);
    }
    moves
});

fn apply(columns: &[u32; 32], crc: u32) -> u32 {
    let bits = columns.iter().enumerate().filter(|(bit, _)| crc >> bit & 1 == 1);
    bits.fold(0, |sum, (_, column)| sum ^ column)
}

/// What bytes of this CRC add to that of a region in which so many pages come behind them.
pub fn placed(crc: u32, pages_behind: usize) -> u32 {
    apply(&MOVES[pages_behind], crc)
}

/// The CRC of each page; `None` of bytes that are not whole pages of one region.
pub fn of_pages(bytes: &[u8]) -> Option<Vec<u32>> {
    let (pages, rest) = bytes.as_chunks::<PAGE>();
    (rest.is_empty() && pages.len() <= PAGES).then(|| pages.iter().map(|page| crc32c::crc32c(page)).collect())
}

/// The CRC of at most a region's pages together.
pub fn of_all(pages: &[u32]) -> u32 {
    let placed = pages.iter().rev().take(PAGES).enumerate().map(|(behind, crc)| placed(*crc, behind));
    placed.fold(0, |sum, part| sum ^ part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_add_up_to_what_they_make_up() {
        let content: Vec<u8> = (0..REGION as u32).map(|n| (n.wrapping_mul(n) / 7) as u8).collect();
        for pages in [0, 1, 2, 77, PAGES] {
            let content = &content[..pages * PAGE];
            let sums = of_pages(content).expect("whole pages");
            assert_eq!(sums.len(), pages);
            assert_eq!(of_all(&sums), crc32c::crc32c(content));
        }
        assert_eq!(of_pages(&content[..PAGE + 1]), None);
        assert_eq!(of_pages(&content.repeat(2)), None);
    }
}
