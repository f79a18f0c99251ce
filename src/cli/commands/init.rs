//! `perennial init`.

use crate::cli::args;
use crate::cli::output;
use crate::cli::setup::{Setup, codec};
use crate::error::Result;
use crate::repository::Repository;
use crate::storage::{Created, Policy, Scheme};

pub async fn run(setup: &Setup, args: args::Init) -> Result<i32> {
    let location = setup.location(args.url.as_deref())?;
    if let Scheme::File { directory } = &location.scheme {
        crate::disk::create_dir(directory, 0o700)?;
    }
    let store = setup.store(&location, Policy::default())?;
    let recipients = setup.recipients(&args.codec, &location)?;
    let (repository, created) = Repository::make(store, codec(&args.codec)?, &recipients, &setup.clock).await?;
    let descriptor = repository.descriptor();
    let new = created == Created::Now;
    if setup.global.json {
        output::json(&serde_json::json!({
            "schema": "perennial/init/1",
            "repository": location.to_string(),
            "repository_id": descriptor.repository_id,
            "created": new,
        }))?;
    } else if new {
        output::line(format!("{location} is a repository now, id {}", descriptor.repository_id));
        output::line(format!("next: perennial run {location} -D DIR --init"));
    } else {
        output::line(format!("{location} is a repository already, id {}", descriptor.repository_id));
    }
    Ok(0)
}
