//! `archive_command`: one WAL file into the repository, success only once the store has it.
//!
//! A segment is checked (its place, its pages, its records, its cluster) while it is being compressed, and takes one
//! request. Segments after it that are ready too go along, so that a backlog is not worked off one round trip at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::pushed;
use crate::error::{Error, IoContext, Result};
use crate::events::{Event, Events};
use crate::model::{Timestamp, WriteId};
use crate::postgres::data_dir::OWN_DIR;
use crate::repository::{FRAME, FRAMES_MAX, Frame, Plain, Put, Repository, WalObject, Writer};
use crate::wal::{SegmentHeader, SegmentName, WalFileName, scan_segment};

/// Bytes of segments pushed at once, and how many at most: the memory budget is twice this (file and frames).
const AT_ONCE: u64 = 48 << 20;
const NEIGHBOURS_MAX: u64 = 3;

/// Pushes one file for the writer.
#[derive(Debug, Clone)]
pub struct Pusher {
    pub repository: Repository,
    pub writer: Writer,
    pub data_dir: PathBuf,
    pub events: Events,
}

/// The name a path in `pg_wal` stands for.
pub fn name_of(path: &Path) -> Result<WalFileName> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.parse().map_err(|e| {
        Error::from(e).hint("archive_command is called with the path of a WAL file: perennial wal push \"%p\"")
    })
}

impl Pusher {
    /// Pushes the file at `path`, and its neighbours that are ready.
    pub async fn push(&self, path: &Path) -> Result<()> {
        let WalFileName::Segment(name) = name_of(path)? else { return self.push_one(path).await };
        if pushed::take(&self.own_dir(), name, path, self.writer.claim.generation)? {
            return Ok(());
        }
        // Compressed side by side, stored one after the other: should the machine die in between, no hole is left behind.
        let neighbours = self.ready_neighbours(path, name);
        let others: Vec<_> = neighbours.iter().map(|(_, path)| self.prepare(path)).collect();
        let (first, others) = tokio::join!(self.prepare(path), futures::future::join_all(others));
        self.store(first?).await?;
        for ((name, path), prepared) in neighbours.iter().zip(others) {
            // A neighbour that fails is PostgreSQL's next call, which will say why.
            let Ok(prepared) = prepared else { break };
            if self.store(prepared).await.is_err() {
                break;
            }
            let _ = pushed::mark(&self.own_dir(), *name, path, self.writer.claim.generation);
        }
        Ok(())
    }

    fn own_dir(&self) -> PathBuf {
        self.data_dir.join(OWN_DIR)
    }

    /// The segments right after this one that PostgreSQL has marked ready and that were not pushed yet.
    fn ready_neighbours(&self, path: &Path, name: SegmentName) -> Vec<(SegmentName, PathBuf)> {
        let size = self.writer.claim.segment_size;
        let (Some(directory), Some(number)) = (path.parent(), name.number(size)) else { return Vec::new() };
        let room = (AT_ONCE / size.bytes()).saturating_sub(1).min(NEIGHBOURS_MAX);
        (number + 1..=number + room)
            .map(|number| SegmentName::new(name.timeline, number, size))
            .take_while(|name| directory.join(format!("archive_status/{name}.ready")).is_file())
            .filter(|name| !pushed::is_marked(&self.own_dir(), *name))
            .map(|name| (name, directory.join(name.to_string())))
            .collect()
    }

    async fn push_one(&self, path: &Path) -> Result<()> {
        self.store(self.prepare(path).await?).await
    }

    /// Stores a segment that the stream has brought: the frames of its log entries are used as they are, if they hold
    /// just what `content` does.
    pub async fn push_streamed(&self, name: SegmentName, content: Bytes, frames: Option<StreamedFrames>) -> Result<()> {
        let at = self.repository.clock().now();
        let object = self.object(WalFileName::Segment(name), content.clone(), frames, at).await?;
        self.store((object, content)).await
    }

    /// Reads, checks and compresses a file.
    async fn prepare(&self, path: &Path) -> Result<(WalObject, Bytes)> {
        let name = name_of(path)?;
        let source = path.to_owned();
        let (file, size, written) = blocking(move || {
            let file = File::open(&source).on("open", &source)?;
            let metadata = file.metadata().on("stat", &source)?;
            let written = metadata.modified().on("stat", &source)?;
            Ok((file, metadata.len(), written))
        })
        .await?;
        let content = read_side_by_side(Arc::new(file), size, path).await?;
        // What a segment is known to cover ends when the server wrote to it last, not when the store was back.
        let written = written.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_micros();
        let written = Timestamp::from_unix_micros(i64::try_from(written).unwrap_or(i64::MAX));
        let object = self.object(name, content.clone(), None, written.min(self.repository.clock().now())).await?;
        Ok((object, content))
    }

