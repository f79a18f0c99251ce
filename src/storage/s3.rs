//! S3 and what speaks its API: endpoint, region, credentials, checksums, storage class.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::{Certificate, ClientOptions};

use super::adapter::{Adapter, no_retries, unusable};
use super::credentials::{ProfileCredentials, profile_setting};
use super::location::Location;
use super::lock::{Connector, Lock};
use crate::clock::Clock;
use crate::error::{Error, IoContext, Result};

/// What the environment says of S3, handed in by `cli`.
#[derive(Debug, Clone, Default)]
pub struct S3Settings {
    /// Every `AWS_*` variable; names and meanings are those of the AWS command line.
    pub variables: BTreeMap<String, String>,
    pub home: Option<PathBuf>,
    /// The storage class of what we write; the bucket's default when `None`.
    pub storage_class: Option<String>,
    /// Whether, and for how long, the store is to keep what we write.
    pub lock: Option<Lock>,
}

/// Classes from which an object can be read at once; the others would make a restore wait for hours.
const READABLE_CLASSES: &[&str] = &[
    "STANDARD",
    "STANDARD_IA",
    "ONEZONE_IA",
    "INTELLIGENT_TIERING",
    "GLACIER_IR",
    "REDUCED_REDUNDANCY",
    "EXPRESS_ONEZONE",
];

impl S3Settings {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Profiles are asked when one is named, or when nothing more direct is set and there is a file of them.
    fn wants_profile(&self) -> bool {
        let direct = [
            "AWS_ACCESS_KEY_ID",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ];
        if self.get("AWS_PROFILE").is_some() {
            return true;
        }
        direct.iter().all(|name| self.get(name).is_none()) && self.profile_files().iter().any(|file| file.is_file())
    }

    pub(super) fn profile_files(&self) -> Vec<PathBuf> {
        let file = |variable: &str, name: &str| match (self.get(variable), &self.home) {
            (Some(path), _) => Some(PathBuf::from(path)),
            (None, Some(home)) => Some(home.join(".aws").join(name)),
            (None, None) => None,
        };
        [file("AWS_CONFIG_FILE", "config"), file("AWS_SHARED_CREDENTIALS_FILE", "credentials")]
            .into_iter()
            .flatten()
            .collect()
    }
}

pub(super) fn open(location: &Location, bucket: &str, settings: &S3Settings, clock: &Clock) -> Result<Adapter> {
    if let Some(class) = settings.storage_class.as_deref().filter(|class| !READABLE_CLASSES.contains(class)) {
        return Err(Error::usage(format!(
            "storage class {class} cannot be read at once, so nothing could be restored from it"
        ))
        .hint(format!("use one of {}", READABLE_CLASSES.join(", "))));
    }
    let mut builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(no_retries());
    for (name, value) in &settings.variables {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let profile = settings.wants_profile();
    let from_profile = |name: &str| if profile { profile_setting(settings, name) } else { None };
    let endpoint =
        ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].iter().find_map(|name| settings.get(name).map(str::to_owned));
    let endpoint = endpoint.or_else(|| from_profile("endpoint_url"));
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|name| settings.get(name).map(str::to_owned));
    if let Some(region) = region.or_else(|| from_profile("region")) {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = settings.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") {
        builder = builder.with_metadata_endpoint(endpoint.trim_end_matches('/'));
    }
    let plain_http = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
    }
    if plain_http {
        builder = builder.with_allow_http(true);
    } else {
        // TLS already protects the payload on its way; a checksum that the server verifies protects it to the disk,
        // at a twentieth of the cost of signing it.
        builder = builder.with_unsigned_payload(true);
    }
    // What is to be locked must have one.
    let is_required = settings.get("AWS_REQUEST_CHECKSUM_CALCULATION") == Some("when_required");
    let is_chosen = settings.get("AWS_CHECKSUM_ALGORITHM").is_some();
    if !is_chosen && (settings.lock.is_some() || !plain_http && !is_required) {
        builder = builder.with_checksum_algorithm(Checksum::CRC64NVME);
    }
    if profile {
        builder = builder.with_credentials(Arc::new(ProfileCredentials::new(settings)?));
    }
    let connector = Connector::default();
    let credentials = Arc::clone(&connector.credentials);
    if settings.lock.is_some() {
        builder = builder.with_http_connector(connector);
    }
    let inner = builder
        .with_client_options(client_options(settings, plain_http)?)
        .build()
        .map_err(|e| unusable(location, &e))?;
    credentials.get_or_init(|| Arc::clone(inner.credentials()));
    let adapter = Adapter::remote(Arc::new(inner), location, settings.storage_class.clone());
    Ok(match settings.lock {
        Some(lock) => adapter.locking(lock, clock),
        None => adapter,
    })
}

fn client_options(settings: &S3Settings, plain_http: bool) -> Result<ClientOptions> {
    let mut options = super::adapter::client_options().with_allow_http(plain_http);
    if let Some(path) = settings.get("AWS_CA_BUNDLE") {
        let pem = std::fs::read(path).on("read AWS_CA_BUNDLE", path)?;
        let certificates = Certificate::from_pem_bundle(&pem)
            .map_err(|e| Error::usage(format!("AWS_CA_BUNDLE {path} holds no certificates: {e}")))?;
        // As with the AWS command line, the bundle replaces the system's authorities.
        options = certificates
            .into_iter()
            .fold(options.with_no_system_certificates(true), ClientOptions::with_root_certificate);
    }
    Ok(options)
}
