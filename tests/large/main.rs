//! A repository as years make it: many segments, many backups, many machines. Every command that looks at all of it must do
//! so in minutes and within its memory. The small one is an ordinary test; `make large` runs the other, which prints
//! what each command took.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, and measures real processes by a real clock"
)]

#[path = "../support/mod.rs"]
mod support;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use perennial::clock::Clock;
use perennial::events::Events;
use perennial::model::{BackupId, Generation, Lsn, PackId, SystemId, Timeline, Timestamp, WriteId};
use perennial::repository::codec::Sha256;
use perennial::repository::manifest::{BackupHead, FileEntry, Line, Lines, LinesWriter, REGION, Region};
use perennial::repository::pack::{FrameRef, PackBuilder};
use perennial::repository::{Codec, FRAME, Frame, NewWriter, Plain, Repository, WalObject};
use perennial::storage::{self, Location, Store, StoreSettings};
use perennial::wal::{SegmentName, SegmentSize, WalFileName};

use support::*;

/// What a command may need at its height (docs/ARCHITECTURE.md).
const MEMORY_MAX: u64 = 128 << 20;

/// Objects put at once.
const PARALLEL: usize = 32;

const FILES: usize = 100;

/// How much of a past there is.
#[derive(Clone, Copy)]
struct Past {
    /// Machines, one after the other; each left a timeline in the middle of a segment, and went on a while after it was
    /// replaced.
    generations: u32,
    segments: u64,
    backups: u64,
}

impl Past {
    fn segments_of_each(self) -> u64 {
        self.segments / u64::from(self.generations)
    }

    fn backups_of_each(self) -> u64 {
        self.backups / u64::from(self.generations)
    }

    /// Segments that each machine stored after it was replaced.
    fn left_behind(self) -> u64 {
        self.segments_of_each() / 50
    }
}

fn size() -> SegmentSize {
    SegmentSize::try_from(16 << 20).expect("a size")
}

struct Builder {
    past: Past,
    repository: Repository,
    clock: Clock,
    /// All segments are zeros: what is in them does not count here.
    frames: Vec<Frame>,
    crc: u32,
    now: Timestamp,
}

impl Builder {
    async fn new(bucket: &Bucket, past: Past) -> Builder {
        let clock = Clock::system();
        let location: Location = bucket.url.parse().expect("an address");
        let store: Arc<dyn Store> =
            storage::open(&location, &StoreSettings::default(), &clock, &Events::silent()).expect("opened");
        let codec = Codec::default();
        let (repository, _) = Repository::init(store, codec, &clock).await.expect("made");
        let stored = codec.compress(&vec![0; FRAME]).expect("compressed");
        let frame = Frame { stored: stored.into(), plain: FRAME as u64 };
        let crc = crc32c::crc32c(&vec![0; size().bytes() as usize]);
        let count = size().bytes() as usize / FRAME;
        Builder { past, repository, now: clock.now(), clock, frames: vec![frame; count], crc }
    }

    async fn build(&self) {
        let mut packs = Vec::new();
        for number in 1..=self.past.generations {
            self.claim(number).await;
            self.wal(number).await;
            for backup in 0..self.past.backups_of_each() {
                packs.push(self.backup(number, backup, &packs).await);
            }
        }
    }

    async fn claim(&self, number: u32) {
        let writer = NewWriter {
            writer_id: WriteId(self.clock.random()),
            system_id: SystemId(7),
            pg_major: 15,
            segment_size: size(),
            host: format!("machine-{number}"),
        };
        let parent = (number > 1).then(|| Generation(number - 1));
        self.repository.try_claim(parent, parent, &writer).await.expect("asked").expect("claimed");
        if number > 1 {
            let lines =
                (1..number).map(|parent| format!("{parent}\t{}\tno recovery target specified\n", self.fork(parent)));
            let name = WalFileName::History(Timeline(number));
            let text: String = lines.collect();
            let identity = (WriteId(self.clock.random()), self.now);
            let object = WalObject::small(name, SystemId(7), text.as_bytes(), Codec::default(), identity);
            self.repository
                .put_wal(Generation(number), &object.expect("assembled"), text.as_bytes())
                .await
                .expect("put");
        }
    }

