//! What a machine does: claim, seal, read, open, write, acknowledge, collect; and what is checked of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use perennial::error::{Error, Kind, Result};
use perennial::events::Events;
use perennial::model::{Generation, Lsn, SystemId, Timeline};
use perennial::repository::log::{Appender, Bound, Checks, LogView, Position, Sealer};
use perennial::repository::{Codec, NewWriter, Repository};
use perennial::storage::{Body, Policy, Retrying, Store};
use perennial::wal::SegmentSize;

use crate::world::{Faults, World};

/// Machines come and go for this long; then the faults stop.
const TROUBLE: Duration = Duration::from_secs(120);

/// Bytes of a "segment" of the simulation: what is complete is stored as one object and its entries may go.
const SEGMENT: u64 = 48;

/// How a seed ended.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "shown when a seed fails")]
pub enum Verdict {
    Kept {
        boots: u64,
        acknowledged: u64,
        fenced: u64,
        collected: u64,
        requests: u64,
    },
    /// The promise was broken.
    Lost(String),
    /// Nothing went on although nothing was in the way.
    Stuck(String),
}

/// What the outside world knows.
#[derive(Default)]
struct Ledger {
    /// Every acknowledged stretch: by which generation, from where, its bytes.
    acknowledged: Vec<(Generation, u64, Vec<u8>)>,
    /// What each generation that opened its log had read.
    read: BTreeMap<Generation, Vec<u8>>,
    broken: Option<String>,
    boots: u64,
    fenced: u64,
    collected: u64,
}

impl Ledger {
    fn check(&mut self, reader: Generation, by: Generation, from: u64, bytes: &[u8]) {
        let history = &self.read[&reader];
        if history.get(from as usize..from as usize + bytes.len()) != Some(bytes) {
            let text = format!(
                "{} bytes from {from}, acknowledged by generation {by}, are not in what generation {reader} read ({} bytes)",
                bytes.len(),
                history.len()
            );
            self.broken.get_or_insert(text);
        }
    }

    fn acknowledge(&mut self, by: Generation, from: u64, bytes: Vec<u8>) {
        let later: Vec<Generation> = self.read.keys().copied().filter(|reader| *reader > by).collect();
        later.into_iter().for_each(|reader| self.check(reader, by, from, &bytes));
        self.acknowledged.push((by, from, bytes));
    }

    fn opened(&mut self, generation: Generation, history: Vec<u8>) {
        self.boots += 1;
        self.read.insert(generation, history);
        let earlier: Vec<_> = self.acknowledged.iter().filter(|(by, ..)| *by < generation).cloned().collect();
        earlier.into_iter().for_each(|(by, from, bytes)| self.check(generation, by, from, &bytes));
    }
}

/// One seed's world and its ledger.
#[derive(Clone)]
pub struct Life {
    world: World,
    ledger: Rc<RefCell<Ledger>>,
    checks: Checks,
    trace: bool,
}

impl Life {
    pub fn new(world: World, checks: Checks, trace: bool) -> Life {
        Life { world, ledger: Rc::default(), checks, trace }
    }

