//! Claiming the next generation for a data directory, and ending the logs of those before it.

use super::Options;
use crate::clock::Clock;
use crate::error::Result;
use crate::events::{Event, Events};
use crate::model::{Generation, WriteId};
use crate::postgres::data_dir::OWN_DIR;
use crate::postgres::{ControlFile, version_of};
use crate::repository::log::{Checks, LogView, Sealer};
use crate::repository::{Claim, NewWriter, Repository, Writer, origin};

/// Whoever wants to be the one writer.
#[derive(Clone, Copy)]
pub(super) struct Claimant<'a> {
    pub options: &'a Options,
    pub clock: &'a Clock,
    pub events: &'a Events,
}

impl Claimant<'_> {
    /// Claims the generation after `newest` for the data directory; `None` when another was faster.
    pub async fn claim(
        &self,
        repository: &Repository,
        newest: Option<Generation>,
        parent: Option<Generation>,
    ) -> Result<Option<Writer>> {
        let version = version_of(&self.options.data_dir)?;
        let control = ControlFile::read(&self.options.data_dir, version)?;
        let own_dir = self.options.data_dir.join(OWN_DIR);
        let new = NewWriter {
            writer_id: WriteId(self.clock.random()),
            system_id: control.system_id,
            pg_major: version.major,
            segment_size: control.segment_size,
            host: self.options.host.clone(),
        };
        Writer::note_claiming(&own_dir, new.writer_id)?;
        let Some(claim) = repository.try_claim(newest, parent, &new).await? else { return Ok(None) };
        self.tell(&claim);
        let writer = Writer::new(repository, claim);
        writer.save(&own_dir)?;
        origin::forget(&own_dir)?;
        Ok(Some(writer))
    }

    /// From here on no older writer can have anything acknowledged.
    pub async fn seal_older(&self, repository: &Repository, generation: Generation) -> Result<Vec<LogView>> {
        Sealer { generation, checks: Checks::ALL }.seal_older(repository).await
    }

    pub fn tell(&self, claim: &Claim) {
        self.events.emit(Event::GenerationClaimed { generation: claim.generation, parent: claim.parent });
    }
}
