//! Lists of files as lines of JSON: directories, links, files with their regions, and an end line with the count, in zstd
//! frames behind the head of an object. Line by line, so that neither writer nor reader holds more than it needs of a
//! large one, and any language reads it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use bytes::Bytes;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use super::codec::{Codec, Hasher, Sha256, decompress};
use super::region::{REGION, Region};
use super::{Repository, crc, envelope};
use crate::error::{Error, Result};
use crate::model::PackId;
use crate::storage::Body;

/// Lines are gathered to about this many bytes before they become a frame.
const LINES_FRAME: usize = 1 << 20;

/// Largest frame of lines a reader accepts.
const LINES_FRAME_MAX: u64 = 64 << 20;

/// What a head says of the lines behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lines {
    /// Size of each frame of lines: stored, plain.
    pub frames: Vec<(u64, u64)>,
    /// SHA-256 of all frames of lines.
    pub frames_sha256: Sha256,
}

impl Lines {
    /// Of a head that is completed later.
    pub fn none() -> Lines {
        Lines { frames: Vec::new(), frames_sha256: Sha256([0; 32]) }
    }

    /// Bytes behind the head.
    pub fn stored(&self) -> u64 {
        self.frames.iter().map(|(stored, _)| stored).sum()
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    /// Packs are numbered in the order of their lines, from 0.
    Pack(PackId),
    Dir(Directory),
    Link(Link),
    File(FileEntry),
    /// A database of the cluster, in a backup.
    Database(Database),
    /// The last line: how many came before it.
    End(u64),
}

/// What lines may be; those of other kinds came with a later version and mean nothing to this one.
const KINDS: &[&str] = &["pack", "dir", "link", "file", "database", "end"];

impl Line {
    fn parse(json: &[u8]) -> serde_json::Result<Option<Line>> {
        serde_json::from_slice(json).map(Some).or_else(|error| {
            let fields: BTreeMap<String, IgnoredAny> = serde_json::from_slice(json)?;
            let is_known = fields.keys().any(|kind| KINDS.contains(&kind.as_str()));
            if is_known || fields.len() != 1 { Err(error) } else { Ok(None) }
        })
    }
}

/// A database by its number (`pg_database.oid`) and its name when the backup ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    pub oid: u32,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    pub path: String,
    pub mode: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub path: String,
    pub target: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Below the data directory; tablespaces are under `pg_tblspc/<oid>/`.
    pub path: String,
    pub mode: u32,
    /// Names of the owner and the group, for people: a restored file belongs to whoever restores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    pub size: u64,
    /// Last modification, seconds since the epoch.
    pub mtime: i64,
    /// For a configuration file from outside the data directory: where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<String>,
    /// For files of pages: which file it was on its disk, as inode and time of birth in nanoseconds. The same path may be
    /// another file later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub birth: Option<String>,
    /// For files beside the database: what changes whenever the file is written to (inode, birth, change and modification in
    /// nanoseconds, size).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    pub regions: Vec<Region>,
}

impl FileEntry {
    /// One with this content, in frames that are nowhere.
    #[cfg(test)]
    pub fn of(path: &str, content: &[u8]) -> FileEntry {
        let frame = super::pack::FrameRef { pack: 0, offset: 0, stored: 0, sha256: Sha256::of(b"") };
        let whole = |part: &[u8]| Region::whole(frame, part.len() as u32, crc32c::crc32c(part));
        FileEntry {
            path: path.to_owned(),
            mode: 0o600,
            owner: None,
            size: content.len() as u64,
            mtime: 0,
            outside: None,
            birth: None,
            mark: None,
            regions: content.chunks(super::region::REGION as usize).map(whole).collect(),
        }
    }

    /// CRC-32C of the whole file, from those of its regions.
    pub fn crc32c(&self) -> u32 {
        let mut regions = self.regions.iter();
        let first = regions.next().map_or(0, |region| region.crc);
        regions.fold(first, |crc, region| match u64::from(region.plain) {
            REGION => crc::REGIONS.join(crc, region.crc),
            plain => crc32c::crc32c_combine(crc, region.crc, plain as usize),
        })
    }
}

/// Writes lines into frames.
#[derive(Debug)]
pub struct LinesWriter {
    codec: Codec,
    lines: Vec<u8>,
    count: u64,
    frames: Vec<(u64, u64)>,
    stored: Vec<Bytes>,
}

impl LinesWriter {
    pub fn new(codec: Codec) -> LinesWriter {
        LinesWriter { codec, lines: Vec::new(), count: 0, frames: Vec::new(), stored: Vec::new() }
    }

