//! What a store's refusal means: absent, taken, try again, or one of the errors an operator can act on.
//!
//! The library gives status and body as text; the codes are those of the S3 API (Error Responses), GCS's XML API and
//! Azure Blob Storage.

use object_store::Error as Raw;

use crate::error::{Error, Kind};

/// How the library's error is to be taken.
#[derive(Debug)]
pub(super) enum Meaning {
    /// The store said, in so many words, that there is no such object.
    Absent,
    /// A conditional write was refused because the key is taken.
    Taken,
    Failed(Error),
}

/// Reads an error of a request to `url`. `local` stores (files, memory) say what they mean by the error's type alone.
pub(super) fn meaning(raw: Raw, url: &str, local: bool) -> Meaning {
    let text = full_text(&raw);
    match &raw {
        Raw::NotFound { .. } if local => return Meaning::Absent,
        // EPERM, EACCES, EROFS.
        Raw::Generic { .. } if local && says(&text, &["(os error 1)", "(os error 13)", "(os error 30)"]) => {
            let error = Error::new(Kind::Denied, format!("{url}: access is denied: {}", brief(&text)));
            return Meaning::Failed(error.hint("let the user that runs perennial write to the directory"));
        }
        Raw::AlreadyExists { .. } if local => return Meaning::Taken,
        Raw::NotFound { .. } if says(&text, &["NoSuchBucket", "ContainerNotFound"]) => {
            return Meaning::Failed(
                Error::not_found(format!("{url}: the bucket does not exist"))
                    .hint("check the bucket's name in the URL; Perennial never creates buckets"),
            );
        }
        Raw::NotFound { .. } if says(&text, &["NoSuchKey", "BlobNotFound", "The specified blob does not exist"]) => {
            return Meaning::Absent;
        }
        // A proxy's or a wrong server's 404 says nothing about the object.
        Raw::NotFound { .. } => {
            return Meaning::Failed(
                Error::new(
                    Kind::Unreachable,
                    format!("{url}: got 404 without the store's own word that the object is absent: {}", brief(&text)),
                )
                .hint("check that the endpoint is the object store itself"),
            );
        }
        Raw::AlreadyExists { .. }
            if !says(&text, &["ConditionalRequestConflict", "OperationAborted"]) && !is_bare_409(&text) =>
        {
            return Meaning::Taken;
        }
        _ => (),
    }
    Meaning::Failed(failure(&text, url))
}

/// S3 answers 409 when two conditional writes of one key overlap: neither yes nor no. Azure's 409 has a code.
fn is_bare_409(text: &str) -> bool {
    text.contains("status code: 409") && !says(text, &["BlobAlreadyExists"])
}

/// What a failed request said: the address it went to apart from the words, because a bucket may be called anything.
struct Said {
    /// Whether credentials were asked for, not the store.
    of_credentials: bool,
    status: Option<u16>,
    words: String,
}

/// Parts of the addresses that hand out credentials: EC2, ECS and EKS, STS.
const CREDENTIAL_SOURCES: &[&str] = &[
    "http://169.254.169.254",
    "http://169.254.170.2",
    "/latest/api/token",
    "/latest/meta-data/iam",
    "Action=AssumeRole",
];

impl Said {
    /// The library writes "Error performing GET http://… in 1ms - Server returned non-2xx status code: 404 Not Found: …".
    fn read(text: &str) -> Said {
        let request = text.split_once("Error performing ").and_then(|(before, rest)| {
            let (request, after) = rest.split_once(" in ")?;
            Some((request, format!("{before}{after}")))
        });
        let (request, words) = request.unwrap_or(("", text.to_owned()));
        let status = words.split_once("status code: ").and_then(|(_, rest)| rest.get(..3)?.parse().ok());
        let profile = words.contains(NO_PROFILE_CREDENTIAL);
        Said { of_credentials: profile || says(request, CREDENTIAL_SOURCES), status, words }
    }

    fn is_transient(&self) -> bool {
        const WORDS: &[&str] = &["SlowDown", "InternalError", "Server returned error response"];
        matches!(self.status, Some(408 | 409 | 429 | 500..)) || (self.status.is_none() && says(&self.words, WORDS))
    }
}

/// What an error of a profile's credentials starts with.
pub(super) const NO_PROFILE_CREDENTIAL: &str = "no credential from AWS profile";

