//! What tells the pieces of a region from others without their bytes: a hash of each, and the CRC of each page.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::codec::Sha256;
use super::crc;
use super::patch::{Masks, PAGES, PIECE, PIECES};
use super::region::PAGE;
use crate::model::RepositoryId;

/// Of the pages of a region.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sums {
    pub pieces: Vec<u64>,
    /// CRC-32C.
    pub pages: Vec<u32>,
}

impl Sums {
    /// Bytes of what is written of a page.
    pub const OF_A_PAGE: usize = 8 * PIECES + 4;

    /// The CRC-32C of all pages.
    pub fn crc(&self) -> u32 {
        self.pages.iter().fold(0, |so_far, page| crc::PAGES.join(so_far, *page))
    }

    /// Which pieces are others than they were, as far as there are two of them.
    pub fn differing(&self, then: &Sums) -> Masks {
        let mut masks = Masks::NONE;
        for (mask, (now, then)) in masks.0.iter_mut().zip(self.pieces.chunks(PIECES).zip(then.pieces.chunks(PIECES))) {
            let pairs = now.iter().zip(then).enumerate().filter(|(_, (now, then))| now != then);
            *mask = pairs.fold(0, |mask, (piece, _)| mask | 1 << piece);
        }
        masks
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.pages.len() * Sums::OF_A_PAGE);
        self.pieces.iter().for_each(|sum| bytes.extend_from_slice(&sum.to_le_bytes()));
        self.pages.iter().for_each(|crc| bytes.extend_from_slice(&crc.to_le_bytes()));
        bytes
    }

    /// As [`to_bytes`](Self::to_bytes) made them.
    pub fn of_bytes(bytes: &[u8]) -> Sums {
        let pages = bytes.len() / Sums::OF_A_PAGE;
        let (pieces, pages) = bytes.split_at(pages * PIECES * 8);
        Sums {
            pieces: pieces.as_chunks().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect(),
            pages: pages.as_chunks().0.iter().map(|crc| u32::from_le_bytes(*crc)).collect(),
        }
    }
}

/// How pieces are hashed: by XXH3 with 64 bits and a secret.
#[derive(Debug, Clone)]
pub struct Hash(Arc<[u8; SECRET]>);

/// Bytes of XXH3's secret.
const SECRET: usize = 192;

impl Hash {
    /// With a secret that whoever knows the repository's random identifier can make.
    pub fn of(repository: RepositoryId) -> Hash {
        let mut secret = [0; SECRET];
        for (number, part) in (0u8..).zip(secret.as_chunks_mut::<32>().0) {
            *part = Sha256::of(&[&repository.0[..], &[number]].concat()).0;
        }
        Hash(Arc::new(secret))
    }

    pub fn sum(&self, bytes: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_secret(self.0.as_slice(), bytes).unwrap_or_else(|_| XxHash3_64::oneshot(bytes))
    }

    /// Whether a region of so many bytes is made of pages.
    pub fn takes(length: usize) -> bool {
        length.is_multiple_of(PAGE) && length <= PAGES * PAGE
    }

    /// Those of a region; `None` of one that is not made of pages.
    pub fn sums(&self, region: &[u8]) -> Option<Sums> {
        let mut sums = Sums::default();
        Hash::takes(region.len()).then(|| self.add(region, None, &mut sums))?;
        Some(sums)
    }

    /// Adds whole pages, the next ones of a region. A page whose pieces are as `before` has its CRC from there: a CRC takes
    /// longer than hashes do.
    pub fn add(&self, pages: &[u8], before: Option<&Sums>, sums: &mut Sums) {
        for page in pages.as_chunks::<PAGE>().0 {
            let (number, first) = (sums.pages.len(), sums.pieces.len());
            sums.pieces.extend(page.as_chunks::<PIECE>().0.iter().map(|piece| self.sum(piece)));
            let same = before.filter(|before| before.pieces.get(first..first + PIECES) == sums.pieces.get(first..));
            let known = same.and_then(|before| before.pages.get(number).copied());
            sums.pages.push(known.unwrap_or_else(|| crc32c::crc32c(page)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash() -> Hash {
        Hash::of(RepositoryId([7; 16]))
    }

    #[test]
    fn a_changed_piece_is_told_from_the_others() {
        let region: Vec<u8> = (0..3 * PAGE).map(|n| (n / 9) as u8).collect();
        let mut changed = region.clone();
        changed[0] ^= 1;
        changed[2 * PAGE + PIECE] ^= 1;
        let sums = |region: &[u8]| hash().sums(region).expect("whole pages");
        let masks = sums(&changed).differing(&sums(&region));
        assert_eq!((&masks.0[..3], masks.count()), (&[1, 0, 2][..], 2));
        assert_eq!(hash().sums(&region[..PAGE + PIECE]), None);
        assert_eq!(hash().sums(&vec![0; PAGE * PAGES + PAGE]), None);
        assert_ne!(Hash::of(RepositoryId([8; 16])).sums(&region), hash().sums(&region), "everybody has a secret");
        assert_eq!(Sums::of_bytes(&sums(&region).to_bytes()), sums(&region));
    }

    #[test]
    fn the_crc_is_that_of_the_bytes_whatever_was_known_before() {
        let then: Vec<u8> = (0..3 * PAGE).map(|n| (n / 9) as u8).collect();
        let mut now = [&then[..], &[1; PAGE]].concat();
        now[PAGE + 5] ^= 1;
        let before = hash().sums(&then).expect("whole pages");
        let mut sums = Sums::default();
        now.chunks(2 * PAGE).for_each(|some| hash().add(some, Some(&before), &mut sums));
        assert_eq!(sums, hash().sums(&now).expect("whole pages"));
        assert_eq!((sums.crc(), before.crc()), (crc32c::crc32c(&now), crc32c::crc32c(&then)));
    }
}
