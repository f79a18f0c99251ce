//! A patch: what has changed of a region, by the kilobyte. A page that was written to has mostly changed in its header, its
//! line pointers and the rows in question; the rest of it is stored already.

use super::region::{PAGE, Pages, REGION};

/// Patches are made of pieces of this many bytes.
pub const PIECE: usize = 1024;

/// Pieces of a page: as many as a byte has bits.
pub const PIECES: usize = PAGE / PIECE;

/// Pages of a region.
pub const PAGES: usize = REGION as usize / PAGE;

/// No frame with patches has more bytes than this, whatever a manifest says.
pub const FRAME_MAX: u32 = 2 << 20;

/// Which pieces of each of a region's pages: bit *n* for the piece *n*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Masks(pub [u8; PAGES]);

impl Masks {
    pub const NONE: Masks = Masks([0; PAGES]);

    /// How many pieces they have.
    pub fn count(&self) -> usize {
        self.0.iter().map(|mask| mask.count_ones() as usize).sum()
    }

    /// The pages of which they have some.
    pub fn pages(&self) -> Pages {
        let mut pages = Pages::default();
        (0u32..).zip(self.0).filter(|(_, mask)| *mask != 0).for_each(|(page, _)| pages.add(page));
        pages
    }

    /// Where the pieces lie that are next to one another, in bytes from the region's start.
    fn stretches(&self) -> impl Iterator<Item = (usize, usize)> {
        let has = |piece: usize| self.0.get(piece / PIECES).is_some_and(|mask| mask >> (piece % PIECES) & 1 == 1);
        let begins = (0..PAGES * PIECES).filter(move |piece| has(*piece) && (*piece == 0 || !has(piece - 1)));
        begins.map(move |first| {
            let end = (first..).find(|piece| !has(*piece)).unwrap_or(first);
            (first * PIECE, end * PIECE)
        })
    }
}

/// A patch: the masks, then the pieces.
pub fn encode(region: &[u8], masks: &Masks) -> Vec<u8> {
    let mut patch = Vec::with_capacity(PAGES + masks.count() * PIECE);
    patch.extend_from_slice(&masks.0);
    masks.stretches().for_each(|(from, to)| patch.extend_from_slice(&region[from..to]));
    patch
}

/// Puts the pieces of a patch in their places; says why when there is no such place.
pub fn apply(patch: &[u8], region: &mut [u8]) -> Result<(), String> {
    let (masks, mut pieces) = patch.split_first_chunk().ok_or("a patch is too short")?;
    let masks = Masks(*masks);
    if pieces.len() != masks.count() * PIECE {
        return Err(format!("a patch of {} pieces has {} bytes of them", masks.count(), pieces.len()));
    }
    for (from, to) in masks.stretches() {
        let place = region.get_mut(from..to).ok_or("a patch replaces what is not there")?;
        let (piece, rest) = pieces.split_at(to - from);
        place.copy_from_slice(piece);
        pieces = rest;
    }
    Ok(())
}

/// Whether a patch can have so many bytes, of a region that has so many.
pub fn is_length(patch: usize, region: usize) -> bool {
    let pieces = patch.checked_sub(PAGES).filter(|pieces| *pieces > 0 && *pieces <= region);
    pieces.is_some_and(|pieces| pieces.is_multiple_of(PIECE)) && region.is_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_makes_the_old_region_the_new_one_and_has_no_more_than_it_takes() {
        let old: Vec<u8> = (0..5 * PAGE).map(|n| (n / 7) as u8).collect();
        let mut new = old.clone();
        let mut masks = Masks::NONE;
        // The first and the last piece, two over the border of pages, two side by side.
        for piece in [0, 5 * PIECES - 1, 2 * PIECES - 1, 2 * PIECES, 20, 21] {
            new[piece * PIECE + 77] ^= 9;
            masks.0[piece / PIECES] |= 1 << (piece % PIECES);
        }
        let patch = encode(&new, &masks);
        assert_eq!(patch.len(), PAGES + 6 * PIECE);
        assert!(is_length(patch.len(), old.len()));
        let mut patched = old.clone();
        apply(&patch, &mut patched).expect("fits");
        assert!(patched == new);
        assert!(apply(&patch, &mut patched[..4 * PAGE]).is_err(), "a page that the region does not have");
        assert!(apply(&patch[..patch.len() - 1], &mut patched).is_err());
        assert!(apply(&patch[..PAGES - 1], &mut patched).is_err());
        assert!(!is_length(PAGES, old.len()) && !is_length(PAGES + PIECE, 5 * PAGE - 1));
        assert!(!is_length(PAGES + PIECE + 1, old.len()) && !is_length(PAGES + 6 * PAGE, old.len()));
    }

    #[test]
    fn all_of_a_region_can_be_replaced() {
        let new: Vec<u8> = (0..REGION as usize).map(|n| (n / 1000) as u8).collect();
        let patch = encode(&new, &Masks([u8::MAX; PAGES]));
        let mut patched = vec![0; new.len()];
        apply(&patch, &mut patched).expect("fits");
        assert!(patched == new);
    }
}
