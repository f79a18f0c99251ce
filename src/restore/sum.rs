//! CRC-32C of a region that several frames make up, in whatever order they come: CRCs of its parts, each moved to its
//! place, add up to that of the whole.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::postgres::page::PAGE;
use crate::repository::page_crc::placed;

#[derive(Debug)]
pub struct Sum {
    expected: u32,
    plain: usize,
    so_far: AtomicU32,
    frames_left: AtomicU32,
}

impl Sum {
    pub fn new(expected: u32, plain: u32, frames: usize) -> Sum {
        Sum { expected, plain: plain as usize, so_far: AtomicU32::new(0), frames_left: AtomicU32::new(frames as u32) }
    }

    /// Takes up whole pages of the region.
    pub fn add(&self, at: usize, bytes: &[u8]) {
        let behind = (self.plain - at - bytes.len()) / PAGE;
        self.so_far.fetch_xor(placed(crc32c::crc32c(bytes), behind), Ordering::Relaxed);
    }

    /// Bytes of the region.
    pub fn plain(&self) -> usize {
        self.plain
    }

    /// Takes note that all of a frame was taken up.
    pub fn frame_is_done(&self) -> Filled {
        if self.frames_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Filled::Partly;
        }
        match self.so_far.load(Ordering::Acquire) == self.expected {
            true => Filled::Wholly,
            false => Filled::Wrongly,
        }
    }
}

/// What has become of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Other frames of it are still to come.
    Partly,
    Wholly,
    /// All frames are there, and do not add up to what was expected.
    Wrongly,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::manifest::REGION;
    use crate::repository::page_crc::PAGES;

    #[test]
    fn parts_in_any_order_add_up_to_the_whole() {
        let content: Vec<u8> = (0..REGION as u32).map(|n| (n.wrapping_mul(n) / 3) as u8).collect();
        for pages in [1, 2, 5, PAGES] {
            let content = &content[..pages * PAGE];
            let wrong = Sum::new(crc32c::crc32c(content) ^ 1, content.len() as u32, 1);
            wrong.add(0, content);
            assert_eq!(wrong.frame_is_done(), Filled::Wrongly);
            let sum = Sum::new(crc32c::crc32c(content), content.len() as u32, 2);
            let middle = pages / 2 * PAGE;
            sum.add(middle, &content[middle..]);
            assert_eq!(sum.frame_is_done(), Filled::Partly);
            sum.add(0, &content[..middle]);
            assert_eq!(sum.frame_is_done(), Filled::Wholly);
        }
    }
}
