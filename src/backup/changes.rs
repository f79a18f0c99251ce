//! What WAL has touched since the last backup, region by region. Pure; filled from WAL summaries (`summaries.rs`).
//!
//! It errs on one side: a region that is not known to be as it was is read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::postgres::data_dir::FileItem;
use crate::postgres::page::PAGE;
use crate::postgres::summaries::{Relation, Touched, What};
use crate::repository::manifest::REGION;

/// Blocks of a region. Files of a relation hold a whole number of regions, so that regions count through all of them.
pub const BLOCKS: u32 = (REGION / PAGE as u64) as u32;

/// Memory for all of it: a bit for each region, for a terabyte that changes all over 128 kB, and what goes with each
/// relation, of which this is enough for 100,000. Past it every page is read.
const BYTES_MAX: usize = 16 << 20;

/// What a relation costs, its place in the table included.
const RELATION: usize = 128;

/// Changes of one stretch of WAL.
#[derive(Debug, Default)]
pub struct Changes {
    /// Made, moved or dropped as a whole, in this tablespace: all files in it are other ones, or may be.
    databases: HashSet<(u32, u32)>,
    relations: HashMap<Relation, OfRelation>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct OfRelation {
    /// What lies behind this many blocks is not what the last backup has there.
    cut_to: Option<u32>,
    /// A bit for each region of the relation, up to the last one that was touched.
    regions: Vec<u64>,
}

impl OfRelation {
    fn cut(&mut self, to: u32) {
        self.cut_to = Some(self.cut_to.map_or(to, |before| before.min(to)));
    }

    fn add(&mut self, region: u32) {
        let word = region as usize / 64;
        if word >= self.regions.len() {
            self.regions.resize(word + 1, 0);
        }
        self.regions[word] |= 1 << (region % 64);
    }

    fn has(&self, region: u64) -> bool {
        let word = usize::try_from(region / 64).ok().and_then(|word| self.regions.get(word));
        word.is_some_and(|word| word >> (region % 64) & 1 == 1)
    }
}

impl Changes {
    /// Takes up what a summary says, in stretches of [`BLOCKS`]. An error when there is more than fits.
    pub fn note(&mut self, Touched { relation, what }: Touched) -> Result<()> {
        if relation.number == 0 {
            if self.databases.insert((relation.tablespace, relation.database)) {
                self.bytes += RELATION;
            }
        } else {
            let new = !self.relations.contains_key(&relation);
            let of = self.relations.entry(relation).or_default();
            let held = of.regions.capacity();
            match what {
                What::CutTo(blocks) => of.cut(blocks),
                What::Stretch(region) => of.add(region),
            }
            self.bytes += (of.regions.capacity() - held) * 8 + if new { RELATION } else { 0 };
        }
        match self.bytes > BYTES_MAX {
            true => Err(Error::refused("more relations have changed than fit into memory")),
            false => Ok(()),
        }
    }

