//! The streaming replication protocol, physical (manual section 55.4): the WAL of a server as it is flushed there.
//!
//! Our own, because no library of this language speaks it over a Unix socket with the two positions told apart that we
//! need: *write*, what was received, and *flush*, what is durable in the repository. Messages are built and passwords are
//! proven by `postgres-protocol`.

use std::path::Path;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::client::{Address, ConnectOptions};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::model::{Lsn, SystemId, Timeline};

/// The slot that keeps WAL until it is durable in the repository, and the name we are a standby under.
pub const SLOT: &str = "perennial";

/// A server on this machine answers at once or not at all.
const CONNECT: Duration = Duration::from_secs(10);

/// A message is never larger: WAL comes in pieces of 128 kB (`MAX_SEND_SIZE` in replication/walsender.c).
const MESSAGE_MAX: usize = 4 << 20;

/// `duplicate_object`: the slot is there already.
const DUPLICATE_OBJECT: &str = "42710";

/// Microseconds from 1970 to 2000, where PostgreSQL's timestamps begin.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A walsender's other end.
pub struct Replication {
    stream: Box<dyn Stream>,
    received: BytesMut,
    place: String,
    clock: Clock,
    /// What the server said when it let us in (the parameter `in_hot_standby`, since PostgreSQL 14).
    is_standby: Option<bool>,
}

impl std::fmt::Debug for Replication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replication({})", self.place)
    }
}

/// `IDENTIFY_SYSTEM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub system_id: SystemId,
    pub timeline: Timeline,
    /// How far WAL is flushed on the server's disk.
    pub flushed: Lsn,
    /// Whether it recovers; servers before PostgreSQL 14 do not say.
    pub is_standby: Option<bool>,
}

/// What a stream brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// Bytes of WAL from `start`; `server_end` is how far the server is.
    Wal { start: Lsn, server_end: Lsn, bytes: Bytes },
    /// The server says how far it is, and may want to know how far we are.
    KeepAlive { server_end: Lsn, wants_reply: bool },
    /// No more WAL: the server stops, or this timeline ends.
    Ended,
}

/// One message: its tag and content.
struct Message {
    tag: u8,
    body: Bytes,
}

impl Replication {
    /// Connects to the server of `data_dir` as a standby.
    pub async fn connect(options: &ConnectOptions, data_dir: &Path, clock: &Clock) -> Result<Replication> {
        let address = Address::find(options, data_dir)?;
        let place = format!("{}:{}, user {}", address.host, address.port, address.user);
        let connecting = Replication::connect_to(&address, options, clock);
        let connected = clock.within(CONNECT, connecting).await;
        connected
            .unwrap_or_else(|| Err(Error::postgres("no answer in time").retryable()))
            .map_err(|e| e.context(format!("could not start replication from {place}")))
    }

    async fn connect_to(address: &Address, options: &ConnectOptions, clock: &Clock) -> Result<Replication> {
        let stream: Box<dyn Stream> = if address.host.starts_with('/') {
            let path = format!("{}/.s.PGSQL.{}", address.host, address.port);
            Box::new(UnixStream::connect(&path).await.map_err(|e| broken("connect", e))?)
        } else {
            let stream = TcpStream::connect((address.host.as_str(), address.port)).await;
            let stream = stream.map_err(|e| broken("connect", e))?;
            stream.set_nodelay(true).map_err(|e| broken("connect", e))?;
            match options.tls()? {
                Some(config) => Box::new(over_tls(stream, config, &address.host).await?),
                None => Box::new(stream),
            }
        };
        let place = format!("{}:{}", address.host, address.port);
        let mut this = Replication {
            stream,
            received: BytesMut::with_capacity(256 << 10),
            place,
            clock: clock.clone(),
            is_standby: None,
        };
        this.log_in(address).await?;
        Ok(this)
    }

    async fn log_in(&mut self, address: &Address) -> Result<()> {
        let parameters = [
            ("user", address.user.as_str()),
            ("database", "replication"),
            ("replication", "true"),
            ("application_name", SLOT),
            ("client_encoding", "UTF8"),
        ];
        self.send(|out| frontend::startup_message(parameters, out)).await?;
        let mut scram = None;
        loop {
            let Message { tag, mut body } = self.message().await?;
            match tag {
                b'R' if body.len() >= 4 => match body.get_u32() {
                    0 => (),
                    3 => self.send_password(password(address)?.as_bytes()).await?,
                    5 if body.len() >= 4 => {
                        let salt = [body[0], body[1], body[2], body[3]];
                        let hash = md5_hash(address.user.as_bytes(), password(address)?.as_bytes(), salt);
                        self.send_password(hash.as_bytes()).await?;
                    }
                    10 => {
                        let proof = ScramSha256::new(password(address)?.as_bytes(), ChannelBinding::unsupported());
                        self.send(|out| frontend::sasl_initial_response(SCRAM_SHA_256, proof.message(), out)).await?;
                        scram = Some(proof);
                    }
                    11 => {
                        let proof = scram.as_mut().ok_or_else(|| unexpected("a SASL challenge"))?;
                        proof.update(&body).map_err(|e| broken("log in", e))?;
                        let answer = proof.message().to_vec();
                        self.send(|out| frontend::sasl_response(&answer, out)).await?;
                    }
                    12 => {
                        let proof = scram.as_mut().ok_or_else(|| unexpected("the end of SASL"))?;
                        proof.finish(&body).map_err(|e| broken("log in", e))?;
                    }
                    kind => {
                        return Err(Error::postgres(format!("authentication method {kind} is not supported"))
                            .hint("allow peer, trust, password, md5 or scram-sha-256 for replication in pg_hba.conf"));
                    }
                },
                b'Z' => return Ok(()),
                b'E' => return Err(Refusal::parse(&body).into_error("log in")),
                b'S' => match body.as_ref() {
                    b"in_hot_standby\0on\0" => self.is_standby = Some(true),
                    b"in_hot_standby\0off\0" => self.is_standby = Some(false),
                    _ => (),
                },
                // The cancellation key, notices.
                b'K' | b'N' => (),
                _ => return Err(unexpected("an answer to the log in")),
            }
        }
    }