/// What stores call it when a lock keeps an object (GCS; Azure, whose status for it is 409; R2 and MinIO; S3 of one version).
const LOCKED: &[&str] = &[
    "retentionPolicyNotMet",
    "RetentionPolicyNotMet",
    "ObjectUnderActiveHold",
    "BlobImmutableDueToPolicy",
    "ObjectLocked",
    "protected by object lock",
    "WORM protected",
];

/// What the store's own codes mean to an operator, told by status and code.
const TABLE: &[(&[&str], Kind, &str, &str)] = &[
    (
        LOCKED,
        Kind::Denied,
        "a retention policy or a hold keeps the object",
        "it can go once its retention is over or the hold was taken away",
    ),
    (
        &["ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"],
        Kind::Denied,
        "the credentials have expired",
        "renew them (`aws sso login` for SSO) and run the command again",
    ),
    (
        &["RequestTimeTooSkewed"],
        Kind::Denied,
        "this machine's clock is too far from the store's",
        "set the clock (`timedatectl set-ntp true`) and run the command again",
    ),
    (
        &[
            "AuthorizationHeaderMalformed",
            "PermanentRedirect",
            "IllegalLocationConstraint",
            "incorrectly configured region",
        ],
        Kind::Refused,
        "the bucket is in another region",
        "set AWS_REGION to the bucket's region (`aws s3api get-bucket-location --bucket NAME`)",
    ),
    (
        &["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "NoSuchKey: The specified access key"],
        Kind::Denied,
        "the store does not accept these credentials",
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile named by AWS_PROFILE",
    ),
    (
        &["KMS.", "kms:"],
        Kind::Denied,
        "the KMS key cannot be used",
        "allow kms:GenerateDataKey and kms:Decrypt on the key to these credentials",
    ),
    (
        &["AccessDenied", "AllAccessDisabled", "AuthorizationPermissionMismatch", "code: 403", "code: 401"],
        Kind::Denied,
        "access is denied",
        "allow s3:GetObject, s3:PutObject, s3:ListBucket and s3:DeleteObject on the bucket to these credentials",
    ),
    (
        &["NoSuchBucket", "ContainerNotFound"],
        Kind::NotFound,
        "the bucket does not exist",
        "check the bucket's name in the URL; Perennial never creates buckets",
    ),
];

fn failure(text: &str, url: &str) -> Error {
    let said = Said::read(text);
    let locked = says(&said.words, LOCKED);
    if said.of_credentials && !said.is_transient() {
        let message = format!("{url}: no usable credentials were found: {}", brief(text));
        return Error::new(Kind::Denied, message)
            .hint("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the instance a role");
    }
    if said.is_transient() && !locked {
        return Error::new(Kind::Unreachable, format!("{url}: the store answered that it cannot now: {}", brief(text)))
            .hint("the store is overloaded or failing; run the command again later")
            .retryable();
    }
    for (codes, kind, message, hint) in TABLE {
        if says(&said.words, codes) {
            return Error::new(*kind, format!("{url}: {message}: {}", brief(text))).hint(*hint);
        }
    }
    if said.status.is_some() {
        return Error::new(Kind::Refused, format!("{url}: the store refused the request: {}", brief(text)));
    }
    if says(&said.words, &["UnknownIssuer", "invalid peer certificate", "CertificateUnknown"]) {
        let message = format!("{url}: the store's TLS certificate is not trusted: {}", brief(text));
        return Error::new(Kind::Unreachable, message)
            .hint("name the file of its certificate authority in AWS_CA_BUNDLE");
    }
    Error::new(Kind::Unreachable, format!("{url}: the store cannot be reached: {}", brief(text)))
        .hint("check the endpoint (AWS_ENDPOINT_URL) and the network between this machine and the store")
        .retryable()
}

fn says(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.contains(word))
}

