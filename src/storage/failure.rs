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
        Raw::AlreadyExists { .. } if local => return Meaning::Taken,
        Raw::NotFound { .. } if says(&text, &["NoSuchBucket", "ContainerNotFound"]) => {
            return Meaning::Failed(
                Error::not_found(format!("{url}: the bucket does not exist"))
                    .hint("check the bucket's name in the URL; Perennial never creates buckets"),
            );
        }
        Raw::NotFound { .. } if says(&text, &["NoSuchKey", "BlobNotFound"]) => return Meaning::Absent,
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

fn failure(text: &str, url: &str) -> Error {
    const TABLE: &[(&[&str], Kind, &str, &str)] = &[
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
            &[
                "AccessDenied",
                "AllAccessDisabled",
                "AuthorizationPermissionMismatch",
                "status code: 403",
                "status code: 401",
            ],
            Kind::Denied,
            "access is denied",
            "allow s3:GetObject, s3:PutObject, s3:ListBucket and s3:DeleteObject on the bucket to these credentials",
        ),
        (
            &[
                "169.254.169.254",
                "169.254.170.2",
                "latest/api/token",
                "AssumeRoleWithWebIdentity",
                "credential",
                "Credential",
            ],
            Kind::Denied,
            "no usable credentials were found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the instance a role",
        ),
        (
            &["NoSuchBucket", "ContainerNotFound"],
            Kind::NotFound,
            "the bucket does not exist",
            "check the bucket's name in the URL; Perennial never creates buckets",
        ),
        (
            &["UnknownIssuer", "invalid peer certificate", "CertificateUnknown", "certificate"],
            Kind::Unreachable,
            "the store's TLS certificate is not trusted",
            "name the file of its certificate authority in AWS_CA_BUNDLE",
        ),
    ];
    for (codes, kind, message, hint) in TABLE {
        if says(text, codes) {
            return Error::new(*kind, format!("{url}: {message}: {}", brief(text))).hint(*hint);
        }
    }
    let transient = [
        "status code: 5",
        "status code: 429",
        "status code: 408",
        "status code: 409",
        "SlowDown",
        "InternalError",
        "error response",
    ];
    if says(text, &transient) {
        return Error::new(Kind::Unreachable, format!("{url}: the store answered that it cannot now: {}", brief(text)))
            .hint("the store is overloaded or failing; run the command again later")
            .retryable();
    }
    if text.contains("status code:") {
        return Error::new(Kind::Refused, format!("{url}: the store refused the request: {}", brief(text)));
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
        ] {
            let error = failure(&text, "s3://b/k");
            assert_eq!((error.kind(), error.is_retryable()), (kind, retryable), "{text}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }
}