    pub async fn identify(&mut self) -> Result<Identity> {
        let row = self.query("IDENTIFY_SYSTEM").await?;
        let field = |index: usize| row.get(index).cloned().flatten().ok_or_else(|| unexpected("IDENTIFY_SYSTEM's row"));
        Ok(Identity {
            system_id: field(0)?.parse()?,
            timeline: field(1)?.parse()?,
            flushed: field(2)?.parse()?,
            is_standby: self.is_standby,
        })
    }

    /// Makes our slot unless it is there; a new one keeps WAL from this moment on. The server's own note of it is looked
    /// at first (replication/slot.c), because an attempt in vain is an error in the server's log.
    pub async fn ensure_slot(&mut self, data_dir: &Path) -> Result<()> {
        if data_dir.join("pg_replslot").join(SLOT).is_dir() {
            return Ok(());
        }
        let command = format!("CREATE_REPLICATION_SLOT {SLOT} PHYSICAL RESERVE_WAL");
        match self.try_query(&command).await? {
            Ok(_) => Ok(()),
            Err(refusal) if refusal.code == DUPLICATE_OBJECT => Ok(()),
            Err(refusal) => Err(refusal
                .into_error("create the replication slot")
                .hint("max_replication_slots and max_wal_senders must have room for one more")),
        }
    }

    /// Begins to stream from `start`. From here on only [`Replication::receive`] and [`Replication::report`] work.
    pub async fn start(&mut self, start: Lsn, timeline: Timeline) -> Result<()> {
        let command = format!("START_REPLICATION SLOT {SLOT} PHYSICAL {start} TIMELINE {timeline}");
        self.send(|out| frontend::query(&command, out)).await?;
        loop {
            let Message { tag, body } = self.message().await?;
            match tag {
                b'W' => return Ok(()),
                b'E' => return Err(Refusal::parse(&body).into_error(format!("stream from {start}"))),
                b'N' | b'S' => (),
                _ => return Err(unexpected("START_REPLICATION's answer")),
            }
        }
    }

    /// The next news of the stream. Dropping the future loses nothing.
    pub async fn receive(&mut self) -> Result<Received> {
        loop {
            let Message { tag, mut body } = self.message().await?;
            match tag {
                b'd' if body.first() == Some(&b'w') && body.len() >= 25 => {
                    body.advance(1);
                    let (start, server_end) = (Lsn(body.get_u64()), Lsn(body.get_u64()));
                    body.advance(8);
                    return Ok(Received::Wal { start, server_end, bytes: body });
                }
                b'd' if body.first() == Some(&b'k') && body.len() >= 18 => {
                    body.advance(1);
                    let server_end = Lsn(body.get_u64());
                    body.advance(8);
                    return Ok(Received::KeepAlive { server_end, wants_reply: body[0] == 1 });
                }
                b'c' | b'C' => return Ok(Received::Ended),
                b'E' => return Err(Refusal::parse(&body).into_error("stream")),
                b'N' | b'S' => (),
                _ => return Err(unexpected("a stream's message")),
            }
        }
    }

    /// Tells the server how far WAL was received and how far it is durable. Nothing is ever applied here, so a commit
    /// that waits for `remote_apply` would wait for ever: we never say that it was.
    pub async fn report(&mut self, written: Lsn, durable: Lsn) -> Result<()> {
        let mut status = Vec::with_capacity(34);
        status.push(b'r');
        for position in [written.0, durable.0, 0] {
            status.extend_from_slice(&position.to_be_bytes());
        }
        status.extend_from_slice(&(self.clock.now().unix_micros() - POSTGRES_EPOCH).to_be_bytes());
        status.push(0);
        self.send(|out| {
            frontend::CopyData::new(&status[..])?.write(out);
            Ok(())
        })
        .await
    }

    /// Ends the stream from our side.
    pub async fn end(&mut self) {
        let _ = self
            .send(|out| {
                frontend::copy_done(out);
                frontend::terminate(out);
                Ok(())
            })
            .await;
    }

