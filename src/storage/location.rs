//! The address of a repository: `s3://bucket/prefix` and its kin.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scheme {
    S3 {
        bucket: String,
    },
    Google {
        bucket: String,
    },
    Azure {
        container: String,
    },
    File {
        directory: PathBuf,
    },
    /// For tests: gone with the process.
    Memory,
}

/// Where a repository is. Two spellings of one place print alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub scheme: Scheme,
    /// Without slashes at its ends; empty for the whole bucket, and always for `file:` (the directory is the prefix).
    pub prefix: String,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scheme {
            Scheme::S3 { bucket } => write!(f, "s3://{bucket}")?,
            Scheme::Google { bucket } => write!(f, "gs://{bucket}")?,
            Scheme::Azure { container } => write!(f, "az://{container}")?,
            Scheme::File { directory } => write!(f, "file://{}", directory.display())?,
            Scheme::Memory => write!(f, "memory://")?,
        }
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Location, Error> {
        let refuse = |why: &str| {
            Error::usage(format!("'{text}' is not the address of a repository: {why}"))
                .hint("use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///directory")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| refuse("it has no scheme"))?;
        if scheme == "file" {
            if !rest.starts_with('/') {
                return Err(refuse("a file URL needs an absolute path, so three slashes"));
            }
            let directory = PathBuf::from(rest.trim_end_matches('/'));
            return Ok(Location { scheme: Scheme::File { directory }, prefix: String::new() });
        }
        if rest.contains(['?', '#']) {
            return Err(refuse("options such as ?region= belong in the environment or the config file"));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/').to_owned();
        if prefix.split('/').any(|part| part.is_empty() || part == "." || part == "..") && !prefix.is_empty() {
            return Err(refuse("the prefix has an empty part, a '.' or a '..'"));
        }
        if scheme == "memory" {
            return Ok(Location { scheme: Scheme::Memory, prefix });
        }
        if bucket.is_empty() || bucket.contains('@') {
            return Err(refuse("it names no bucket"));
        }
        let bucket = bucket.to_owned();
        let scheme = match scheme {
            "s3" => Scheme::S3 { bucket },
            "gs" => Scheme::Google { bucket },
            "az" | "azure" => Scheme::Azure { container: bucket },
            other => return Err(refuse(&format!("'{other}' is not a store we know"))),
        };
        Ok(Location { scheme, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_one_spelling() {
        for (text, spelled) in [
            ("s3://bucket/db", "s3://bucket/db"),
            ("s3://bucket/db/", "s3://bucket/db"),
            ("s3://bucket", "s3://bucket"),
            ("gs://b/a/b/c", "gs://b/a/b/c"),
            ("azure://c/x", "az://c/x"),
            ("file:///srv/my backups/", "file:///srv/my backups"),
        ] {
            assert_eq!(text.parse::<Location>().expect(text).to_string(), spelled);
        }
    }

    #[test]
    fn a_mistyped_address_says_what_is_wrong_with_it() {
        for bad in [
            "",
            "bucket/db",
            "s3:/bucket",
            "s3://",
            "ftp://host/x",
            "file://relative",
            "s3://b/../x",
            "s3://b/a//b",
            "s3://b?region=eu",
        ] {
            let error = bad.parse::<Location>().expect_err(bad);
            assert_eq!(error.kind(), crate::error::Kind::Usage);
            assert!(error.hint_text().is_some());
        }
    }
}