    pub fn add(&mut self, line: &Line) -> Result<()> {
        serde_json::to_writer(&mut self.lines, line)
            .map_err(|e| Error::internal("a manifest line as JSON").source(e))?;
        self.lines.push(b'\n');
        self.count += 1;
        if self.lines.len() >= LINES_FRAME { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        // What nobody reads must not be written.
        if self.lines.len() as u64 > LINES_FRAME_MAX {
            return Err(Error::refused("there is a file with too many changes for a line of a list of files")
                .hint("take a full backup (--full)"));
        }
        let frame = self.codec.compress(&self.lines)?;
        self.frames.push((frame.len() as u64, self.lines.len() as u64));
        self.stored.push(Bytes::from(frame));
        self.lines.clear();
        Ok(())
    }

    /// Ends the lines: what the head must say of them, and the frames that come behind it.
    pub fn finish(mut self) -> Result<(Lines, Vec<Bytes>)> {
        let count = self.count;
        self.add(&Line::End(count))?;
        if !self.lines.is_empty() {
            self.flush()?;
        }
        let mut hash = Hasher::default();
        self.stored.iter().for_each(|frame| hash.update(frame));
        let lines = Lines { frames: self.frames, frames_sha256: hash.finish() };
        Ok((lines, self.stored))
    }
}

/// A whole object: its head and the frames of lines behind it.
pub fn object(head: &impl Serialize, frames: Vec<Bytes>) -> Result<Body> {
    let mut body = Body::from(envelope::wrap(head)?);
    frames.into_iter().for_each(|frame| body.push(frame));
    Ok(body)
}

/// A head that says what lines are behind it.
pub trait Heads: DeserializeOwned {
    const FORMAT: &str;

    fn lines(&self) -> &Lines;
}

impl Repository {
    /// The head of an object with lines, and where they begin; `None` when there is no such object.
    pub(super) async fn head_of_lines<H: Heads>(&self, key: &str) -> Result<Option<(H, u64)>> {
        let Some(chunk) = self.store.read(key, 0..envelope::HEAD_MAX).await? else { return Ok(None) };
        let (head, length): (H, usize) =
            envelope::unwrap(&chunk.bytes, H::FORMAT).map_err(|why| self.corrupt(key, why))?;
        if length as u64 + head.lines().stored() != chunk.object_size {
            return Err(self.corrupt(key, format!("it is {} bytes long, its head says otherwise", chunk.object_size)));
        }
        Ok(Some((head, length as u64)))
    }

    /// The packs that lines name. They come first: no more is read.
    pub(super) async fn packs_in(&self, key: &str, at: u64, lines: &Lines) -> Result<Vec<PackId>> {
        let mut packs = Vec::new();
        let mut take = |line| match line {
            Line::Pack(pack) => {
                packs.push(pack);
                Ok(ControlFlow::Continue(()))
            }
            _ => Ok(ControlFlow::Break(())),
        };
        self.read_lines(key, at, lines, &mut take).await?;
        Ok(packs)
    }

    /// Reads the lines of the object at `key` that begin `at` this offset, one by one, `End` not included, until `line` has
    /// had enough.
    pub(super) async fn read_lines(
        &self,
        key: &str,
        mut at: u64,
        lines: &Lines,
        line: &mut (dyn FnMut(Line) -> Result<ControlFlow<()>> + Send),
    ) -> Result<()> {
        let mut hash = Hasher::default();
        let mut count = 0;
        let mut ended = false;
        for (stored, plain) in &lines.frames {
            if *plain > LINES_FRAME_MAX {
                return Err(self.corrupt(key, "a frame is too large"));
            }
            let frame = self.must_read(key, at..at + stored).await?.bytes;
            hash.update(&frame);
            let text = decompress(&frame, *plain as usize).map_err(|why| self.corrupt(key, why))?;
            for json in text.split(|byte| *byte == b'\n').filter(|json| !json.is_empty()) {
                let next = Line::parse(json).map_err(|e| self.corrupt(key, e))?;
                match next {
                    Some(Line::End(lines)) if lines == count && !ended => ended = true,
                    Some(Line::End(_)) => return Err(self.corrupt(key, "it ends at the wrong place")),
                    _ if ended => return Err(self.corrupt(key, "it goes on after its end")),
                    next => {
                        let enough = next.map(&mut *line).transpose()?.is_some_and(|flow| flow.is_break());
                        if enough {
                            return Ok(());
                        }
                    }
                }
                count += 1;
            }
            at += stored;
        }
        if !ended {
            return Err(self.corrupt(key, "it has no end"));
        }
        if hash.finish() != lines.frames_sha256 {
            return Err(self.corrupt(key, "the checksum of its lines does not hold"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_file_is_that_of_its_joined_regions() {
        let content: Vec<u8> = (0..2_500_000u32).map(|n| (n % 251) as u8).collect();
        let mut file = FileEntry::of("base/1/1", &content);
        assert_eq!(file.crc32c(), crc32c::crc32c(&content));
        file.regions.clear();
        assert_eq!(file.crc32c(), 0);
    }

    #[test]
    fn lines_are_plain_json() {
        let line = Line::Dir(Directory { path: "base/1".to_owned(), mode: 0o700 });
        let json = serde_json::to_string(&line).expect("json");
        assert_eq!(json, r#"{"dir":{"path":"base/1","mode":448}}"#);
        assert_eq!(serde_json::from_str::<Line>(&json).expect("reads back"), line);
    }

    #[test]
    fn lines_of_a_later_version_are_passed_over_and_broken_ones_are_not() {
        let parse = |json: &str| Line::parse(json.as_bytes());
        assert_eq!(parse(r#"{"colour":{"name":"red"}}"#).expect("passed over"), None);
        let database = Line::Database(Database { oid: 16384, name: "app".to_owned() });
        assert_eq!(parse(r#"{"database":{"oid":16384,"name":"app","encoding":6}}"#).expect("read"), Some(database));
        for broken in [r#"{"dir":{"path":"base/1"}}"#, r#"{"file":7}"#, r#"{"a":1,"b":2}"#, "{}", "[]", r#"{"dir""#] {
            assert!(parse(broken).is_err(), "{broken}");
        }
    }
}
