//! Where the age identity comes from that opens an encrypted repository.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, IoContext, Kind, Result};

/// The text of an identity file: as it is given, from a file, or from a command; `None` when nobody named one.
pub fn identities(text: Option<String>, file: Option<&Path>, command: Option<&str>) -> Result<Option<String>> {
    match (file, text, command) {
        (Some(file), ..) => std::fs::read_to_string(file).on("read the identity in", file).map(Some),
        (_, Some(text), _) => Ok(Some(text)),
        (_, _, Some(command)) => printed(command).map(Some),
        _ => Ok(None),
    }
}

fn printed(command: &str) -> Result<String> {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = shell.output().map_err(|e| Error::local("could not run the command that prints the identity", e))?;
    if !output.status.success() {
        return Err(Error::new(
            Kind::Denied,
            format!("the command that prints the identity ended with {}", output.status),
        )
        .hint("run it yourself: its output must be that of age-keygen"));
    }
    String::from_utf8(output.stdout)
        .map_err(|_| Error::new(Kind::Denied, "the command for the identity printed no text"))
}
