//! What is fetched with which request: regions by place in the packs, neighbours together, each with its patches. Pure.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::Semaphore;

use super::delta::Have;
use super::fetch::Contents;
use super::spans::{Patches, Span, neighbours, place};
use crate::repository::manifest::{Patch, Region};
use crate::repository::pack::FrameRef;

/// Patches that are kept in memory, as they are stored, for regions that are fetched together, and how many such batches are
/// there at once: one that ends, one that begins and the next.
const BATCH_MAX: u64 = 6 << 20;
const BATCHES: usize = 3;

/// A region, and where it goes.
#[derive(Debug, Clone)]
pub struct Piece {
    pub file: usize,
    /// Of the region in the file.
    pub offset: u64,
    pub frame: FrameRef,
    pub check: Check,
}

/// What a frame must be.
#[derive(Debug, Clone)]
pub enum Check {
    /// So many bytes which, with these patches, have this CRC-32C.
    Region { plain: u32, crc: u32, patches: Arc<[Patch]> },
    /// What its own checksum says.
    Frame,
}

impl Piece {
    fn patches(&self) -> &[Patch] {
        match &self.check {
            Check::Region { patches, .. } => patches,
            Check::Frame => &[],
        }
    }
}

/// Pieces of one pack that are fetched with one request, and what is patched over them.
#[derive(Debug)]
pub struct Range {
    pub span: Span,
    pub pieces: Vec<Piece>,
    pub patches: Arc<Patches>,
}

impl Range {
    /// The frames it reads, those with patches of several regions as often.
    pub fn frames(&self) -> impl Iterator<Item = FrameRef> + '_ {
        let of = |piece: &'_ Piece| {
            let patches: Vec<FrameRef> = piece.patches().iter().map(|patch| patch.frame).collect();
            std::iter::once(piece.frame).chain(patches)
        };
        self.pieces.iter().flat_map(of)
    }

    /// The regions that it puts together.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.pieces.iter().filter_map(|piece| match &piece.check {
            Check::Region { plain, crc, patches } => {
                Some(Region { frame: piece.frame, plain: *plain, crc: *crc, patches: Arc::clone(patches) })
            }
            Check::Frame => None,
        })
    }
}

/// What is wanted, by place in the packs, neighbours together.
pub fn plan(contents: &Contents, have: &Have) -> Vec<Range> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (file, entry) in contents.files.iter().enumerate() {
        let mut offset = 0;
        for (number, region) in entry.regions.iter().enumerate() {
            if !have.has(file, number) {
                let Region { frame, plain, crc, ref patches } = *region;
                let check = Check::Region { plain, crc, patches: patches.clone() };
                pieces.push(Piece { file, offset, frame, check });
            }
            offset += u64::from(region.plain);
        }
    }
    in_ranges(contents, pieces)
}

/// Frames one by one, to be checked only: of a region with patches each for itself.
pub fn plan_frames(contents: &Contents, wanted: impl Fn(&Region, FrameRef) -> bool) -> Vec<Range> {
    let (mut pieces, mut seen) = (Vec::new(), HashSet::new());
    for region in contents.files.iter().flat_map(|file| &file.regions) {
        for frame in region.frames().filter(|frame| wanted(region, *frame)) {
            if !seen.insert(place(frame)) {
                continue;
            }
            let check = match region.patches.is_empty() {
                true => Check::Region { plain: region.plain, crc: region.crc, patches: Arc::default() },
                false => Check::Frame,
            };
            pieces.push(Piece { file: 0, offset: 0, frame, check });
        }
    }
    in_ranges(contents, pieces)
}

/// Pieces by place in the files, whose patches are fetched together.
#[derive(Default)]
struct Batch {
    pieces: Vec<Piece>,
    patches: Vec<FrameRef>,
}

