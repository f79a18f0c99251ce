//! S3 Object Lock: the store itself keeps what is written for a time, whoever asks it to delete that.
//!
//! object_store sends no headers for it, so they are added to the requests that carry a [`Hold`], which are signed again.
//! (Headers that go with every request would be sent unsigned, which S3 refuses.)

use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::digest::{SHA256, digest};
use base64::prelude::{BASE64_STANDARD, Engine};
use http::HeaderValue;
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpService, ReqwestConnector,
};

use crate::clock::Clock;
use crate::error::Error;
use crate::model::{Timestamp, hex_bytes};

const MODE: &str = "x-amz-object-lock-mode";
const UNTIL: &str = "x-amz-object-lock-retain-until-date";

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
    /// Whether all that the last backup needs stays locked, when backups are taken and now and then full ones (zero: never): a
    /// full one may begin up to a period late, and is not done at once.
    pub fn outlasts(&self, backup_every: Duration, full_every: Duration) -> bool {
        !full_every.is_zero() && self.keep >= full_every.saturating_add(backup_every * 2)
    }

    /// For an object that is written now; nothing for one that is not worth it.
    pub(super) fn hold(&self, key: &str, clock: &Clock) -> Option<Hold> {
        let until = clock.now().later_by(self.keep);
        (!(self.is_passing)(key)).then(|| Hold { mode: self.mode, until: as_s3(until) })
    }

    /// For one that is there.
    pub(super) fn renewal(&self, key: &str, clock: &Clock) -> Option<Renewal> {
        let (now, enough) = (clock.now(), clock.now().later_by(self.keep / 4 * 3));
        self.hold(key, clock).map(|hold| Renewal { hold, now: as_s3(now), enough: as_s3(enough) })
    }
}

fn as_s3(time: Timestamp) -> String {
    time.short().replace(' ', "T")
}

/// Goes with a request for the head of an object, and says then whether it is locked.
#[derive(Debug, Clone, Default)]
pub(super) struct Look(pub Arc<OnceLock<()>>);

/// Goes with a request that writes an object.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    mode: LockMode,
    until: String,
}

impl Hold {
    fn mode(&self) -> &'static str {
        match self.mode {
            LockMode::Governance => "GOVERNANCE",
            LockMode::Compliance => "COMPLIANCE",
        }
    }

    fn headers(&self) -> [(&'static str, &str); 2] {
        [(MODE, self.mode()), (UNTIL, &self.until)]
    }
}

/// Goes with a request for the head of an object whose lock is to last as long, if it does not already.
#[derive(Debug, Clone)]
pub(super) struct Renewal {
    hold: Hold,
    now: String,
    /// One that lasts until then is left alone.
    enough: String,
}

impl Renewal {
    /// What is asked for beyond what the object's head says it has; nothing when that lasts.
    fn beyond(self, head: &HttpResponse) -> Option<String> {
        let Renewal { hold: Hold { until, .. }, now, enough } = &self;
        let held = header_of(head, UNTIL);
        // The part of both that is a time of the same form.
        let outlasts = |time: &str| held.is_some_and(|held| held.get(..19) >= time.get(..19));
        // While a lock lasts its mode is not changed: for that the right to get around it is needed.
        let mode = header_of(head, MODE).filter(|_| outlasts(now)).unwrap_or(self.hold.mode());
        (!outlasts(enough)).then(|| {
            format!("<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>")
        })
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
            self.add(&mut request, &hold).await.map_err(refused)?;
        }
        if let Some(renewal) = request.extensions_mut().remove::<Renewal>() {
            return self.renew(request, renewal).await;
        }
        let look = request.extensions_mut().remove::<Look>();
        let answer = self.inner.execute(request).await?;
        if let (Some(Look(is_locked)), Some(_)) = (look, header_of(&answer, UNTIL)) {
            is_locked.get_or_init(|| ());
        }
        Ok(answer)
    }
}

fn header_of<'a>(answer: &'a HttpResponse, name: &str) -> Option<&'a str> {
    answer.headers().get(name).and_then(|value| value.to_str().ok())
}