    /// The first segment of a machine's own timeline; position 0 is no place for WAL.
    fn first_of(&self, number: u32) -> u64 {
        1 + u64::from(number - 1) * self.past.segments_of_each()
    }

    /// Where a timeline was left: within the first segment of the next one.
    fn fork(&self, timeline: u32) -> Lsn {
        Lsn(size().start_of(self.first_of(timeline + 1)).0 + 4096)
    }

    async fn wal(&self, number: u32) {
        let first = self.first_of(number);
        let end = first + self.past.segments_of_each() + self.past.left_behind();
        let puts = (first..end).map(|segment| async move {
            let name = WalFileName::Segment(SegmentName::new(Timeline(number), segment, size()));
            let plain = Plain { size: size().bytes(), crc32c: self.crc, facts: None };
            let identity = (WriteId(self.clock.random()), self.now);
            let object = WalObject::assemble(name, SystemId(7), plain, self.frames.clone(), identity)?;
            self.repository.put_wal(Generation(number), &object, &[]).await
        });
        futures::stream::iter(puts)
            .buffer_unordered(PARALLEL)
            .try_for_each(|_| async { Ok(()) })
            .await
            .expect("stored");
    }

    /// A backup of [`FILES`] files, one of them new, the others as in the backups before it; returns its own pack.
    async fn backup(&self, number: u32, count: u64, before: &[PackId]) -> PackId {
        let each = self.past.segments_of_each() / self.past.backups_of_each();
        let start = Lsn(size().start_of(self.first_of(number) + count * each + 2).0 + 40);
        let id = BackupId { generation: Generation(number), start, nonce: count as u16 };
        let pack_id = PackId(self.clock.random());
        let frame = vec![7; 1000];
        let mut pack = PackBuilder::new(pack_id, WriteId(self.clock.random()), id).expect("begun");
        let offset = pack.add(frame.clone().into(), Sha256::of(&frame));
        let (_, body) = pack.finish().expect("finished");
        let stored = body.len();
        self.repository.put_pack(pack_id, &body).await.expect("put");

        let mut packs: Vec<PackId> = before.iter().rev().take(FILES - 1).copied().collect();
        packs.insert(0, pack_id);
        let mut lines = LinesWriter::new(Codec::default());
        packs.iter().for_each(|pack| lines.add(&Line::Pack(*pack)).expect("added"));
        for pack in 0..packs.len() as u32 {
            let frame = FrameRef { pack, offset, stored: frame.len() as u32, sha256: Sha256::of(&frame) };
            lines.add(&Line::File(file(pack, frame))).expect("added");
        }
        let age = self.past.backups - u64::from(number - 1) * self.past.backups_of_each() - count;
        let taken = self.now.earlier_by(Duration::from_secs(age * 3600));
        let head = BackupHead {
            format: String::new(),
            write_id: WriteId(self.clock.random()),
            backup_id: id,
            repository_id: self.repository.descriptor().repository_id,
            system_id: SystemId(7),
            generation: id.generation,
            timeline: Timeline(number),
            pg_major: 15,
            pg_version: "15.0".to_owned(),
            segment_size: size(),
            region_size: REGION,
            start_lsn: start,
            stop_lsn: Lsn(start.0 + size().bytes()),
            started_at: taken,
            stopped_at: taken,
            server_started: None,
            next_xid: 1000,
            data_checksums: true,
            backup_label: String::new(),
            tablespace_map: None,
            tablespaces: Vec::new(),
            files: packs.len() as u64,
            bytes: packs.len() as u64 * REGION,
            stored,
            packs: packs.len() as u64,
            parent: None,
            full_at: None,
            damaged: Vec::new(),
            damaged_pages: 0,
            lines: Lines::none(),
        };
        let (_, body) = head.with(lines).expect("complete");
        self.repository.put_manifest(id, &body).await.expect("put");
        pack_id
    }
}

fn file(number: u32, frame: FrameRef) -> FileEntry {
    FileEntry {
        path: format!("base/5/{}", 20_000 + number),
        mode: 0o600,
        owner: None,
        size: REGION,
        mtime: 0,
        outside: None,
        birth: None,
        mark: None,
        regions: vec![Region::whole(frame, REGION as u32, 7)],
    }
}