fn in_ranges(contents: &Contents, pieces: Vec<Piece>) -> Vec<Range> {
    // Each batch has the next one fetched, so that none waits for its patches.
    let (mut next, mut ranges, room) = (None, Vec::new(), Arc::new(Semaphore::new(BATCHES)));
    for Batch { pieces, patches } in batches(pieces).into_iter().rev() {
        let patches = Arc::new(Patches::of(&contents.packs, patches, (next.take(), Arc::clone(&room))));
        next = Some(Arc::clone(&patches));
        let mut spans = neighbours(&contents.packs, pieces, |piece| piece.frame);
        // A disk likes files from their beginning to their end, whichever packs that takes.
        spans.sort_by_key(|(_, pieces)| pieces.first().map(|piece| (piece.file, piece.offset)));
        let of = |(span, pieces)| Range { span, pieces, patches: Arc::clone(&patches) };
        ranges.extend(spans.into_iter().rev().map(of));
    }
    ranges.reverse();
    ranges
}

/// Cuts them where their patches become too many. So what lies side by side in a pack, but far apart in the files, has no
/// patches read twice.
fn batches(all: Vec<Piece>) -> Vec<Batch> {
    let mut batches = vec![Batch::default()];
    let (mut seen, mut bytes) = (HashSet::new(), 0);
    for piece in all {
        let stored = |new: &HashSet<_>| -> u64 {
            let frames = piece.patches().iter().map(|patch| patch.frame).filter(|frame| !new.contains(&place(*frame)));
            frames.map(|frame| u64::from(frame.stored)).sum()
        };
        let mut more = stored(&seen);
        if bytes + more > BATCH_MAX && bytes > 0 {
            batches.push(Batch::default());
            (seen, bytes) = (HashSet::new(), 0);
            more = stored(&seen);
        }
        bytes += more;
        if let Some(batch) = batches.last_mut() {
            let frames = piece.patches().iter().map(|patch| patch.frame);
            batch.patches.extend(frames.filter(|frame| seen.insert(place(*frame))));
            batch.pieces.push(piece);
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PackId;
    use crate::repository::codec::Sha256;
    use crate::repository::manifest::FileEntry;

    const MB: u64 = 1 << 20;

    fn frame(pack: u32, offset: u64, stored: u64) -> FrameRef {
        FrameRef { pack, offset, stored: stored as u32, sha256: Sha256([0; 32]) }
    }

    #[test]
    fn every_region_comes_once_and_patches_are_fetched_for_some_at_a_time() {
        // Regions that take a request each, the first without a patch.
        let region = |number: u64| {
            let mut region = Region::whole(frame(0, (5 - number) * 4 * MB, 4 * MB), 8192, 0);
            // Two of them share a frame.
            if number > 0 {
                let (shared, at) = (number.min(4), if number == 5 { 1152 } else { 0 });
                let frame = frame(1, shared * 3 * MB, 3 * MB);
                region.patches = Arc::new([Patch { frame, content: 2304, at, plain: 1152 }]);
            }
            region
        };
        let file = FileEntry { regions: (0..6).map(region).collect(), ..FileEntry::of("base/5/1", b"") };
        let packs = vec![PackId([0; 16]), PackId([1; 16])];
        let contents = Contents { packs, files: vec![file], ..Contents::default() };
        let ranges = plan(&contents, &Have::default());
        let offsets: Vec<_> = ranges.iter().flat_map(|range| &range.pieces).map(|piece| piece.offset / 8192).collect();
        assert_eq!(offsets, [0, 1, 2, 3, 4, 5], "by their place in the file");
        let with = |range: &Range| ranges.iter().position(|other| Arc::ptr_eq(&range.patches, &other.patches));
        assert_eq!(ranges.iter().map(with).collect::<Vec<_>>(), [0, 0, 0, 3, 3, 3].map(Some));
        let frames = plan_frames(&contents, |_, frame| frame.pack == 1);
        assert_eq!(frames.iter().flat_map(Range::frames).count(), 4);
    }
}