fn full_text(raw: &Raw) -> String {
    let mut text = raw.to_string();
    let mut cause = std::error::Error::source(raw);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// The store's own code and message when it gave them; otherwise the end of the text, where the cause is.
fn brief(text: &str) -> String {
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(value, _)| value.trim().to_owned())
    };
    match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => {
            let line = text.replace(['\n', '\r'], " ");
            let count = line.chars().count();
            line.chars().skip(count.saturating_sub(300)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(status: &str, body: &str) -> String {
        format!(
            "Generic S3 error: Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code: {status}: {body}"
        )
    }

    fn not_found(body: &str) -> Raw {
        Raw::NotFound { path: "k".into(), source: raw("404 Not Found", body).into() }
    }

    #[test]
    fn only_the_stores_own_word_is_absence() {
        let absent = not_found("<Error><Code>NoSuchKey</Code></Error>");
        assert!(matches!(meaning(absent, "s3://b/k", false), Meaning::Absent));
        let Meaning::Failed(e) = meaning(not_found("<html>nginx</html>"), "s3://b/k", false) else {
            panic!("taken for absent")
        };
        assert_eq!(e.kind(), Kind::Unreachable);
        let Meaning::Failed(e) = meaning(not_found("<Error><Code>NoSuchBucket</Code></Error>"), "s3://b/k", false)
        else {
            panic!("taken for absent")
        };
        assert_eq!(e.kind(), Kind::NotFound);
    }

    #[test]
    fn a_conflict_is_a_retry_and_a_failed_condition_an_answer() {
        let taken = |text: String| Raw::AlreadyExists { path: "k".into(), source: text.into() };
        let answer = meaning(
            taken(raw("412 Precondition Failed", "<Error><Code>PreconditionFailed</Code></Error>")),
            "u",
            false,
        );
        assert!(matches!(answer, Meaning::Taken));
        let Meaning::Failed(e) =
            meaning(taken(raw("409 Conflict", "<Error><Code>ConditionalRequestConflict</Code></Error>")), "u", false)
        else {
            panic!("409 taken for an answer")
        };
        assert!(e.is_retryable());
        let azure = meaning(taken(raw("409 Conflict", "<Error><Code>BlobAlreadyExists</Code></Error>")), "u", false);
        assert!(matches!(azure, Meaning::Taken));
    }

    #[test]
    fn each_refusal_has_its_kind_and_a_next_step() {
        for (text, kind, retryable) in [
            (raw("400 Bad Request", "<Error><Code>ExpiredToken</Code></Error>"), Kind::Denied, false),
            (
                raw("403 Forbidden", "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
                Kind::Denied,
                false,
            ),
            (raw("301 Moved", "<Error><Code>PermanentRedirect</Code></Error>"), Kind::Refused, false),
            (raw("503 Slow Down", "<Error><Code>SlowDown</Code></Error>"), Kind::Unreachable, true),
            ("error sending request: tcp connect error: Connection refused".to_owned(), Kind::Unreachable, true),
            ("invalid peer certificate: UnknownIssuer".to_owned(), Kind::Unreachable, false),
            // Names that are words of other rules; and a metadata service that cannot now.
            (
                "Generic S3 error: Error performing PUT https://s3/credential-certificate/AccessDenied in 1ms - Server returned non-2xx status code: 503 Busy: <x/>".to_owned(),
                Kind::Unreachable,
                true,
            ),
            (
                "Generic S3 error: Error performing GET https://s3/169.254.169.254-dumps/certificate in 1ms - HTTP error: connection reset".to_owned(),
                Kind::Unreachable,
                true,
            ),
            (
                "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - Server returned non-2xx status code: 503 Busy".to_owned(),
                Kind::Unreachable,
                true,
            ),
            (
                "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - HTTP error: error sending request".to_owned(),
                Kind::Denied,
                false,
            ),
            // Locked objects: Azure's is a conflict by its status, Google's a refusal; S3 says it within a list of results.
            (
                raw("409 Conflict", "<Error><Code>BlobImmutableDueToPolicy</Code><Message>immutable</Message></Error>"),
                Kind::Denied,
                false,
            ),
            (raw("403 Forbidden", "{\"reason\": \"retentionPolicyNotMet\"}"), Kind::Denied, false),
            (
                "Generic S3 error: Failed to delete object k: Access Denied because object protected by object lock. (code: AccessDenied)".to_owned(),
                Kind::Denied,
                false,
            ),
            ("Generic S3 error: no credential from AWS profile 'x': nothing".to_owned(), Kind::Denied, false),
        ] {
            let error = failure(&text, "s3://b/k");
            assert_eq!((error.kind(), error.is_retryable()), (kind, retryable), "{text}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }
}
