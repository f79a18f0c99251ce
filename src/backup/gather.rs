//! Small patches of regions that lie near one another in a file go into one frame. Each alone is too small to be compressed
//! well, and a manifest, which names every frame, would grow with each of them.

use crate::error::{Error, Result};
use crate::repository::manifest::{FileEntry, Patch};
use crate::repository::pack::FrameRef;

/// A frame begins anew with each region whose number is a multiple of this: a backup that goes on with what one that was cut
/// off has left puts the same patches together.
const REGIONS: usize = 16;

/// Bytes from which on a frame gets no more patches.
const ENOUGH: usize = 64 << 10;

/// A patch of so many bytes has a frame of its own: once its region is stored anew nobody has to read it for its neighbours'.
const ALONE: usize = 32 << 10;

/// Patches that wait for others.
#[derive(Debug, Default)]
pub struct Gathered {
    content: Vec<u8>,
    places: Vec<Place>,
}

/// Where a patch lies in the content, and which region it is of, by numbers.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    region: usize,
    at: u32,
    plain: u32,
}

impl Gathered {
    /// Adds the patch of a region; what a frame is to be made of, if it is time.
    pub fn add(&mut self, (file, region): (usize, usize), patch: Vec<u8>) -> Option<(Vec<u8>, Places)> {
        let place = |at: usize| Place { file, region, at: at as u32, plain: patch.len() as u32 };
        if patch.len() >= ALONE {
            let places = Places { length: patch.len() as u32, places: vec![place(0)] };
            return Some((patch, places));
        }
        self.places.push(place(self.content.len()));
        self.content.extend(patch);
        if self.content.len() >= ENOUGH { self.take() } else { None }
    }

    /// Whether the patch of this region must not go along with these.
    pub fn ends_before(&self, (file, region): (usize, usize)) -> bool {
        self.places.first().is_some_and(|first| first.file != file || first.region / REGIONS != region / REGIONS)
    }

    /// All of them, if there are any.
    pub fn take(&mut self) -> Option<(Vec<u8>, Places)> {
        let Gathered { content, places } = std::mem::take(self);
        let length = content.len() as u32;
        (!places.is_empty()).then_some((content, Places { length, places }))
    }
}

/// What a frame has.
#[derive(Debug)]
pub struct Places {
    length: u32,
    places: Vec<Place>,
}

impl Places {
    /// Gives each region its patch, now that it is known where the frame lies.
    pub fn fill(self, files: &mut [FileEntry], frame: FrameRef) -> Result<()> {
        for Place { file, region, at, plain } in self.places {
            let region = files.get_mut(file).and_then(|file| file.regions.get_mut(region));
            let region = region.ok_or_else(|| Error::internal("a patch without a region"))?;
            let patch = Patch { frame, content: self.length, at, plain };
            region.patches = region.patches.iter().copied().chain([patch]).collect();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::codec::Sha256;

    #[test]
    fn patches_of_neighbours_share_a_frame_and_each_region_gets_its_own() {
        let mut gathered = Gathered::default();
        assert!(gathered.take().is_none() && !gathered.ends_before((3, 5)));
        let mut add = |region, patch: &[u8]| gathered.add((1, region), patch.to_vec());
        assert!(add(17, b"one").is_none());
        let (alone, places) = add(18, &[9; ALONE]).expect("a large one goes alone");
        assert_eq!((alone.len(), places.places.len()), (ALONE, 1));
        assert!(add(31, b"three").is_none());
        assert!(!gathered.ends_before((1, 30)));
        assert!(gathered.ends_before((1, 32)) && gathered.ends_before((1, 15)) && gathered.ends_before((2, 17)));
        let (content, places) = gathered.take().expect("two");
        assert_eq!(content, b"onethree");
        let mut files = vec![FileEntry::of("a", b""), FileEntry::of("b", &vec![0; 40 << 20])];
        let frame = FrameRef { pack: 7, offset: 100, stored: 8, sha256: Sha256([0; 32]) };
        places.fill(&mut files, frame).expect("they are there");
        let patched = |(number, region): (usize, &crate::repository::Region)| {
            region.patches.iter().map(move |patch| (number, patch.of(b"onethree").expect("there").to_vec())).next()
        };
        let patches: Vec<_> = files[1].regions.iter().enumerate().filter_map(patched).collect();
        assert_eq!(patches, [(17, b"one".to_vec()), (31, b"three".to_vec())]);
        assert!(gathered.take().is_none());
        let some = vec![0; ENOUGH / 5];
        assert!((0..4).all(|region| gathered.add((1, region), some.clone()).is_none()));
        let (content, places) = gathered.add((1, 4), vec![0; ENOUGH / 5 + 5]).expect("enough");
        assert!(content.len() >= ENOUGH && gathered.take().is_none());
        assert!(places.fill(&mut files[..1], frame).is_err(), "the file is not there");
    }
}