    /// The first row of a command's answer.
    async fn query(&mut self, command: &str) -> Result<Vec<Option<String>>> {
        self.try_query(command).await?.map_err(|refusal| refusal.into_error(format!("run {command}")))
    }

    async fn try_query(&mut self, command: &str) -> Result<Result<Vec<Option<String>>, Refusal>> {
        self.send(|out| frontend::query(command, out)).await?;
        let (mut row, mut refused) = (None, None);
        loop {
            let Message { tag, body } = self.message().await?;
            match tag {
                b'D' => row = row.or(Some(fields(body)?)),
                b'E' => refused = Some(Refusal::parse(&body)),
                b'Z' => return Ok(refused.map_or_else(|| Ok(row.unwrap_or_default()), Err)),
                _ => (),
            }
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<()> {
        self.send(|out| frontend::password_message(password, out)).await
    }

    async fn send(&mut self, build: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<()> {
        let mut out = BytesMut::new();
        build(&mut out).map_err(|e| Error::internal("a protocol message").source(e))?;
        self.stream.write_all(&out).await.map_err(|e| broken("write", e))?;
        self.stream.flush().await.map_err(|e| broken("write", e))
    }

    async fn message(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            if self.stream.read_buf(&mut self.received).await.map_err(|e| broken("read", e))? == 0 {
                return Err(Error::postgres("the server closed the connection").retryable());
            }
        }
    }

    fn buffered(&mut self) -> Result<Option<Message>> {
        let Some(head) = self.received.get(..5) else { return Ok(None) };
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if !(4..=MESSAGE_MAX).contains(&length) {
            return Err(unexpected("a message's length"));
        }
        if self.received.len() < length + 1 {
            self.received.reserve(length + 1 - self.received.len());
            return Ok(None);
        }
        let mut message = self.received.split_to(length + 1);
        let tag = message[0];
        message.advance(5);
        Ok(Some(Message { tag, body: message.freeze() }))
    }
}

/// An error the server answered with.
struct Refusal {
    code: String,
    message: String,
    detail: Option<String>,
}

impl Refusal {
    fn parse(body: &[u8]) -> Refusal {
        let fields: Vec<(u8, String)> = body
            .split(|byte| *byte == 0)
            .filter_map(|field| Some((*field.first()?, String::from_utf8_lossy(&field[1..]).into_owned())))
            .collect();
        let field = |code: u8| fields.iter().find(|(of, _)| *of == code).map(|(_, text)| text.clone());
        Refusal { code: field(b'C').unwrap_or_default(), message: field(b'M').unwrap_or_default(), detail: field(b'D') }
    }

    fn into_error(self, doing: impl std::fmt::Display) -> Error {
        let detail = self.detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
        let error = Error::postgres(format!("the server refused to {doing}: {}{detail}", self.message));
        match self.code.as_str() {
            // A server that starts, stops or is out of connections may take us in a moment.
            code if code.starts_with("57") || code.starts_with("53") => error.retryable(),
            // The segment is gone, or the slot was given up for its size: WAL that was not received will never be.
            "58P01" => Error::new(Kind::NotFound, error.to_string()),
            "55000"
                if error.to_string().contains("invalidated") || error.to_string().contains("maximum reserved size") =>
            {
                Error::new(Kind::NotFound, error.to_string())
            }
            code if code.starts_with("28") => error.hint(
                "allow it in pg_hba.conf: local replication all peer, or host replication USER ADDRESS scram-sha-256",
            ),
            _ => error,
        }
    }
}

fn fields(mut row: Bytes) -> Result<Vec<Option<String>>> {
    let short = || unexpected("a row's length");
    let count = if row.len() >= 2 { row.get_u16() } else { return Err(short()) };
    (0..count)
        .map(|_| {
            let length = if row.len() >= 4 { row.get_i32() } else { return Err(short()) };
            let Ok(length) = usize::try_from(length) else { return Ok(None) };
            if row.len() < length {
                return Err(short());
            }
            Ok(Some(String::from_utf8_lossy(&row.split_to(length)).into_owned()))
        })
        .collect()
}

async fn over_tls(mut stream: TcpStream, config: rustls::ClientConfig, host: &str) -> Result<impl Stream + use<>> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(|e| broken("write", e))?;
    if stream.read_u8().await.map_err(|e| broken("read", e))? != b'S' {
        return Err(Error::postgres("the server does not offer TLS").hint("set ssl = on, or PGSSLMODE=disable"));
    }
    let name = rustls::pki_types::ServerName::try_from(host.to_owned())
        .map_err(|_| Error::usage(format!("'{host}' is no host name a certificate could carry")))?;
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    connector.connect(name, stream).await.map_err(|e| broken("start TLS", e))
}

fn password(address: &Address) -> Result<&str> {
    address.password.as_deref().ok_or_else(|| {
        Error::postgres("the server asks for a password")
            .hint("set PGPASSWORD or PGPASSFILE, or allow peer in pg_hba.conf")
    })
}

fn broken(doing: &str, error: std::io::Error) -> Error {
    Error::postgres(format!("the connection to the server broke: could not {doing}")).source(error).retryable()
}

fn unexpected(what: &str) -> Error {
    Error::postgres(format!("{what} was not what the protocol says"))
}
