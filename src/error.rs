//! The one error type: what happened, to what, whether trying again may help, and what to do next.
//!
//! Code branches on [`Kind`] only; the text is for people. `cli::exit` maps each kind to one exit code.

use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure this is. Each has its own exit code, documented in docs/reference/exit-codes.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line or the configuration file is wrong.
    Usage,
    /// Done as asked it could lose data or mislead, so it was not done.
    Refused,
    /// Proven not to be there: a repository, a backup, a recovery target, a file.
    NotFound,
    /// The store or the server did not answer, or answered that it cannot now. Says nothing about what is there.
    Unreachable,
    /// Credentials missing, wrong, expired, or without the right to do this.
    Denied,
    /// Something that is there is not what was written: a checksum, a length or a format does not hold.
    Damaged,
    /// Another writer has taken over; this one must not write any more.
    Fenced,
    /// The same name with other content: two histories would get mixed up.
    Conflict,
    /// PostgreSQL refused, failed or ended in a way it should not have.
    Postgres,
    /// The local disk or operating system failed us.
    Local,
    /// A mistake in this program.
    Internal,
}

/// A failure with its kind. Cheap to pass on: one pointer.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    retryable: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, message: message.into(), hint: None, retryable: false, source: None }))
    }

    pub fn usage(message: impl Into<String>) -> Error {
        Error::new(Kind::Usage, message)
    }

    pub fn refused(message: impl Into<String>) -> Error {
        Error::new(Kind::Refused, message)
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(Kind::NotFound, message)
    }

    pub fn damaged(message: impl Into<String>) -> Error {
        Error::new(Kind::Damaged, message)
    }

    pub fn unreachable(message: impl Into<String>) -> Error {
        Error::new(Kind::Unreachable, message)
    }

    pub fn postgres(message: impl Into<String>) -> Error {
        Error::new(Kind::Postgres, message)
    }

    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Kind::Internal, message)
    }

    /// A failed system call: what was tried on which path.
    pub fn local(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Error {
        Error::new(Kind::Local, doing).source(source.into())
    }

    /// What the operator can do next; a command where there is one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// The same request may succeed if it is made again a little later.
    #[must_use]
    pub fn retryable(mut self) -> Error {
        self.0.retryable = true;
        self
    }

    /// Puts what was being done in front of the message.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Error {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl fmt::Display for Error {
    /// The message and the chain of causes on one line; the hint is rendered apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut said = self.0.message.clone();
        let mut cause = self.0.source.as_deref().map(|e| e as &dyn std::error::Error);
        while let Some(error) = cause {
            let text = error.to_string();
            // Libraries often repeat their cause in their own text.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said.push_str(&text);
            }
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        self.0.hint.iter().try_for_each(|hint| write!(f, " (hint: {hint})"))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}

impl From<crate::model::Malformed> for Error {
    fn from(malformed: crate::model::Malformed) -> Error {
        Error::usage(malformed.to_string())
    }
}

/// Puts context on the error of a `Result`.
pub trait Context<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T>;
    fn with_context<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.context(doing))
    }

    fn with_context<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.context(doing()))
    }
}

/// Names what was tried on which path when a system call fails.
pub trait IoContext<T> {
    fn on(self, doing: &str, path: impl AsRef<std::path::Path>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn on(self, doing: &str, path: impl AsRef<std::path::Path>) -> Result<T> {
        self.map_err(|e| Error::local(format!("could not {doing} {}", path.as_ref().display()), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_the_whole_chain_once() {
        let io = std::io::Error::new(std::io::ErrorKind::PermissionDenied, "permission denied");
        let error = Error::local("could not open /x", io).context("while restoring").hint("chown postgres /x");
        assert_eq!(error.to_string(), "while restoring: could not open /x: permission denied");
        assert_eq!(error.hint_text(), Some("chown postgres /x"));
        assert_eq!(error.kind(), Kind::Local);
        assert!(!error.is_retryable());
    }
}
