//! AWS profiles: static keys, assumed roles, SSO and credential processes of `~/.aws`, by the reqsign library.
//!
//! Environment keys, IMDSv2, ECS and web identity are the object-store library's own and do not come this way.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use reqsign_aws_core::{Credential, DefaultCredentialProvider, SSOCredentialProvider};
use reqsign_core::{
    CommandExecute, CommandOutput, Context, Error as SignError, FileRead, HttpSend, ProvideCredential, StaticEnv,
};

use super::failure::NO_PROFILE_CREDENTIAL;
use super::s3::S3Settings;
use crate::error::{Error, Result};

/// Credentials are fetched anew this long before they end, and no less often than that when they do not say.
const REFRESH_AHEAD: Duration = Duration::from_secs(300);

/// The credentials of a profile, refreshed before they expire.
#[derive(Debug)]
pub(super) struct ProfileCredentials {
    provider: DefaultCredentialProvider,
    context: Context,
    profile: String,
    cached: tokio::sync::Mutex<Option<(Arc<AwsCredential>, Option<reqsign_core::time::Timestamp>)>>,
}

impl ProfileCredentials {
    pub(super) fn new(settings: &S3Settings) -> Result<ProfileCredentials> {
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(20))
            .build()
            .map_err(|e| Error::internal("no HTTP client for credentials").source(e))?;
        let env = StaticEnv { home_dir: settings.home.clone(), envs: settings.variables.clone().into_iter().collect() };
        let context = Context::new()
            .with_file_read(Files)
            .with_http_send(Http(client))
            .with_env(env)
            .with_command_execute(Commands);
        let profile = settings.get("AWS_PROFILE").unwrap_or("default").to_owned();
        let mut provider = DefaultCredentialProvider::builder().no_env().no_web_identity().no_ecs().no_imds();
        if let Some(sso) = sso_session(settings) {
            provider = provider.sso(sso);
        }
        let provider = provider.build();
        Ok(ProfileCredentials { provider, context, profile, cached: tokio::sync::Mutex::new(None) })
    }
}

#[async_trait]
impl CredentialProvider for ProfileCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut cached = self.cached.lock().await;
        if let Some((credential, ends)) = cached.as_ref()
            && ends.is_none_or(|ends| ends > reqsign_core::time::Timestamp::now() + REFRESH_AHEAD)
        {
            return Ok(Arc::clone(credential));
        }
        let failed = |why: String| object_store::Error::Generic {
            store: "S3",
            source: format!("{NO_PROFILE_CREDENTIAL} '{}': {why}", self.profile).into(),
        };
        let found = self.provider.provide_credential(&self.context).await.map_err(|e| failed(e.to_string()))?;
        let Some(Credential { access_key_id, secret_access_key, session_token, expires_in }) = found else {
            return Err(failed("the profile has no keys, role, SSO session or credential process".to_owned()));
        };
        let credential =
            Arc::new(AwsCredential { key_id: access_key_id, secret_key: secret_access_key, token: session_token });
        *cached = Some((Arc::clone(&credential), expires_in));
        Ok(credential)
    }
}

/// A setting of the chosen profile (`region`, `endpoint_url`), which the AWS tools honour too.
pub(super) fn profile_setting(settings: &S3Settings, name: &str) -> Option<String> {
    let profile = settings.get("AWS_PROFILE").unwrap_or("default");
    section_setting(settings, &[format!("[{profile}]"), format!("[profile {profile}]")], name)
}

fn section_setting(settings: &S3Settings, headers: &[String], name: &str) -> Option<String> {
    settings.profile_files().iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        let section = text.lines().map(str::trim).skip_while(|line| !headers.iter().any(|header| header == line));
        let mut pairs =
            section.skip(1).take_while(|line| !line.starts_with('[')).filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    })
}

