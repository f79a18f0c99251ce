//! Directories that are kept beside the database.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Malformed, serde_as_text};

/// What a directory beside the database is called, in keys too: wherever it lies on a machine, it is the same one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectoryName(String);

impl fmt::Display for DirectoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DirectoryName {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<DirectoryName, Malformed> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
        match text.len() {
            1..=60 if text.bytes().all(plain) => Ok(DirectoryName(text.to_owned())),
            _ => Err(Malformed::new("name of a directory", text, "1 to 60 of lower-case letters, digits, '-' and '_'")),
        }
    }
}

serde_as_text!(DirectoryName);

/// A directory that is kept beside the database: `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beside {
    pub name: DirectoryName,
    pub path: PathBuf,
}

impl Beside {
    /// Whether it lies in a directory, or that in it. Both paths are taken as they are.
    pub fn overlaps(&self, directory: &Path) -> bool {
        self.path.starts_with(directory) || directory.starts_with(&self.path)
    }

    /// Each name once, and no directory inside another.
    pub fn check(all: Vec<Beside>) -> Result<Vec<Beside>, Malformed> {
        for (place, one) in all.iter().enumerate() {
            let others = || all.iter().enumerate().filter(|(other, _)| *other != place);
            let text = || format!("{}={}", one.name, one.path.display());
            if others().any(|(_, other)| other.name == one.name || one.path.starts_with(&other.path)) {
                let expected = "each name once, and no directory inside another";
                return Err(Malformed::new("directory beside the database of its own", &text(), expected));
            }
        }
        Ok(all)
    }
}

impl FromStr for Beside {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Beside, Malformed> {
        let expected = || Malformed::new("directory beside the database", text, "NAME=/ABSOLUTE/PATH");
        let (name, path) = text.split_once('=').ok_or_else(expected)?;
        let path = Path::new(path);
        // A root, or a path that goes up again, is nothing that could be emptied and put back.
        let plain = |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::RootDir);
        if !path.is_absolute() || path.parent().is_none() || !path.components().all(plain) {
            return Err(expected());
        }
        Ok(Beside { name: name.parse()?, path: path.components().collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_a_name_and_an_absolute_path() {
        let beside: Beside = "index=/var/lib/wiki/index/".parse().expect("sound");
        assert_eq!(beside.name.to_string(), "index");
        assert_eq!(beside.path, Path::new("/var/lib/wiki/index"));
        for bad in ["index", "=/var", "Index=/var", "a/b=/var", "index=var", "index=/", "index=/var/../etc", "index="] {
            assert!(bad.parse::<Beside>().is_err(), "{bad}");
        }
        let all = |texts: &[&str]| Beside::check(texts.iter().map(|text| text.parse().expect("sound")).collect());
        assert!(all(&["a=/x/a", "b=/x/b"]).is_ok());
        assert!(all(&["a=/x/a", "a=/x/b"]).is_err());
        assert!(all(&["a=/x", "b=/x/b"]).is_err());
    }
}
