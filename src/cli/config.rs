//! The configuration file. A flag beats the environment, the environment beats the file; unknown keys are errors.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, IoContext, Result};

/// Read when no other is named, if it is there.
const DEFAULT_FILE: &str = "/etc/perennial.toml";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub repo: Option<String>,
    pub data_dir: Option<std::path::PathBuf>,
    pub rpo: Option<String>,
    pub takeover_after: Option<String>,
    pub backup_every: Option<String>,
    pub full_every: Option<String>,
    pub max_rate: Option<String>,
    pub keep_last: Option<u32>,
    pub keep_within: Option<String>,
    pub keep_daily: Option<u32>,
    pub keep_weekly: Option<u32>,
    pub keep_monthly: Option<u32>,
    pub keep_yearly: Option<u32>,
    pub keep_points: Option<String>,
    pub prune_grace: Option<String>,
    pub also_to: Option<String>,
    pub also_every: Option<String>,
    pub drill_every: Option<String>,
    pub drill_in: Option<std::path::PathBuf>,
    pub drill_check: Vec<String>,
    pub verify_every: Option<String>,
    pub verify_sample: Option<String>,
    pub linger: Option<String>,
    pub in_flight: Option<u8>,
    pub heartbeat: Option<String>,
    pub grace: Option<String>,
    pub max_wal_behind: Option<String>,
    pub when_behind: Option<super::args::WhenBehindArg>,
    pub on_bucket_loss: Option<super::args::OnBucketLossArg>,
    pub bucket_loss_after: Option<String>,
    pub on_fenced: Option<String>,
    pub http: Option<String>,
    pub notices: Option<super::args::Platform>,
    pub pg_bindir: Option<std::path::PathBuf>,
    /// Where the age identity of an encrypted repository is: a file, or a command that prints it.
    pub identity_file: Option<std::path::PathBuf>,
    pub identity_command: Option<String>,
    /// How long a request to the store is tried before it is given up.
    pub patience: Option<String>,
    /// Directories beside the database, by name.
    pub with: std::collections::BTreeMap<String, std::path::PathBuf>,
    pub s3: S3,
}

/// `[s3]`: what the AWS variables of the same meaning say, for machines without them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3 {
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub profile: Option<String>,
    pub ca_bundle: Option<String>,
    pub virtual_hosted_style: Option<bool>,
    /// Of what we write.
    pub storage_class: Option<String>,
    /// How long the store is to keep it, and whether somebody may delete it all the same.
    pub lock: Option<String>,
    pub lock_mode: Option<String>,
    pub kms_key_id: Option<String>,
}

impl Config {
    pub fn load(named: Option<&Path>) -> Result<Config> {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match crate::disk::read_if_there(path)? {
            Some(bytes) => String::from_utf8(bytes).map_err(|_| std::io::Error::other("not UTF-8")).on("read", path)?,
            None if named.is_none() => return Ok(Config::default()),
            None => return Err(Error::usage(format!("the configuration file {} does not exist", path.display()))),
        };
        Config::parse(&text).map_err(|e| e.context(path.display()))
    }

    fn parse(text: &str) -> Result<Config> {
        toml::from_str(text).map_err(|e| {
            Error::usage(e.to_string().trim().to_owned()).hint("docs/reference/configuration.md lists the keys")
        })
    }
}

impl S3 {
    /// As the variables of the AWS tools; a secret has no place in this file.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let kms = self.kms_key_id.as_ref().map(|_| "aws:kms".to_owned());
        let pairs = [
            ("AWS_ENDPOINT_URL", self.endpoint.clone()),
            ("AWS_REGION", self.region.clone()),
            ("AWS_PROFILE", self.profile.clone()),
            ("AWS_CA_BUNDLE", self.ca_bundle.clone()),
            ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", self.virtual_hosted_style.map(|yes| yes.to_string())),
            ("AWS_SERVER_SIDE_ENCRYPTION", kms),
            ("AWS_SSE_KMS_KEY_ID", self.kms_key_id.clone()),
        ];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_key_is_an_error_that_names_it() {
        let config = Config::parse("repo = \"s3://b/db\"\n[s3]\nregion = \"eu-north-1\"\n").expect("fine");
        assert_eq!(config.s3.variables(), [("AWS_REGION", "eu-north-1".to_owned())]);
        let error = Config::parse("reppo = \"s3://b/db\"\n").expect_err("unknown key");
        assert!(error.to_string().contains("reppo"), "{error}");
    }
}