/// A profile that names an `sso-session`, as `aws configure sso` writes today; the library reads the older form only.
/// What it calls the start URL names the cached token's file, and for a session that is the session's name.
fn sso_session(settings: &S3Settings) -> Option<SSOCredentialProvider> {
    let session = profile_setting(settings, "sso_session")?;
    let region = section_setting(settings, &[format!("[sso-session {session}]")], "sso_region")?;
    let provider = SSOCredentialProvider::new()
        .with_account_id(profile_setting(settings, "sso_account_id")?)
        .with_role_name(profile_setting(settings, "sso_role_name")?)
        .with_region(region)
        .with_start_url(session);
    Some(provider)
}

#[derive(Debug)]
struct Files;

impl FileRead for Files {
    async fn file_read(&self, path: &str) -> reqsign_core::Result<Vec<u8>> {
        std::fs::read(path).map_err(|e| SignError::config_invalid(format!("could not read {path}: {e}")))
    }
}

#[derive(Debug)]
struct Http(reqwest::Client);

impl HttpSend for Http {
    async fn http_send(&self, request: http::Request<Bytes>) -> reqsign_core::Result<http::Response<Bytes>> {
        let failed = |e: reqwest::Error| SignError::unexpected("credential request failed").with_source(e);
        let request = reqwest::Request::try_from(request).map_err(failed)?;
        let answer = self.0.execute(request).await.map_err(failed)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut response = http::Response::new(answer.bytes().await.map_err(failed)?);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

/// Runs the `credential_process` of a profile.
#[derive(Debug)]
struct Commands;

impl CommandExecute for Commands {
    async fn command_execute<'a>(
        &'a self,
        program: &'a str,
        args: &'a [&'a str],
    ) -> reqsign_core::Result<CommandOutput> {
        let output = tokio::process::Command::new(program)
            .args(args)
            .output()
            .await
            .map_err(|e| SignError::config_invalid(format!("could not run {program}: {e}")))?;
        Ok(CommandOutput { status: output.status.code().unwrap_or(-1), stdout: output.stdout, stderr: output.stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn home_with(config: &str) -> (tempfile::TempDir, S3Settings) {
        let home = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(home.path().join(".aws")).expect("made");
        std::fs::write(home.path().join(".aws/config"), config).expect("written");
        let variables = BTreeMap::from([("AWS_PROFILE".to_owned(), "work".to_owned())]);
        let settings = S3Settings { variables, home: Some(home.path().to_owned()), storage_class: None, lock: None };
        (home, settings)
    }

    #[test]
    fn a_profile_brings_its_region_and_endpoint() {
        let (_home, settings) = home_with(
            "[default]\nregion = us-west-2\n\n[profile work]\nregion = eu-north-1\nendpoint_url = https://s3.example\n[profile other]\nregion = x\n",
        );
        assert_eq!(profile_setting(&settings, "region").as_deref(), Some("eu-north-1"));
        assert_eq!(profile_setting(&settings, "endpoint_url").as_deref(), Some("https://s3.example"));
        assert_eq!(profile_setting(&settings, "nothing"), None);
    }

    #[tokio::test]
    async fn a_profile_with_a_credential_process_gives_its_keys() {
        let (home, settings) = home_with("");
        let script = home.path().join("keys.sh");
        std::fs::write(&script, "#!/bin/sh\necho '{\"Version\":1,\"AccessKeyId\":\"AK\",\"SecretAccessKey\":\"SK\",\"SessionToken\":\"T\"}'\n").expect("written");
        let config = format!("[profile work]\ncredential_process = sh {}\n", script.display());
        std::fs::write(home.path().join(".aws/config"), config).expect("written");
        let credentials = ProfileCredentials::new(&settings).expect("made");
        let found = credentials.get_credential().await.expect("keys");
        assert_eq!((found.key_id.as_str(), found.secret_key.as_str(), found.token.as_deref()), ("AK", "SK", Some("T")));
    }

    #[tokio::test]
    async fn an_unknown_profile_is_named() {
        let (_home, settings) = home_with("[profile other]\n");
        let error = ProfileCredentials::new(&settings).expect("made").get_credential().await.expect_err("no keys");
        assert!(error.to_string().contains("'work'"), "{error}");
    }
}
