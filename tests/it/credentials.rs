//! Where credentials come from on the machines people use: each source as a stand-in, the store a real S3 server.

use perennial::storage::Created;

use crate::stores::{body, store_with_home};
use crate::support::*;

const ROLE_CREDENTIALS: &str = r#"{"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z",
    "AccessKeyId": "perennial", "SecretAccessKey": "perennial-secret", "Token": "", "Expiration": "2099-01-01T00:00:00Z"}"#;

/// A bucket on the test server without any key in the environment.
fn keyless(mut bucket: Bucket) -> Bucket {
    bucket.env.retain(|(name, _)| !name.contains("KEY"));
    bucket
}

/// An object can be written and read back with what the environment and the home directory say.
async fn works(bucket: &Bucket, home: Option<&std::path::Path>) {
    let store = store_with_home(&bucket.url, &bucket.env, home);
    assert_eq!(store.create("key", &body("write id 1")).await.expect("written"), Created::Now);
    assert_eq!(store.read("key", 0..100).await.expect("read").expect("there").bytes, "write id 1");
}

#[tokio::test]
async fn an_instance_role_through_imdsv2() {
    let service = Answering::with(|head| {
        let token = head.to_ascii_lowercase().contains("x-aws-ec2-metadata-token: t0ken");
        match head.split(' ').take(2).collect::<Vec<_>>()[..] {
            ["PUT", "/latest/api/token"] => ("200 OK", "t0ken".to_owned()),
            ["GET", "/latest/meta-data/iam/security-credentials/"] if token => ("200 OK", "the-role".to_owned()),
            ["GET", "/latest/meta-data/iam/security-credentials/the-role"] if token => {
                ("200 OK", ROLE_CREDENTIALS.to_owned())
            }
            _ => ("401 Unauthorized", String::new()),
        }
    });
    works(&keyless(Bucket::s3()).with_env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &service.endpoint), None).await;
}

#[tokio::test]
async fn a_task_role_of_ecs() {
    let service = Answering::with(|head| match head.starts_with("GET /task-credentials ") {
        true => ("200 OK", ROLE_CREDENTIALS.to_owned()),
        false => ("404 Not Found", String::new()),
    });
    let token = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(token.path(), "secret").expect("written");
    let uri = format!("{}/task-credentials", service.endpoint);
    let bucket = keyless(Bucket::s3())
        .with_env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &uri)
        .with_env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.path().to_str().expect("text"));
    works(&bucket, None).await;
}

#[tokio::test]
async fn a_web_identity_as_kubernetes_mounts_it() {
    let sts = Answering::with_tls(|head| {
        match head.contains("Action=AssumeRoleWithWebIdentity") {
        true => (
            "200 OK",
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>perennial</AccessKeyId>\
             <SecretAccessKey>perennial-secret</SecretAccessKey><SessionToken></SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>\
             </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
                .to_owned(),
        ),
        false => ("400 Bad Request", String::new()),
    }
    });
    let token = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(token.path(), "a.signed.token").expect("written");
    let bucket = keyless(Bucket::s3_tls())
        .with_env("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().to_str().expect("text"))
        .with_env("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/db")
        .with_env("AWS_ENDPOINT_URL_STS", &sts.endpoint);
    works(&bucket, None).await;
}

#[tokio::test]
async fn a_single_sign_on_session() {
    let portal = Answering::with(|head| {
        let asked = head.contains("role_name=Operator") && head.contains("account_id=123456789012");
        match asked && head.to_ascii_lowercase().contains("x-amz-sso_bearer_token: signed-on") {
            true => (
                "200 OK",
                r#"{"roleCredentials": {"accessKeyId": "perennial", "secretAccessKey": "perennial-secret", "sessionToken": "", "expiration": 4070908800000}}"#.to_owned(),
            ),
            false => ("401 Unauthorized", String::new()),
        }
    });
    let home = tempfile::tempdir().expect("a directory");
    std::fs::create_dir_all(home.path().join(".aws/sso/cache")).expect("made");
    let config = "[profile work]\nsso_session = company\nsso_account_id = 123456789012\nsso_role_name = Operator\n\n[sso-session company]\nsso_start_url = https://company.example/start\nsso_region = eu-north-1\n";
    std::fs::write(home.path().join(".aws/config"), config).expect("written");
    // The AWS tools name the file by the SHA-1 of the session's name.
    let token = home.path().join(".aws/sso/cache/71b21161ffa1e6516bcc072aaf5ef38cbe85b511.json");
    let content = r#"{"accessToken": "signed-on", "expiresAt": "2099-01-01T00:00:00Z"}"#;
    std::fs::write(token, content).expect("written");
    let bucket = keyless(Bucket::s3()).with_env("AWS_PROFILE", "work").with_env("AWS_SSO_ENDPOINT", &portal.endpoint);
    works(&bucket, Some(home.path())).await;
}
