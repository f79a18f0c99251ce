//! A region of a file in a manifest: one frame with all its bytes, and possibly patches, frames with just the pieces that
//! changed since.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::de::{self, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::codec::Sha256;
use super::pack::FrameRef;
use super::patch;

/// Data files are cut in regions of this many bytes.
pub const REGION: u64 = 1 << 20;

/// PostgreSQL's pages.
pub const PAGE: usize = 8192;

/// Pages of a region by number, counted from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pages(pub u128);

impl Pages {
    /// The first `count` pages.
    pub fn first(count: u32) -> Pages {
        Pages(if count >= u128::BITS { u128::MAX } else { (1 << count) - 1 })
    }

    pub fn add(&mut self, page: u32) {
        self.0 |= 1u128.checked_shl(page).unwrap_or(0);
    }

    pub fn has(self, page: u32) -> bool {
        self.0.checked_shr(page).is_some_and(|bits| bits & 1 == 1)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn without(self, others: Pages) -> Pages {
        Pages(self.0 & !others.0)
    }

    pub fn with(self, others: Pages) -> Pages {
        Pages(self.0 | others.0)
    }

    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..u128::BITS).filter(move |page| self.has(*page))
    }

    /// The first and the last of those that lie side by side.
    pub fn runs(self) -> impl Iterator<Item = (u32, u32)> {
        let begins = self.iter().filter(move |page| *page == 0 || !self.has(page - 1));
        begins.map(move |first| (first, (first..u128::BITS).take_while(|page| self.has(*page)).last().unwrap_or(first)))
    }
}

/// What has changed of a region ([`patch`]): a part of a frame, which may have patches of other regions too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    pub frame: FrameRef,
    /// Bytes of the frame's content.
    pub content: u32,
    /// Where in it the patch begins, and its length.
    pub at: u32,
    pub plain: u32,
}

impl Patch {
    /// Its share of the room that the frame takes.
    pub fn stored(&self) -> u64 {
        (u64::from(self.frame.stored) * u64::from(self.plain)).div_ceil(u64::from(self.content).max(1))
    }

    /// The patch in the content of its frame.
    pub fn of<'a>(&self, content: &'a [u8]) -> Option<&'a [u8]> {
        content.get(self.at as usize..)?.get(..self.plain as usize)
    }

    /// Whether it can be of a region that has so many bytes.
    fn is_sound(&self, region: u32) -> bool {
        self.content <= patch::FRAME_MAX
            && self.at.checked_add(self.plain).is_some_and(|end| end <= self.content)
            && patch::is_length(self.plain as usize, region as usize)
    }
}

/// `[pack, offset, stored, plain, crc32c, sha256]`, and with patches a list of `[pack, offset, stored, content, sha256, at,
/// plain]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    pub frame: FrameRef,
    /// Bytes of the file in this region.
    pub plain: u32,
    /// CRC-32C of these bytes, patches applied.
    pub crc: u32,
    /// Later ones go over earlier ones.
    pub patches: Arc<[Patch]>,
}

impl Region {
    /// A region stored as a whole.
    pub fn whole(frame: FrameRef, plain: u32, crc: u32) -> Region {
        Region { frame, plain, crc, patches: Arc::default() }
    }

    /// All frames it needs.
    pub fn frames(&self) -> impl Iterator<Item = FrameRef> + '_ {
        std::iter::once(self.frame).chain(self.patches.iter().map(|patch| patch.frame))
    }

    /// The room that it takes.
    pub fn stored(&self) -> u64 {
        u64::from(self.frame.stored) + self.patches.iter().map(Patch::stored).sum::<u64>()
    }

    /// Whether something of it is in any of these packs.
    pub fn is_in_any(&self, packs: &BTreeSet<u32>) -> bool {
        !packs.is_empty() && self.frames().any(|frame| packs.contains(&frame.pack))
    }

    /// Whether there can be such a region.
    pub fn is_sound(&self) -> bool {
        u64::from(self.plain) <= REGION
            && self.frames().all(|frame| frame.is_sound())
            && self.patches.iter().all(|patch| patch.is_sound(self.plain))
    }
}

