//! Page checksums, as `storage/checksum_impl.h` computes them: 32 interleaved FNV-1a hashes over the page.

use crate::model::Lsn;

pub const PAGE: usize = 8192;

const SUMS: usize = 32;
const PRIME: u32 = 16_777_619;

/// `checksumBaseOffsets`.
const BASE: [u32; SUMS] = [
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C, 0xF8D4474F,
    0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB, 0xE58F764B, 0x187636BC,
    0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4, 0x783125BB, 0x6CA8EAA2, 0xE407EAC6,
    0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
];

/// Whether the page is what its checksum says. Pages never written (`pd_upper` is zero) have none.
pub fn is_intact(page: &[u8; PAGE], block: u32) -> bool {
    let upper = u16::from_le_bytes([page[14], page[15]]);
    upper == 0 || checksum(page, block) == u16::from_le_bytes([page[8], page[9]])
}

/// The position of the page's last change.
pub fn lsn(page: &[u8; PAGE]) -> Lsn {
    let half = |at: usize| u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]));
    Lsn(half(0) << 32 | half(4))
}

/// Whether its access method keeps something of its own at its end, as indexes and sequences do and tables do not.
pub fn has_special_area(page: &[u8; PAGE]) -> bool {
    usize::from(u16::from_le_bytes([page[16], page[17]])) < PAGE
}

/// A page with nothing on it, as `PageInit` leaves it, without a checksum: unlike zeros it counts as one that was written.
pub fn empty() -> [u8; PAGE] {
    const HEADER: u16 = 24;
    const LAYOUT: u16 = 4;
    let mut page = [0; PAGE];
    // pd_lower, pd_upper, pd_special, pd_pagesize_version.
    for (at, value) in [(12, HEADER), (14, PAGE as u16), (16, PAGE as u16), (18, PAGE as u16 | LAYOUT)] {
        page[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// `pg_checksum_page`: the checksum field itself counts as zero, the block number is mixed in.
pub fn checksum(page: &[u8; PAGE], block: u32) -> u16 {
    let hash = hash(page) ^ block;
    (hash % 65535 + 1) as u16
}

fn hash(page: &[u8; PAGE]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which is all that the function needs.
        return unsafe { hash_avx2(page) };
    }
    hash_portable(page)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn hash_avx2(page: &[u8; PAGE]) -> u32 {
    hash_portable(page)
}

#[inline(always)]
fn hash_portable(page: &[u8; PAGE]) -> u32 {
    let mut sums = BASE;
    for (row, words) in page.chunks_exact(4 * SUMS).enumerate() {
        for (lane, word) in words.chunks_exact(4).enumerate() {
            let mut value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            // pd_checksum is the low half of the third word.
            if row == 0 && lane == 2 {
                value &= 0xFFFF_0000;
            }
            sums[lane] = mix(sums[lane], value);
        }
    }
    // Two rounds of zeroes for additional mixing.
    for _ in 0..2 {
        sums.iter_mut().for_each(|sum| *sum = mix(*sum, 0));
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[inline(always)]
fn mix(sum: u32, value: u32) -> u32 {
    let mixed = sum ^ value;
    mixed.wrapping_mul(PRIME) ^ (mixed >> 17)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_hashing_agree_and_notice_a_flipped_bit() {
        let mut page = [0u8; PAGE];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at * 31 % 251) as u8;
        }
        let sum = checksum(&page, 7);
        assert_eq!(hash(&page), hash_portable(&page));
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        assert!(is_intact(&page, 7));
        assert!(!is_intact(&page, 8), "a page in the wrong place");
        page[5000] ^= 1;
        assert!(!is_intact(&page, 7));
        assert!(is_intact(&[0; PAGE], 3), "a page never written");
    }
}
