//! From arguments, environment and configuration file to the values that operations take.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::clock::Clock;
use crate::error::{Error, IoContext, Result};
use crate::events::Events;
use crate::model::{Beside, ByteSize};
use crate::repository::vault::{Identities, Vault, no_identity, recipients_of};
use crate::repository::{Codec, Recipient, Repository, layout};
use crate::storage::{self, Location, Lock, LockMode, Policy, S3Settings, Scheme, Store, StoreSettings};

use super::args::{CodecArgs, Global};
use super::config::Config;
use super::{environment, output, secret};

/// In front of the variables of a copy's second place.
const SECOND: &str = "PERENNIAL_TO_";

/// What every command starts from.
#[derive(Clone)]
pub struct Setup {
    pub global: Global,
    pub config: Config,
    pub clock: Clock,
    pub events: Events,
}

impl Setup {
    pub fn new(global: Global) -> Result<Setup> {
        let config = Config::load(global.config.as_deref())?;
        let events = output::events(&global);
        Ok(Setup { global, config, clock: Clock::system(), events })
    }

    /// The repository's address: argument, then `--repo` or `PERENNIAL_REPO`, then the configuration file.
    pub fn address(&self, argument: Option<&str>) -> Option<String> {
        argument.map(str::to_owned).or_else(|| self.global.repo.clone()).or_else(|| self.config.repo.clone())
    }

    pub fn location(&self, argument: Option<&str>) -> Result<Location> {
        let address = self.address(argument).ok_or_else(|| {
            Error::usage("no repository is named")
                .hint("add --repo URL, or set PERENNIAL_REPO, or repo = \"URL\" in /etc/perennial.toml")
        })?;
        address.parse()
    }

    /// How long requests are tried: `PERENNIAL_PATIENCE` or `patience` in the file, else what the command thinks fit.
    fn policy(&self, fitting: Policy) -> Result<Policy> {
        let named = environment::patience().or_else(|| self.config.patience.clone());
        let patience = self.configured(named.as_ref())?.unwrap_or(fitting.patience);
        Ok(Policy { patience, attempt: fitting.attempt.min(patience), ..fitting })
    }