type PatchTuple = (u32, u64, u32, u32, Sha256, u32, u32);

impl Serialize for Region {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(if self.patches.is_empty() { 6 } else { 7 }))?;
        list.serialize_element(&self.frame.pack)?;
        list.serialize_element(&self.frame.offset)?;
        list.serialize_element(&self.frame.stored)?;
        list.serialize_element(&self.plain)?;
        list.serialize_element(&self.crc)?;
        list.serialize_element(&self.frame.sha256)?;
        if !self.patches.is_empty() {
            let patches = self.patches.iter().map(|Patch { frame, content, at, plain }| -> PatchTuple {
                (frame.pack, frame.offset, frame.stored, *content, frame.sha256, *at, *plain)
            });
            list.serialize_element(&patches.collect::<Vec<_>>())?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Region {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Region, D::Error> {
        deserializer.deserialize_seq(RegionVisitor)
    }
}

struct RegionVisitor;

impl<'de> Visitor<'de> for RegionVisitor {
    type Value = Region;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a region: [pack, offset, stored, plain, crc32c, sha256] and perhaps patches")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Region, A::Error> {
        fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(list: &mut A) -> Result<T, A::Error> {
            list.next_element()?.ok_or_else(|| de::Error::custom("a region is too short"))
        }
        let (pack, offset, stored) = (next(&mut list)?, next(&mut list)?, next(&mut list)?);
        let (plain, crc, sha256) = (next(&mut list)?, next(&mut list)?, next(&mut list)?);
        let patches: Option<Vec<PatchTuple>> = list.next_element()?;
        let patch = |(pack, offset, stored, content, sha256, at, plain): PatchTuple| Patch {
            frame: FrameRef { pack, offset, stored, sha256 },
            content,
            at,
            plain,
        };
        let patches = patches.unwrap_or_default().into_iter().map(patch).collect();
        Ok(Region { frame: FrameRef { pack, offset, stored, sha256 }, plain, crc, patches })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(pack: u32) -> FrameRef {
        FrameRef { pack, offset: 7, stored: 9, sha256: Sha256([3; 32]) }
    }

    fn pages(list: &[u32]) -> Pages {
        let mut pages = Pages::default();
        list.iter().for_each(|page| pages.add(*page));
        pages
    }

    #[test]
    fn a_region_reads_back_as_it_was_written() {
        let mut region = Region::whole(frame(1), 1 << 20, 42);
        let json = serde_json::to_string(&region).expect("json");
        assert_eq!(json.matches(',').count(), 5, "{json}");
        assert_eq!(serde_json::from_str::<Region>(&json).expect("reads back"), region);
        let patch = |at, plain| Patch { frame: frame(2), content: 4096, at, plain };
        region.patches = Arc::new([patch(5, 128 + 1024)]);
        let json = serde_json::to_string(&region).expect("json");
        assert!(json.contains("[[2,7,9,4096,") && json.ends_with(",5,1152]]]"), "{json}");
        assert_eq!(serde_json::from_str::<Region>(&json).expect("reads back"), region);
        assert!(serde_json::from_str::<Region>("[1,2,3]").is_err());
        assert!(region.is_sound());
        assert_eq!(region.stored(), 9 + 3, "of nine bytes its share");
        let long = FrameRef { stored: u32::MAX, ..frame(1) };
        assert!(!Region::whole(long, 1 << 20, 42).is_sound() && !Region::whole(frame(1), 2 << 20, 42).is_sound());
        for (at, plain) in [(5, 128), (4096 - 1151, 1152), (u32::MAX, 1152)] {
            region.patches = Arc::new([patch(at, plain)]);
            assert!(!region.is_sound(), "{plain} bytes from {at} on");
        }
        assert_eq!(patch(1, 2).of(b"abc"), Some(&b"bc"[..]));
        assert_eq!(patch(2, 2).of(b"abc"), None);
    }

    #[test]
    fn pages_side_by_side_are_told_together() {
        assert_eq!(pages(&[0, 1, 4, 126, 127]).runs().collect::<Vec<_>>(), [(0, 1), (4, 4), (126, 127)]);
    }
}