/// Runs a command of the program; its answer as JSON. Prints what it took, and fails beyond the budget of memory.
fn measured(bucket: &Bucket, arguments: &[&str]) -> serde_json::Value {
    let began = Instant::now();
    let mut command = bucket.command(&[arguments, &["--json", "--quiet"]].concat());
    let mut child = command.stdout(Stdio::piped()).spawn().expect("runs");
    let (id, mut stdout) = (child.id(), child.stdout.take().expect("a pipe"));
    let reader = std::thread::spawn(move || std::io::read_to_string(&mut stdout).expect("text"));
    let mut peak = 0;
    let status = loop {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let kilobytes =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(kilobytes.map_or(0, |kilobytes: u64| kilobytes << 10));
        if let Some(status) = child.try_wait().expect("asked") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let scheme = bucket.url.split(':').next().unwrap_or_default();
    let (took, peak_mb) = (began.elapsed().as_secs_f64(), peak >> 20);
    println!("{scheme:>4} {:<50} {took:>7.1} s {peak_mb:>5} MB", arguments.join(" "));
    assert!(status.success(), "perennial {arguments:?}: {status}");
    assert!(peak > 0 && peak <= MEMORY_MAX, "perennial {arguments:?} needed {peak_mb} MB");
    serde_json::from_str(&reader.join().expect("read")).expect("JSON")
}

/// A year of backups is pruned to three days of points: what is kept is whole, what is not needed is gone, in one go.
fn prune_to_three_days(bucket: &Bucket, past: Past) {
    let rules = ["--keep-within=3d", "--keep-points=3d", "--keep-monthly=12", "--prune-grace=0"];
    let before = measured(bucket, &["list"])["backups"].as_array().expect("backups").len();
    assert_eq!(before as u64, past.backups);
    measured(bucket, &["verify"]);
    let plan = measured(bucket, &[&["prune", "--dry-run"], &rules[..]].concat());
    let done = measured(bucket, &[&["prune"], &rules[..]].concat());
    let stay = |report: &serde_json::Value| {
        let backups = report["report"]["backups"].as_array().expect("backups");
        backups.iter().filter(|backup| !backup["reasons"].as_array().expect("reasons").is_empty()).count()
    };
    assert_eq!(stay(&plan), stay(&done), "the plan is what is done");
    assert!(done["report"]["objects"].as_u64().expect("a number") > 0);
    // One for each hour, the one from which the oldest point is reached, one for each month; and those from which what was
    // left behind is reached: all machines claimed a moment ago.
    let hours = 72;
    let most = hours + 6 + past.generations as usize;
    assert!((hours..most).contains(&stay(&done)), "{} backups stay", stay(&done));
    let left = measured(bucket, &["list"])["backups"].as_array().expect("backups").len();
    assert_eq!(left, stay(&done));
    let verified = measured(bucket, &["verify"]);
    assert_eq!(verified["report"]["findings"].as_array().map(Vec::len), Some(0));
    assert_eq!(measured(bucket, &[&["prune"], &rules[..]].concat())["report"]["objects"], 0, "nothing is left over");
}

fn years(past: Past) {
    let scratch = Scratch::new();
    let files = Bucket::directory(&scratch);
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { Builder::new(&files, past).await.build().await });
    println!(
        "{} segments of {} machines and {} backups made in {:.1} s",
        past.segments,
        past.generations,
        past.backups,
        began.elapsed().as_secs_f64()
    );
    let owner = format!("{0}:{0}", server_user_name());
    let given = Command::new("chown").args(["-R", &owner]).arg(files.path()).status().expect("runs");
    assert!(given.success());
    // The same on a real S3 server, by way of a copy.
    let s3 = Bucket::s3();
    let there = Bucket { url: files.url.clone(), env: s3.env.clone() };
    measured(&there, &["copy", "--to", &s3.url]);
    prune_to_three_days(&files, past);
    prune_to_three_days(&s3, past);
}

#[test]
fn a_repository_of_many_machines_is_pruned_within_its_memory() {
    years(Past { generations: 5, segments: 500, backups: 100 });
}

#[test]
#[ignore = "long: make large"]
fn a_hundred_thousand_segments_and_a_thousand_backups_are_pruned_in_minutes_and_within_the_memory() {
    years(Past { generations: 50, segments: 100_000, backups: 1_000 });
}