    fn tell(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>10.3} {}", self.world.now().as_secs_f64(), text());
        }
    }

    pub async fn story(self, machines: u64) -> Verdict {
        let store = self.store();
        let clock = self.world.clock();
        let repository = loop {
            match Repository::init(Arc::clone(&store), Codec::default(), &clock).await {
                Ok((repository, _)) => break repository,
                Err(error) => self.tell(|| format!("init: {error}")),
            }
            if self.world.now() > TROUBLE * 10 {
                return Verdict::Stuck("no init got through".to_owned());
            }
        };
        for name in 0..machines {
            self.world.spawn(self.clone().machine(name, repository.clone()));
        }
        clock.sleep(TROUBLE).await;
        self.world.set_faults(Faults::NONE);
        self.tell(|| "the faults stop".to_owned());
        // One that is left alone must get through.
        let calm = TROUBLE + Duration::from_secs(3600);
        let last = self.clone().last_boot(repository);
        let through = clock.within(calm, last).await;
        let ledger = self.ledger.borrow();
        match (&ledger.broken, through) {
            (Some(broken), _) => Verdict::Lost(broken.clone()),
            (None, Some(Ok(()))) => Verdict::Kept {
                boots: ledger.boots,
                acknowledged: ledger.acknowledged.len() as u64,
                fenced: ledger.fenced,
                collected: ledger.collected,
                requests: self.world.requests(),
            },
            (None, Some(Err(error))) => Verdict::Stuck(format!("{error:?}")),
            (None, None) => Verdict::Stuck("the last boot did not get through in an hour".to_owned()),
        }
    }

    fn store(&self) -> Arc<dyn Store> {
        let policy = Policy { patience: Duration::from_secs(10), attempt: Duration::from_secs(3), ..Policy::default() };
        Arc::new(Retrying::new(Arc::new(self.world.clone()), policy, self.world.clock(), Events::silent()))
    }

    /// Boots again and again, each life cut off at some moment or ended by itself.
    async fn machine(self, name: u64, repository: Repository) {
        let clock = self.world.clock();
        while self.world.now() < TROUBLE {
            clock.sleep(Duration::from_millis(self.world.below(8000))).await;
            let lifetime = Duration::from_millis(self.world.below(40_000));
            let life = Pausing {
                world: self.world.clone(),
                inner: Box::pin(self.live(name, &repository, u64::MAX)),
                paused: None,
            };
            match clock.within(lifetime, life).await {
                Some(Ok(())) => self.tell(|| format!("machine {name} stopped")),
                Some(Err(error)) => {
                    self.tell(|| format!("machine {name}: {error}"));
                    if error.kind() == Kind::Fenced {
                        self.ledger.borrow_mut().fenced += 1;
                    }
                    if error.kind() == Kind::Damaged || error.kind() == Kind::Internal {
                        self.ledger.borrow_mut().broken.get_or_insert(format!("{error:?}"));
                    }
                }
                None => self.tell(|| format!("machine {name} crashed")),
            }
        }
    }

    async fn last_boot(self, repository: Repository) -> Result<()> {
        // Others may still be at work; their lives end.
        loop {
            match self.live(99, &repository, 5).await {
                Err(error) if matches!(error.kind(), Kind::Fenced | Kind::Refused | Kind::Unreachable) => (),
                ended => return ended,
            }
        }
    }

    /// One boot and life; ends after `steps` appends.
    async fn live(&self, name: u64, repository: &Repository, steps: u64) -> Result<()> {
        let newest = repository.newest_generation().await?;
        let writer = NewWriter {
            writer_id: perennial::model::WriteId(repository.clock().random()),
            system_id: SystemId(1),
            pg_major: 15,
            segment_size: SegmentSize::try_from(1 << 20)?,
            host: format!("machine {name}"),
        };
        let Some(claim) = repository.try_claim(newest, newest, &writer).await? else {
            return Err(Error::refused("another claimed first"));
        };
        let generation = claim.generation;
        self.tell(|| format!("machine {name} claimed {generation}"));
        let sealed = Sealer { generation, checks: self.checks }.seal_older(repository).await?;
        let history = match sealed.iter().find(|view| view.end().is_some()) {
            Some(view) => self.read_final(repository, view).await?,
            None => Vec::new(),
        };
        for view in &sealed {
            self.tell(|| {
                format!("  {}: bound {:?}, next {}, end {:?}", view.generation, view.bound, view.next, view.end())
            });
        }
        self.tell(|| format!("machine {name} as {generation} read {} bytes", history.len()));
        let start = Position { timeline: Timeline(1), lsn: Lsn(history.len() as u64) };
        self.store_start(repository, generation, &history).await?;
        let mut log = Appender::open(repository.clone(), generation, start, Duration::from_secs(30), self.checks)?;
        while log.durable().number == 0 {
            log.landed().await?;
        }
        self.ledger.borrow_mut().opened(generation, history.clone());
        self.write(repository, log, history, steps).await
    }

    async fn write(&self, repository: &Repository, mut log: Appender, history: Vec<u8>, steps: u64) -> Result<()> {
        let generation = log.generation();
        let mut written = history;
        let mut acknowledged = written.len() as u64;
        let (mut collected, mut ends) = (1, vec![(1, acknowledged)]);
        let mut whole = acknowledged;
        let most = 1 + self.world.below(5) as usize;
        for step in 0..steps {
            if self.world.below(2) == 0 {
                repository.clock().sleep(Duration::from_millis(self.world.below(200))).await;
            }
            let count = 1 + self.world.below(24) as usize;
            let bytes: Vec<u8> = (0..count).map(|_| self.world.below(256) as u8).collect();
            let frame = Codec::default().compress(&bytes)?;
            log.append_wal(&bytes, Bytes::from(frame))?;
            written.extend_from_slice(&bytes);
            ends.push((log.next_number() - 1, written.len() as u64));
            while log.in_flight() >= most || (step + 1 == steps && log.in_flight() > 0) {
                let durable = log.landed().await?.position.lsn.0;
                if durable > acknowledged {
                    let bytes = written[acknowledged as usize..durable as usize].to_vec();
                    self.tell(|| format!("{generation} acknowledged up to {durable}, entry {}", log.durable().number));
                    self.ledger.borrow_mut().acknowledge(generation, acknowledged, bytes);
                    acknowledged = durable;
                }
            }
            // Whole segments are stored apart; then their entries may go.
            if acknowledged >= whole + SEGMENT {
                let body = Body::from(written[whole as usize..(whole + SEGMENT) as usize].to_vec());
                repository.store().create(&format!("segments/{generation}/{whole:08}"), &body).await?;
                whole += SEGMENT;
                let last = ends.iter().take_while(|(_, end)| *end <= whole).last().copied();
                if let Some((number, end)) = last.filter(|(number, _)| number + 1 > collected) {
                    self.tell(|| format!("{generation} collects below {}", number + 1));
                    let bound = Bound::at(number + 1, Some(Position { timeline: Timeline(1), lsn: Lsn(end) }));
                    repository.collect_log(generation, collected, &bound).await?;
                    collected = number + 1;
                    self.ledger.borrow_mut().collected += 1;
                }
            }
        }
        log.release().await.map(drop)
    }

    /// What a generation had before it began, as a base backup would keep it.
    async fn store_start(&self, repository: &Repository, generation: Generation, history: &[u8]) -> Result<()> {
        repository.store().create(&format!("starts/{generation}"), &Body::from(history.to_vec())).await.map(drop)
    }

    /// The writer that was sealed off may still collect what it had stored: then there is less in the log and more in whole
    /// segments.
    async fn read_final(&self, repository: &Repository, view: &LogView) -> Result<Vec<u8>> {
        let mut view = view.clone();
        loop {
            match self.read_all(repository, &view).await {
                Err(error) if error.kind() == Kind::Damaged && error.is_retryable() => {
                    view = repository.log(view.generation).await?;
                }
                outcome => return outcome,
            }
        }
    }

    /// Everything up to the end of a sealed log: its start, whole segments, the rest from the entries.
    async fn read_all(&self, repository: &Repository, view: &LogView) -> Result<Vec<u8>> {
        let generation = view.generation;
        let object = async |key: String| {
            let chunk = repository.store().read(&key, 0..u64::MAX / 2).await?;
            Ok::<_, Error>(chunk.map(|chunk| chunk.bytes))
        };
        let mut history =
            object(format!("starts/{generation}")).await?.ok_or_else(|| Error::damaged("no start"))?.to_vec();
        while let Some(segment) = object(format!("segments/{generation}/{:08}", history.len())).await? {
            history.extend_from_slice(&segment);
        }
        if let Some(run) = repository.log_run(view).await? {
            let from = Lsn(history.len() as u64);
            if from < run.start {
                return Err(Error::damaged(format!("entries start at {}, whole segments end at {from}", run.start)));
            }
            if from < run.end {
                let write = |_, piece: &[u8]| {
                    history.extend_from_slice(piece);
                    Ok(())
                };
                repository.read_log(&run, from, run.end, write).await?;
            }
        }
        Ok(history)
    }
}

/// A future that is now and then not polled for a while, as a process that is stopped or starved.
struct Pausing<'a> {
    world: World,
    inner: Pin<Box<dyn Future<Output = Result<()>> + 'a>>,
    paused: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Future for Pausing<'_> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        if self.paused.is_none() && self.world.below(300) == 0 {
            let pause = Duration::from_millis(self.world.below(30_000));
            let clock = self.world.clock();
            self.paused = Some(Box::pin(async move { clock.sleep(pause).await }));
        }
        if let Some(pause) = self.paused.as_mut() {
            if pause.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.paused = None;
        }
        self.inner.as_mut().poll(context)
    }
}