    async fn store(&self, (object, content): (WalObject, Bytes)) -> Result<()> {
        let put = self.repository.put_wal(self.writer.claim.generation, &object, &content).await?;
        if put == Put::Stored {
            self.events.emit(Event::SegmentPushed { name: object.name.to_string(), stored: object.stored_size() });
        }
        Ok(())
    }

    async fn object(
        &self,
        name: WalFileName,
        content: Bytes,
        frames: Option<StreamedFrames>,
        written: Timestamp,
    ) -> Result<WalObject> {
        let identity = (WriteId(self.repository.clock().random()), written);
        let (codec, system_id) = (self.repository.descriptor().codec, self.writer.claim.system_id);
        if matches!(name, WalFileName::History(_) | WalFileName::Backup(..)) {
            return WalObject::small(name, system_id, &content, codec, identity);
        }
        let whole = content.clone();
        let learn = tokio::task::spawn_blocking(move || (learn(name, &whole), crc32c::crc32c(&whole)));
        let (learned, frames) = tokio::join!(learn, self.frames(&content, frames));
        let (learned, crc32c) = learned.map_err(|e| Error::internal("a checking thread ended").source(e))?;
        let (header, facts) = learned?;
        if header.system_id != system_id {
            return Err(Error::refused(format!(
                "{name} belongs to system {}, this writer's generation {} to system {system_id}",
                header.system_id, self.writer.claim.generation
            ))
            .hint("this WAL is from another cluster: archive it to a repository of its own"));
        }
        let (frames, streamed_crc) = frames?;
        if streamed_crc.is_some_and(|streamed| streamed != crc32c) {
            return Err(Error::damaged(format!("{name} on disk is not what the server streamed"))
                .hint("check the disk; a new base backup (`perennial backup`) starts a sound history"));
        }
        let plain = Plain { size: content.len() as u64, crc32c, facts };
        WalObject::assemble(name, system_id, plain, frames, identity)
    }

    /// The frames of the stream, or new ones; with the checksum of what the former hold.
    async fn frames(&self, content: &Bytes, streamed: Option<StreamedFrames>) -> Result<(Vec<Frame>, Option<u32>)> {
        if let Some(streamed) = streamed.filter(|streamed| streamed.fits(content.len() as u64)) {
            return Ok((streamed.frames, Some(streamed.crc32c)));
        }
        let codec = self.repository.descriptor().codec;
        let frames = (0..content.len().div_ceil(FRAME))
            .map(|index| content.slice(index * FRAME..((index + 1) * FRAME).min(content.len())))
            .map(|part| {
                blocking(move || {
                    codec.compress(&part).map(|stored| Frame { stored: stored.into(), plain: part.len() as u64 })
                })
            });
        Ok((futures::future::try_join_all(frames).await?, None))
    }
}

/// What the log entries of one segment hold, in order.
#[derive(Debug, Clone, Default)]
pub struct StreamedFrames {
    pub frames: Vec<Frame>,
    /// Of all their content.
    pub crc32c: u32,
}

impl StreamedFrames {
    pub fn add(&mut self, frame: Frame, crc32c: u32) {
        self.crc32c = crc32c::crc32c_combine(self.crc32c, crc32c, frame.plain as usize);
        self.frames.push(frame);
    }

    pub fn plain(&self) -> u64 {
        self.frames.iter().map(|frame| frame.plain).sum()
    }

    /// Whether they hold all of a segment, in pieces that are worth keeping.
    fn fits(&self, size: u64) -> bool {
        self.plain() == size && self.frames.len() <= FRAMES_MAX
    }
}

/// Checks a segment. Of a partial one only the head can be: after its end lies what the file held before.
fn learn(name: WalFileName, content: &[u8]) -> Result<(SegmentHeader, Option<crate::wal::SegmentFacts>)> {
    match name {
        WalFileName::Segment(name) => scan_segment(name, content).map(|(header, facts)| (header, Some(facts))).map_err(|e| {
            e.hint("the local file is not what PostgreSQL wrote; it was not stored. Check the disk; a new base backup (`perennial backup`) starts a sound history")
        }),
        _ => SegmentHeader::parse(content).map(|header| (header, None)).map_err(|e| e.context(name)),
    }
}

/// Reads a file of `size` bytes in pieces: what takes time is memory that was never used before, and that can be shared
/// among processors.
async fn read_side_by_side(file: Arc<File>, size: u64, path: &Path) -> Result<Bytes> {
    let mut rest = BytesMut::zeroed(usize::try_from(size).unwrap_or(usize::MAX));
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let offset = size - rest.len() as u64;
        let mut piece = rest.split_to(rest.len().min(FRAME));
        let (file, path) = (Arc::clone(&file), path.to_owned());
        pieces.push(blocking(move || {
            file.read_exact_at(&mut piece, offset).on("read", path)?;
            Ok(piece)
        }));
    }
    let mut whole = BytesMut::new();
    for piece in futures::future::try_join_all(pieces).await? {
        // They lie side by side: nothing is copied.
        whole.unsplit(piece);
    }
    Ok(whole.freeze())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal("a thread ended").source(e))?
}