    /// The view of one file; `None` for files of which summaries tell nothing, or not everything.
    pub fn of(self: &Arc<Self>, file: &FileItem) -> Option<FileChanges> {
        let first_block = file.first_block.filter(|_| file.pages_have_lsn)?;
        let relation = Relation::of_path(&file.path)?;
        Some(FileChanges { changes: Arc::clone(self), relation, first_block })
    }
}

/// Changes of one file of a relation.
#[derive(Debug, Clone)]
pub struct FileChanges {
    changes: Arc<Changes>,
    relation: Relation,
    first_block: u32,
}

impl FileChanges {
    /// Whether a region of the file, by number from its start, holds what it held at the last backup, if it was that long
    /// already, is that long still, and is the same file.
    pub fn is_untouched(&self, region: u64) -> bool {
        let Relation { tablespace, database, .. } = self.relation;
        if self.changes.databases.contains(&(tablespace, database)) {
            return false;
        }
        let Some(of) = self.changes.relations.get(&self.relation) else { return true };
        let region = u64::from(self.first_block / BLOCKS) + region;
        let end = (region + 1) * u64::from(BLOCKS);
        of.cut_to.is_none_or(|blocks| end <= u64::from(blocks)) && !of.has(region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, first_block: Option<u32>) -> FileItem {
        FileItem {
            path: path.to_owned(),
            source: path.into(),
            mode: 0o600,
            uid: 0,
            size: 1 << 30,
            mtime: 0,
            first_block,
            pages_have_lsn: first_block.is_some() && !path.rsplit('/').next().is_some_and(|name| name.contains('_')),
        }
    }

    fn changes(said: &[(u32, u32, What)]) -> Arc<Changes> {
        let mut changes = Changes::default();
        for (database, number, what) in said {
            let relation = Relation { tablespace: 1663, database: *database, number: *number };
            changes.note(Touched { relation, what: *what }).expect("fits");
        }
        Arc::new(changes)
    }

    /// The first eight regions of a file: `.` for those that need not be read.
    fn view(changes: &Arc<Changes>, path: &str, first_block: u32) -> String {
        let Some(of) = changes.of(&file(path, Some(first_block))) else { return "none".to_owned() };
        (0..8).map(|region| if of.is_untouched(region) { '.' } else { 'r' }).collect()
    }

    const GIGABYTE: u32 = 131_072;

    #[test]
    fn only_regions_with_touched_blocks_are_read() {
        let changes =
            changes(&[(5, 100, What::Stretch(2)), (5, 100, What::Stretch(1024 + 7)), (6, 100, What::Stretch(0))]);
        assert_eq!(view(&changes, "base/5/100", 0), "..r.....");
        assert_eq!(view(&changes, "base/5/100.1", GIGABYTE), ".......r");
        assert_eq!(view(&changes, "base/5/100.2", 2 * GIGABYTE), "........", "behind all that was touched");
        assert_eq!(view(&changes, "base/6/100", 0), "r.......", "another database");
        assert_eq!(view(&changes, "base/5/101", 0), "........", "another relation");
        assert_eq!(view(&changes, "global/100", 0), "........", "another tablespace");
    }

    #[test]
    fn what_lies_behind_the_shortest_a_relation_has_been_is_read() {
        let cut = |blocks| changes(&[(5, 100, What::CutTo(blocks))]);
        assert_eq!(view(&cut(0), "base/5/100", 0), "rrrrrrrr", "made anew");
        assert_eq!(view(&cut(384), "base/5/100", 0), "...rrrrr");
        assert_eq!(view(&cut(385), "base/5/100", 0), "...rrrrr", "a region that was cut through");
        assert_eq!(view(&cut(383), "base/5/100", 0), "..rrrrrr");
        assert_eq!(view(&cut(GIGABYTE + 128), "base/5/100", 0), "........");
        assert_eq!(view(&cut(GIGABYTE + 128), "base/5/100.1", GIGABYTE), ".rrrrrrr");
        assert_eq!(view(&cut(384), "base/5/100.1", GIGABYTE), "rrrrrrrr");
        let twice = [What::CutTo(512), What::CutTo(256), What::CutTo(640), What::Stretch(0)];
        assert_eq!(view(&changes(&twice.map(|what| (5, 100, what))), "base/5/100", 0), "r.rrrrrr");
    }

    #[test]
    fn a_database_that_was_made_or_moved_is_read() {
        // Whatever is said of it: made by copying files, only this says so.
        let changes = changes(&[(5, 0, What::CutTo(0))]);
        assert_eq!(view(&changes, "base/5/100", 0), "rrrrrrrr");
        assert_eq!(view(&changes, "base/5/100.3", 3 * GIGABYTE), "rrrrrrrr");
        assert_eq!(view(&changes, "base/6/100", 0), "........");
        assert_eq!(view(&changes, "pg_tblspc/777/PG_17_202406281/5/100", 0), "........", "its part elsewhere");
    }

    #[test]
    fn summaries_speak_of_main_forks_only() {
        let changes = changes(&[]);
        for other in ["base/5/100_fsm", "base/5/100_vm", "base/5/100_init", "base/5/100_vm.1"] {
            assert_eq!(view(&changes, other, 0), "none", "{other}");
        }
        for other in ["base/5/pg_filenode.map", "pg_xact/0000", "postgresql.conf"] {
            assert!(changes.of(&file(other, None)).is_none(), "{other}");
        }
    }

    #[test]
    fn memory_has_a_bound() {
        let mut all = Changes::default();
        let noted = (1..=200_000).try_for_each(|number| {
            let relation = Relation { tablespace: 1663, database: 5, number };
            all.note(Touched { relation, what: What::Stretch(0) })
        });
        assert!(noted.is_err());
        // The last block there can be, of a few relations.
        let mut all = Changes::default();
        let noted = (1..=8).try_for_each(|number| {
            let relation = Relation { tablespace: 1663, database: 5, number };
            all.note(Touched { relation, what: What::Stretch(u32::MAX / BLOCKS) })
        });
        assert!(noted.is_err());
    }
}
