//! `perennial key`: who can open an encrypted repository.

use std::sync::Arc;

use crate::cli::args::{Key as Command, KeyRotate};
use crate::cli::output;
use crate::cli::setup::Setup;
use crate::error::{Error, IoContext, Result};
use crate::repository::Repository;
use crate::repository::vault::{Encryption, Key, Vault};
use crate::storage::Policy;

pub async fn run(setup: &Setup, command: Command) -> Result<i32> {
    let vault = setup.vault(&setup.location(None)?, Policy::default())?;
    let repository = Repository::open(Arc::new(vault.clone()), &setup.clock).await?;
    let Some(encryption) = repository.descriptor().encryption.clone() else {
        return Err(Error::refused(format!("{} is not encrypted: it has no key", repository.address()))
            .hint("encryption is chosen when a repository is made: perennial init URL --encrypt"));
    };
    match command {
        Command::Rotate(args) => rotate(&vault, &repository, &encryption, args).await,
        Command::Export => {
            let key = opened(&vault).await?;
            output::line(key.to_text());
            Ok(0)
        }
    }
}

async fn rotate(vault: &Vault, repository: &Repository, encryption: &Encryption, args: KeyRotate) -> Result<i32> {
    let key = match &args.key_file {
        None => opened(vault).await?,
        Some(path) => {
            let text = std::fs::read_to_string(path).on("read", path)?;
            let key = Key::from_text(&text);
            key.ok_or_else(|| Error::usage(format!("{} does not hold 64 hexadecimal digits", path.display())))?
        }
    };
    if key.id()? != encryption.key_id {
        return Err(Error::refused(format!("this is not the key of {}", repository.address())));
    }
    let name = vault.rotate(&key, &args.recipient).await?;
    output::line(format!(
        "{} is wrapped for {} recipients, and for nobody else",
        repository.url(&name),
        args.recipient.len()
    ));
    Ok(0)
}

async fn opened(vault: &Vault) -> Result<Key> {
    vault.key().await?.ok_or_else(|| Error::internal("an encrypted repository without a key"))
}