fn header(value: &str) -> Result<HeaderValue, Unsigned> {
    value.parse().map_err(unsigned)
}

fn unsigned(why: impl std::fmt::Display) -> Unsigned {
    Unsigned(why.to_string())
}

fn refused(why: Unsigned) -> HttpError {
    HttpError::new(HttpErrorKind::Request, why)
}

impl Locking {
    /// Answers as the request for the head did; or, where the store refuses the lock, as that refusal.
    async fn renew(&self, request: HttpRequest, renewal: Renewal) -> Result<HttpResponse, HttpError> {
        let (uri, signed) = (request.uri().clone(), request.headers().get("authorization").cloned());
        let head = self.inner.execute(request).await?;
        let (Some(retention), Some(signed), true) = (renewal.beyond(&head), signed, head.status().is_success()) else {
            return Ok(head);
        };
        let sha256 = digest(&SHA256, retention.as_bytes());
        let mut put = HttpRequest::new(HttpRequestBody::from(retention.into_bytes()));
        *put.method_mut() = "PUT".parse().map_err(unsigned).map_err(refused)?;
        *put.uri_mut() = format!("{uri}?retention").parse().map_err(unsigned).map_err(refused)?;
        let checksum = header(&BASE64_STANDARD.encode(sha256.as_ref())).map_err(refused)?;
        put.headers_mut().insert("x-amz-checksum-sha256", checksum);
        self.sign(&mut put, &signed, Some(sha256.as_ref())).await.map_err(refused)?;
        let answer = self.inner.execute(put).await?;
        Ok(if answer.status().is_success() { head } else { answer })
    }

    async fn add(&self, request: &mut HttpRequest, hold: &Hold) -> Result<(), Unsigned> {
        for (name, value) in hold.headers() {
            request.headers_mut().insert(name, header(value)?);
        }
        // A public bucket takes no locks from strangers; it says so itself.
        let Some(signed) = request.headers_mut().remove("authorization") else { return Ok(()) };
        let payload = request.headers_mut().remove("x-amz-content-sha256");
        // What is not signed says UNSIGNED-PAYLOAD there, instead of a hash.
        let payload = payload.as_ref().and_then(|value| value.to_str().ok()).and_then(hex_bytes::<32>);
        self.sign(request, &signed, payload.as_ref().map(<[u8; 32]>::as_slice)).await
    }

    /// Signs a request for where another one was signed for.
    async fn sign(
        &self,
        request: &mut HttpRequest,
        as_this: &HeaderValue,
        sha256: Option<&[u8]>,
    ) -> Result<(), Unsigned> {
        let region =
            as_this.to_str().ok().and_then(region_of).ok_or(Unsigned("a signature without a region".to_owned()))?;
        let provider = self.credentials.get().ok_or(Unsigned("no credentials".to_owned()))?;
        let credential =
            provider.get_credential().await.map_err(|e| Unsigned(format!("credentials cannot be had: {e}")))?;
        let authorizer = AwsAuthorizer::new(&credential, "s3", &region).with_sign_payload(sha256.is_some());
        let signed = authorizer.try_authorize(request, sha256);
        signed.map_err(|e| Unsigned(format!("the request cannot be signed: {e}")))
    }
}

/// Why a request was not signed again.
#[derive(Debug)]
struct Unsigned(String);

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
    fn a_lock_outlasts_what_is_stored_anew_in_time() {
        let day = |days: u64| Duration::from_secs(86_400 * days);
        let lock = Lock { keep: day(30), mode: LockMode::default(), is_passing: |_| false };
        assert!(lock.outlasts(day(1), day(28)));
        assert!(!lock.outlasts(day(1), day(29)));
        assert!(!lock.outlasts(day(1), Duration::ZERO), "never a full one");
    }

    #[test]
    fn a_request_is_signed_again_as_it_was_signed() {
        let signed =
            "AWS4-HMAC-SHA256 Credential=AK/ID/20261126/eu-north-1/s3/aws4_request, SignedHeaders=host, Signature=0";
        assert_eq!(region_of(signed).as_deref(), Some("eu-north-1"));
        assert_eq!(region_of("Bearer x"), None);
    }
}
