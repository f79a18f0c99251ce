//! `perennial agent`.

use crate::cli::setup::{Setup, callback};
use crate::cli::{args, identity, memory};
use crate::error::Result;
use crate::run::agent::{self, Agent};
use crate::storage::Policy;

use super::{run, wide};

pub fn run(setup: &Setup, mut args: args::Agent) -> Result<i32> {
    let data_dir = setup.data_dir(args.keep.data_dir.take())?;
    identity::drop_root(&data_dir)?;
    memory::hand_back();
    wide(async {
        let location = run::location(setup, args.keep.url.as_deref()).await?;
        let store = setup.store(&location, Policy::default())?;
        let on_fenced = args.on_fenced.or_else(|| setup.config.on_fenced.clone());
        let fetch_command = callback(&setup.global, &location, "fetch")?;
        let options = crate::run::Options { fetch_command, ..run::options(setup, args.keep, data_dir, &location)? };
        let agent = Agent { options, on_fenced };
        agent::run(store, &agent, &setup.clock, &setup.events).await
    })
}
