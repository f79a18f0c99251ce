//! The repository's address from the instance itself: EC2 user data or a tag, through IMDSv2. So that identical images
//! need one launch parameter and no file.

use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// The tag (instance metadata tags must be allowed) and the line of user data that name the repository.
const TAG: &str = "perennial-repo";
const USER_DATA: &str = "PERENNIAL_REPO=";

/// The service is on the machine: a slow answer is no answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A session with the metadata service (IMDSv2).
pub(super) struct Metadata {
    client: reqwest::Client,
    endpoint: String,
    token: String,
}

impl Metadata {
    /// `endpoint` is `http://169.254.169.254` on EC2.
    pub async fn open(endpoint: &str) -> Result<Metadata> {
        let client = reqwest::Client::builder()
            .timeout(PATIENCE)
            .no_proxy()
            .build()
            .map_err(|e| Error::internal("no HTTP client").source(e))?;
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let token = client
            .put(format!("{endpoint}/latest/api/token"))
            .header("x-aws-ec2-metadata-token-ttl-seconds", "600")
            .send()
            .await
            .and_then(reqwest::Response::error_for_status)
            .map_err(|e| unreachable(&endpoint, e))?
            .text()
            .await
            .map_err(|e| unreachable(&endpoint, e))?;
        Ok(Metadata { client, endpoint, token })
    }

    /// The text at a path; `None` when the service says that there is none.
    pub async fn get(&self, path: &str) -> Result<Option<String>> {
        let request = self.client.get(format!("{}{path}", self.endpoint));
        let answer = request.header("x-aws-ec2-metadata-token", &self.token).send().await;
        let answer = answer.map_err(|e| unreachable(&self.endpoint, e))?;
        if answer.status() == reqwest::StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = answer.error_for_status().map_err(|e| unreachable(&self.endpoint, e))?;
        answer.text().await.map(Some).map_err(|e| unreachable(&self.endpoint, e))
    }
}

/// Asks the metadata service for the repository's address. `None` when it answers and knows nothing.
pub async fn address_from_metadata(endpoint: &str) -> Result<Option<String>> {
    let metadata = Metadata::open(endpoint).await?;
    if let Some(tag) = metadata.get("/latest/meta-data/tags/instance/perennial-repo").await? {
        return Ok(Some(tag.trim().to_owned()));
    }
    Ok(metadata.get("/latest/user-data").await?.and_then(|text| from_user_data(&text)))
}

/// The first line `PERENNIAL_REPO=…`, wherever it stands: user data may be a script, a cloud-config or just this.
fn from_user_data(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.trim().trim_start_matches("export ").strip_prefix(USER_DATA))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

fn unreachable(endpoint: &str, error: reqwest::Error) -> Error {
    Error::new(Kind::Unreachable, format!("the instance metadata service at {endpoint} did not answer"))
        .source(error)
        .hint(format!("name the repository as an argument or in PERENNIAL_REPO; on EC2, allow IMDSv2 and set the tag {TAG} or a line {USER_DATA}s3://… in the user data"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_in_any_kind_of_user_data() {
        for text in [
            "PERENNIAL_REPO=s3://b/db",
            "#!/bin/sh\nexport PERENNIAL_REPO='s3://b/db'\n",
            "#cloud-config\n  PERENNIAL_REPO=\"s3://b/db\"\n",
        ] {
            assert_eq!(from_user_data(text).as_deref(), Some("s3://b/db"), "{text:?}");
        }
        assert_eq!(from_user_data("nothing"), None);
        assert_eq!(from_user_data("PERENNIAL_REPO="), None);
    }
}
