//! S3 Object Lock: the store itself keeps what is written for a time, whoever asks it to delete that.
//!
//! object_store sends no headers for it, so they are added to the requests that carry a [`Hold`], which are signed again.
//! (Headers that go with every request would be sent unsigned, which S3 refuses.)

use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use crate::clock::Clock;
use crate::error::Error;
use crate::model::hex_bytes;

/// What is locked, and how.
#[derive(Debug, Clone, Copy)]
pub struct Lock {
    /// From when it is written.
    pub keep: Duration,
    pub mode: LockMode,
    /// Whether a key is of use for a short time only. Such objects are not locked: the store would keep them, and let itself
    /// be paid for that, long after they have gone.
    pub is_passing: fn(&str) -> bool,
}

/// Who may delete it all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LockMode {
    /// Whoever has the right `s3:BypassGovernanceRetention`.
    #[default]
    Governance,
    /// Nobody, the owner of the account included.
    Compliance,
}

impl FromStr for LockMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<LockMode, Error> {
        match text {
            "governance" => Ok(LockMode::Governance),
            "compliance" => Ok(LockMode::Compliance),
            _ => Err(Error::usage(format!("'{text}' is no mode of S3 Object Lock"))
                .hint("use governance (the default) or compliance")),
        }
    }
}

impl Lock {
    /// For an object that is written now; nothing for one that is not worth it.
    pub(super) fn hold(&self, key: &str, clock: &Clock) -> Option<Hold> {
        let until = clock.now().later_by(self.keep);
        (!(self.is_passing)(key)).then(|| Hold { mode: self.mode, until: until.short().replace(' ', "T") })
    }
}

/// Goes with a request that writes an object.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    mode: LockMode,
    until: String,
}

impl Hold {
    fn headers(&self) -> [(&'static str, &str); 2] {
        let mode = match self.mode {
            LockMode::Governance => "GOVERNANCE",
            LockMode::Compliance => "COMPLIANCE",
        };
        [("x-amz-object-lock-mode", mode), ("x-amz-object-lock-retain-until-date", &self.until)]
    }
}

/// The credentials of the store that is being made.
pub(super) type Credentials = Arc<OnceLock<AwsCredentialProvider>>;

/// Connects as the library does.
#[derive(Debug, Default)]
pub(super) struct Connector {
    pub credentials: Credentials,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Locking { inner, credentials: Arc::clone(&self.credentials) }))
    }
}

#[derive(Debug)]
struct Locking {
    inner: HttpClient,
    credentials: Credentials,
}

#[async_trait]
impl HttpService for Locking {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(hold) = request.extensions_mut().remove::<Hold>() {
            self.add(&mut request, &hold).await.map_err(|why| HttpError::new(HttpErrorKind::Request, why))?;
        }
        self.inner.execute(request).await
    }
}

impl Locking {
    async fn add(&self, request: &mut HttpRequest, hold: &Hold) -> Result<(), Unsigned> {
        for (name, value) in hold.headers() {
            request.headers_mut().insert(name, value.parse().map_err(|_| Unsigned("a date that no header takes"))?);
        }
        // A public bucket takes no locks from strangers; it says so itself.
        let Some(signed) = request.headers_mut().remove("authorization") else { return Ok(()) };
        let region = signed.to_str().ok().and_then(region_of).ok_or(Unsigned("a signature without a region"))?;
        let payload = request.headers_mut().remove("x-amz-content-sha256");
        // What is not signed says UNSIGNED-PAYLOAD there, instead of a hash.
        let payload = payload.as_ref().and_then(|value| value.to_str().ok()).and_then(hex_bytes::<32>);
        let provider = self.credentials.get().ok_or(Unsigned("no credentials"))?;
        let credential = provider.get_credential().await.map_err(|_| Unsigned("credentials that cannot be had"))?;
        let authorizer = AwsAuthorizer::new(&credential, "s3", &region).with_sign_payload(payload.is_some());
        let again = authorizer.try_authorize(request, payload.as_ref().map(<[u8; 32]>::as_slice));
        again.map_err(|_| Unsigned("a request that cannot be signed"))
    }
}

/// Why a request was not signed again.
#[derive(Debug)]
struct Unsigned(&'static str);

impl std::fmt::Display for Unsigned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no lock could be asked for: {}", self.0)
    }
}

impl std::error::Error for Unsigned {}

/// Of `AWS4-HMAC-SHA256 Credential=<key>/<day>/<region>/s3/aws4_request, …`.
fn region_of(authorization: &str) -> Option<String> {
    let scope = authorization.split_once("Credential=")?.1.split_once(',')?.0;
    // A key may have slashes in it.
    scope.rsplit('/').nth(2).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_signed_again_as_it_was_signed() {
        let signed =
            "AWS4-HMAC-SHA256 Credential=AK/ID/20261126/eu-north-1/s3/aws4_request, SignedHeaders=host, Signature=0";
        assert_eq!(region_of(signed).as_deref(), Some("eu-north-1"));
        assert_eq!(region_of("Bearer x"), None);
    }
}