    /// The store of a repository, encrypted or not.
    pub fn store(&self, location: &Location, retry: Policy) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.vault(location, retry)?))
    }

    pub fn vault(&self, location: &Location, retry: Policy) -> Result<Vault> {
        Ok(Vault::new(self.open(location, retry, "")?, self.identities()))
    }

    /// Where the identity is that opens an encrypted repository.
    fn identities(&self) -> Identities {
        let file = self.global.identity.clone().or_else(|| self.config.identity_file.clone());
        let command = environment::identity_command().or_else(|| self.config.identity_command.clone());
        Arc::new(move || secret::identities(environment::identity(), file.as_deref(), command.as_deref()))
    }

    /// The store below any encryption.
    pub fn bare_store(&self, location: &Location) -> Result<Arc<dyn Store>> {
        self.open(location, Policy::default(), "")
    }

    /// The same of the second place of a copy: variables that begin with `PERENNIAL_TO_` go before those that do not.
    pub fn second_store(&self, location: &Location) -> Result<Arc<dyn Store>> {
        self.open(location, Policy::default(), SECOND)
    }

    /// The second place as a repository, encrypted or not.
    pub fn second_vault(&self, location: &Location) -> Result<Vault> {
        Ok(Vault::new(self.second_store(location)?, self.identities()))
    }

    /// Two places must be two: not the same, and none inside the other. With settings of its own the second may be another
    /// store whose addresses look alike.
    pub fn apart_from(&self, first: &Location, second: &Location) -> Result<()> {
        // A lock of its own does not make it another one.
        let settings = environment::with_prefix(SECOND);
        if settings.keys().any(|name| !name.starts_with(&format!("{SECOND}S3_LOCK"))) {
            return Ok(());
        }
        let resolved = |location: &Location| match &location.scheme {
            Scheme::File { directory } => {
                let real = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.clone());
                format!("file://{}/", real.display())
            }
            _ => format!("{}/", location.to_string().trim_end_matches('/')),
        };
        let (one, other) = (resolved(first), resolved(second));
        match one.starts_with(&other) || other.starts_with(&one) {
            true => Err(Error::usage(format!("{first} and {second} are one place, or one lies in the other"))
                .hint("choose a second place apart from the first")),
            false => Ok(()),
        }
    }

    fn open(&self, location: &Location, retry: Policy, own: &str) -> Result<Arc<dyn Store>> {
        let with_prefix = |prefix: &str| {
            let mut all = environment::with_prefix(prefix);
            if !own.is_empty() {
                let owned = environment::with_prefix(&format!("{own}{prefix}")).into_iter();
                all.extend(owned.map(|(name, value)| (name[own.len()..].to_owned(), value)));
            }
            all
        };
        let mut variables: std::collections::BTreeMap<String, String> =
            self.config.s3.variables().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        variables.extend(with_prefix("AWS_"));
        let settings = StoreSettings {
            s3: S3Settings {
                variables,
                home: environment::home(),
                storage_class: environment::storage_class().or_else(|| self.config.s3.storage_class.clone()),
                lock: self.lock(own)?,
            },
            google: with_prefix("GOOGLE_").into_iter().collect(),
            azure: with_prefix("AZURE_").into_iter().collect(),
            retry: self.policy(retry)?,
        };
        storage::open(location, &settings, &self.clock, &self.events)
    }

    /// How what is written is locked; a second place may have a lock of its own.
    pub fn lock(&self, own: &str) -> Result<Option<Lock>> {
        let owned = |name: &str| {
            if own.is_empty() { None } else { environment::with_prefix(own).remove(&format!("{own}{name}")) }
        };
        let of_its_own = self.configured(owned("S3_LOCK").as_ref())?;
        let configured = || self.configured(self.config.s3.lock.as_ref());
        let given = of_its_own.or(self.global.lock);
        let keep = given.map_or_else(configured, |given| Ok(Some(given)))?;
        let Some(keep) = keep.filter(|keep| !keep.is_zero()) else { return Ok(None) };
        let mode = owned("S3_LOCK_MODE").or_else(environment::lock_mode).or_else(|| self.config.s3.lock_mode.clone());
        let mode = mode.map_or_else(|| Ok(LockMode::default()), |mode| mode.parse())?;
        Ok(Some(Lock { keep, mode, is_passing: layout::is_passing }))
    }

    /// The repository that a command reads from or writes to.
    pub async fn repository(&self) -> Result<Repository> {
        let location = self.location(None)?;
        Repository::open(self.store(&location, Policy::default())?, &self.clock).await
    }

    pub fn data_dir(&self, argument: Option<PathBuf>) -> Result<PathBuf> {
        argument
            .or_else(|| self.config.data_dir.clone())
            .ok_or_else(|| Error::usage("no data directory is named").hint("add -D DIR, or set PGDATA"))
    }

    /// Who can open a new repository; nobody in particular when it is to be in the clear.
    pub fn recipients(&self, args: &CodecArgs, location: &Location) -> Result<Vec<Recipient>> {
        if !args.encrypt || !args.recipient.is_empty() {
            return Ok(args.recipient.clone());
        }
        let recipients = (self.identities())()?.map(|text| recipients_of(&text)).unwrap_or_default();
        if recipients.is_empty() {
            return Err(
                no_identity(&location.to_string()).hint("say who may open it: --recipient age1…, or --identity FILE")
            );
        }
        Ok(recipients)
    }

    /// Directories beside the database: as given, or else those of the file.
    pub fn besides(&self, given: Vec<Beside>, data_dir: &Path) -> Result<Vec<Beside>> {
        if !given.is_empty() {
            return apart(given, data_dir);
        }
        let configured = self.config.with.iter();
        let texts = configured.map(|(name, path)| format!("{name}={}", path.display()).parse::<Beside>());
        apart(texts.collect::<std::result::Result<_, _>>()?, data_dir)
    }

    /// A size as given, or as the configuration file has it.
    pub fn size(&self, given: Option<ByteSize>, configured: Option<&String>) -> Result<Option<ByteSize>> {
        let configured = || configured.map(|text| text.parse::<ByteSize>().map_err(Error::from)).transpose();
        given.map_or_else(configured, |given| Ok(Some(given)))
    }

    /// A duration of the configuration file.
    pub fn configured(&self, value: Option<&String>) -> Result<Option<std::time::Duration>> {
        value.map(|text| crate::model::parse_duration(text).map_err(Error::from)).transpose()
    }
}

/// Directories beside the database, none in another and none in its own.
pub fn apart(besides: Vec<Beside>, data_dir: &Path) -> Result<Vec<Beside>> {
    let resolved = |path: &Path| {
        let path = &std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let parent = || Some(std::fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?));
        std::fs::canonicalize(path).ok().or_else(parent).unwrap_or_else(|| path.to_owned())
    };
    let besides = Beside::check(besides)?;
    let data_dir = resolved(data_dir);
    for beside in &besides {
        let there = Beside { name: beside.name.clone(), path: resolved(&beside.path) };
        if there.overlaps(&data_dir) {
            let (path, data_dir) = (beside.path.display(), data_dir.display());
            return Err(Error::usage(format!(
                "--with {}: {path} and the data directory {data_dir} lie one in the other",
                beside.name
            )));
        }
    }
    Ok(besides)
}

pub fn codec(args: &CodecArgs) -> Result<Codec> {
    args.zstd_level.map_or_else(|| Ok(Codec::default()), Codec::with_level)
}

/// The words with which PostgreSQL calls this very program back, for the repository at `location`.
pub fn callback(global: &Global, location: &Location, verb: &str) -> Result<Vec<String>> {
    let program = std::env::current_exe().on("find", "this program")?;
    let program = program.to_str().ok_or_else(|| Error::refused("the path of this program is not UTF-8"))?;
    let mut words = vec![program.to_owned(), "wal".to_owned(), verb.to_owned(), format!("--repo={location}")];
    if let Some(config) = &global.config {
        let config = std::fs::canonicalize(config).on("resolve", config)?;
        words.push(format!("--config={}", config.display()));
    }
    if let Some(identity) = &global.identity {
        // Not where links lead now: a secret that is renewed is another file.
        let identity = std::path::absolute(identity).on("resolve", identity)?;
        words.push(format!("--identity={}", identity.display()));
    }
    Ok(words)
}
