//! A segment of a history, wherever it is kept: its bytes, and what happened in it.

use super::{Repository, WalIndex, WalPlace, WalSource, layout};
use crate::error::{Error, Result};
use crate::model::Timestamp;
use crate::wal::{SegmentFacts, SegmentName, SegmentSize, WalFileName, scan_part};

/// What is known of a segment.
#[derive(Debug, Clone)]
pub struct Known {
    /// When its last byte was stored, by the writer's clock.
    pub at: Timestamp,
    pub facts: SegmentFacts,
}

impl Repository {
    /// The bytes of a segment; behind the end of a log's WAL there are zeros.
    pub async fn segment_content(
        &self,
        index: &WalIndex,
        place: WalPlace,
        name: SegmentName,
        size: SegmentSize,
    ) -> Result<Vec<u8>> {
        let mut content = Vec::with_capacity(size.bytes() as usize);
        match place.source {
            WalSource::Object { .. } => {
                let key = layout::wal_file(place.generation, WalFileName::Segment(name));
                let collect = |_, piece: Vec<u8>| {
                    content.extend_from_slice(&piece);
                    Ok(())
                };
                let read = self.read_wal(place.generation, WalFileName::Segment(name), collect).await?;
                read.ok_or_else(|| self.missing(&key))?;
            }
            WalSource::Log { through } => {
                let lost = || Error::internal(format!("{name} has no place in the index"));
                let (run, start) = (index.run(place.generation).ok_or_else(lost)?, name.start(size).ok_or_else(lost)?);
                let collect = |_, piece: &[u8]| {
                    content.extend_from_slice(piece);
                    Ok(())
                };
                self.read_log(&run, start, through, collect).await?;
                content.resize(size.bytes() as usize, 0);
            }
        }
        Ok(content)
    }

    /// What happened in a segment: by its head, or by looking.
    pub async fn segment_facts(
        &self,
        index: &WalIndex,
        place: WalPlace,
        name: SegmentName,
        size: SegmentSize,
    ) -> Result<Known> {
        if let WalSource::Log { .. } = place.source {
            let content = self.segment_content(index, place, name, size).await?;
            let at = index.run(place.generation).map(|run| run.at);
            return Ok(Known { at: at.unwrap_or(Timestamp::from_unix_micros(0)), facts: scan_part(name, &content)? });
        }
        let key = layout::wal_file(place.generation, WalFileName::Segment(name));
        let head = self.wal_head(place.generation, WalFileName::Segment(name)).await?;
        let head = head.ok_or_else(|| self.missing(&key))?;
        let facts = SegmentFacts {
            last_record_end: head.last_record_end.unwrap_or_default(),
            first_commit: head.first_commit,
            last_commit: head.last_commit,
            lowest_xid: head.lowest_xid,
            highest_xid: head.highest_xid,
            restore_points: head.restore_points,
            ..SegmentFacts::default()
        };
        Ok(Known { at: head.pushed_at, facts })
    }
}
