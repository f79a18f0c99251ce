//! The SQL we say to a server, each session with settings under which it can neither hang nor be cut short.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::types::PgLsn;
use tokio_postgres::{Config, NoTls};

use super::process::PostmasterFile;
use super::replication::SLOT;
use super::version::Version;
use crate::error::{Error, IoContext, Result};
use crate::model::{Lsn, SystemId, Timestamp};

/// How to reach the server; what is `None` is found out from its data directory. Named after libpq's parameters.
#[derive(Debug, Clone, Default)]
pub struct ConnectOptions {
    pub host: Option<String>,
    pub port: Option<u16>,
    pub user: Option<String>,
    pub password: Option<String>,
    pub passfile: Option<PathBuf>,
    pub database: Option<String>,
    pub sslmode: Option<String>,
    pub sslrootcert: Option<PathBuf>,
}

/// Where the server is and who we are to it.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<String>,
}

impl Address {
    /// Where the options say, otherwise where `postmaster.pid` says.
    pub fn find(options: &ConnectOptions, data_dir: &Path) -> Result<Address> {
        let running = PostmasterFile::read(data_dir)?;
        let host = match (&options.host, &running) {
            (Some(host), _) => host.clone(),
            (None, Some(running)) => running.host(),
            (None, None) => {
                return Err(Error::postgres(format!("no server runs in {}", data_dir.display()))
                    .hint("start it, or say where it is with PGHOST and PGPORT")
                    .retryable());
            }
        };
        let port = options.port.or(running.map(|running| running.port)).unwrap_or(5432);
        let user = options.user.clone().unwrap_or_else(|| "postgres".to_owned());
        let database = options.database.as_deref().unwrap_or("postgres");
        let from_file = || options.password_from_file(&host, port, &user, database);
        let password = options.password.clone().or_else(from_file);
        Ok(Address { host, port, user, password })
    }
}

/// What a server says of itself.
#[derive(Debug, Clone)]
pub struct Server {
    pub system_id: SystemId,
    pub version: Version,
    pub version_text: String,
    pub data_directory: PathBuf,
    pub in_recovery: bool,
    pub archiving: bool,
}

/// What `pg_backup_stop` returns, and what is asked right after it.
#[derive(Debug, Clone)]
pub struct Stopped {
    pub lsn: Lsn,
    pub backup_label: String,
    pub tablespace_map: Option<String>,
    pub at: Timestamp,
    pub next_xid: u32,
}

/// One session.
#[derive(Debug)]
pub struct Client {
    pub(super) inner: tokio_postgres::Client,
}

impl Client {
    /// Connects to the server of `data_dir`: where the options say, otherwise where its `postmaster.pid` says.
    pub async fn connect(options: &ConnectOptions, data_dir: &Path) -> Result<Client> {
        let address = Address::find(options, data_dir)?;
        let database = options.database.as_deref().unwrap_or("postgres");
        let Address { host, port, user, .. } = &address;
        let mut config = Config::new();
        config.host(host).port(*port).user(user).dbname(database).application_name("perennial");
        config.connect_timeout(Duration::from_secs(10));
        if let Some(password) = &address.password {
            config.password(password);
        }
        let place = format!("{host}:{port}, user {user}, database {database}");
        let failed = |e: tokio_postgres::Error| {
            let error = Error::postgres(format!("could not connect to PostgreSQL at {place}: {}", text_of(&e)))
                .hint("set PGHOST, PGPORT, PGUSER and PGPASSWORD or PGPASSFILE as for psql");
            // A server that starts, stops, or has no room may let us in later; one that does not know us will not.
            let refused =
                e.code().is_some_and(|code| ["28", "3D", "42"].iter().any(|class| code.code().starts_with(class)));
            if refused { error } else { error.retryable() }
        };
        let inner = match options.tls()? {
            None => {
                let (client, connection) = config.connect(NoTls).await.map_err(failed)?;
                tokio::spawn(connection);
                client
            }
            Some(tls) => {
                config.ssl_mode(tokio_postgres::config::SslMode::Require);
                let connector = tokio_postgres_rustls::MakeRustlsConnect::new(tls);
                let (client, connection) = config.connect(connector).await.map_err(failed)?;
                tokio::spawn(connection);
                client
            }
        };
        let client = Client { inner };
        // A backup lasts longer than a timeout made for an application's queries; nor may we wait for a synchronous
        // standby that is waiting for us.
        client
            .execute("SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET client_min_messages = warning; SET synchronous_commit = local;
                      SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'")
            .await?;
        Ok(client)
    }

    pub async fn execute(&self, sql: &str) -> Result<()> {
        self.inner.batch_execute(sql).await.map_err(|e| sql_error(sql, &e))
    }

    /// The first column of the first row, as text.
    pub async fn text(&self, sql: &str) -> Result<String> {
        let row = self.inner.query_one(&format!("SELECT ({sql})::text"), &[]).await.map_err(|e| sql_error(sql, &e))?;
        row.try_get::<_, Option<String>>(0).map(Option::unwrap_or_default).map_err(|e| sql_error(sql, &e))
    }

    async fn parsed<T: FromStr>(&self, sql: &str) -> Result<T> {
        let text = self.text(sql).await?;
        text.parse().map_err(|_| Error::postgres(format!("the server answered '{text}' to: {sql}")))
    }

    pub async fn server(&self) -> Result<Server> {
        let number: u32 = self.parsed("current_setting('server_version_num')").await?;
        let archive_mode = self.text("current_setting('archive_mode')").await?;
        Ok(Server {
            system_id: SystemId(self.parsed("SELECT system_identifier FROM pg_control_system()").await?),
            version: Version::of(number / 10_000)?,
            version_text: self.text("current_setting('server_version')").await?,
            data_directory: PathBuf::from(self.text("current_setting('data_directory')").await?),
            in_recovery: self.text("pg_is_in_recovery()").await? == "true",
            archiving: archive_mode != "off"
                || self
                    .text(&format!("EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{SLOT}' AND active)"))
                    .await?
                    == "true",
        })
    }

    /// Starts a non-exclusive base backup; it ends with [`Client::stop_backup`] or with this session.
    pub async fn start_backup(&self, version: Version, label: &str, fast: bool) -> Result<Lsn> {
        let sql = version.start_backup;
        let row = self.inner.query_one(sql, &[&label, &fast]).await.map_err(|e| sql_error(sql, &e))?;
        let lsn: PgLsn = row.try_get(0).map_err(|e| sql_error(sql, &e))?;
        Ok(Lsn(lsn.into()))
    }

    /// Ends the backup without waiting for the archiver: the repository itself is asked for the WAL.
    pub async fn stop_backup(&self, version: Version) -> Result<Stopped> {
        let sql = version.stop_backup;
        let row = self.inner.query_one(sql, &[]).await.map_err(|e| sql_error(sql, &e))?;
        let column = |e: tokio_postgres::Error| sql_error(sql, &e);
        let lsn: PgLsn = row.try_get(0).map_err(column)?;
        let map: Option<String> = row.try_get(2).map_err(column)?;
        Ok(Stopped {
            lsn: Lsn(lsn.into()),
            backup_label: row.try_get(1).map_err(column)?,
            tablespace_map: map.filter(|map| !map.is_empty()),
            at: self.now().await?,
            next_xid: self.parsed("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint & 4294967295").await?,
        })
    }

    /// Drops a replication slot if it is there; whoever uses it is ended.
    pub async fn drop_slot(&self, name: &str) -> Result<()> {
        let of = format!("FROM pg_replication_slots WHERE slot_name = '{name}'");
        self.execute(&format!("SELECT pg_terminate_backend(active_pid) {of} AND active_pid IS NOT NULL")).await?;
        self.execute(&format!("SELECT pg_drop_replication_slot(slot_name) {of}")).await
    }

    /// How far WAL is flushed on the server's disk.
    pub async fn flushed(&self) -> Result<Lsn> {
        Ok(self.text("pg_current_wal_flush_lsn()").await?.parse()?)
    }

    /// The end of what has been written of WAL, flushed or not; of a standby, of what it has replayed.
    pub async fn inserted(&self) -> Result<Lsn> {
        Ok(self
            .text("CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END")
            .await?
            .parse()?)
    }

    /// How far a standby has replayed WAL.
    pub async fn replayed(&self) -> Result<Lsn> {
        Ok(self.text("pg_last_wal_replay_lsn()").await?.parse()?)
    }

    /// When the last transaction ended that a standby has replayed, by the primary's clock; `None` before the first one since
    /// its start.
    pub async fn last_replayed_commit(&self) -> Result<Option<Timestamp>> {
        const SQL: &str = "(extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000)::bigint";
        let micros = self.text(SQL).await?;
        if micros.is_empty() {
            return Ok(None);
        }
        let micros =
            micros.parse().map_err(|_| Error::postgres(format!("the server answered '{micros}' to: {SQL}")))?;
        Ok(Some(Timestamp::from_unix_micros(micros)))
    }

    /// When the server was started, by its own clock.
    pub async fn started(&self) -> Result<Timestamp> {
        let micros = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint";
        Ok(Timestamp::from_unix_micros(self.parsed(micros).await?))
    }

    /// The server's own clock.
    pub async fn now(&self) -> Result<Timestamp> {
        let micros = self.parsed("(extract(epoch FROM clock_timestamp()) * 1000000)::bigint").await?;
        Ok(Timestamp::from_unix_micros(micros))
    }

    /// The server's own clock, or that of the primary's last commit, should that be ahead of a standby's.
    pub async fn now_of_commits(&self) -> Result<Timestamp> {
        let commit = self.last_replayed_commit().await?;
        let now = self.now().await?;
        Ok(commit.map_or(now, |commit| commit.max(now)))
    }

    /// The databases, by number and name. One whose name is not UTF-8 is called by its number.
    pub async fn databases(&self) -> Result<Vec<(u32, String)>> {
        const SQL: &str = "SELECT oid, datname FROM pg_database ORDER BY oid";
        let rows = self.inner.query(SQL, &[]).await.map_err(|e| sql_error(SQL, &e))?;
        let database = |row: &tokio_postgres::Row| {
            let oid: u32 = row.try_get(0).map_err(|e| sql_error(SQL, &e))?;
            Ok((oid, row.try_get(1).unwrap_or_else(|_| oid.to_string())))
        };
        rows.iter().map(database).collect()
    }

    /// The configuration files in use, wherever they lie.
    pub async fn configuration_files(&self) -> Result<Vec<PathBuf>> {
        const SQL: &str = "SELECT DISTINCT file FROM (SELECT setting AS file FROM pg_settings WHERE name IN ('config_file', 'hba_file', 'ident_file')
                           UNION SELECT sourcefile FROM pg_file_settings) AS files WHERE file <> '' ORDER BY file";
        let rows = self.inner.query(SQL, &[]).await.map_err(|e| sql_error(SQL, &e))?;
        let files = rows.iter().map(|row| row.try_get::<_, String>(0).map(PathBuf::from));
        files.collect::<Result<_, _>>().map_err(|e| sql_error(SQL, &e))
    }
}

impl ConnectOptions {
    /// The password of the first line that fits (manual section 34.16); a file others can read is passed over.
    fn password_from_file(&self, host: &str, port: u16, user: &str, database: &str) -> Option<String> {
        use std::os::unix::fs::MetadataExt;
        let path = self.passfile.as_ref()?;
        let safe = std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.mode() & 0o077 == 0);
        let text = std::fs::read_to_string(path).ok().filter(|_| safe)?;
        let host = if host.starts_with('/') { "localhost" } else { host };
        let wanted = [host.to_owned(), port.to_string(), database.to_owned(), user.to_owned()];
        text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
            let fields = passfile_fields(line);
            let (password, place) = fields.split_last().filter(|(_, place)| place.len() == wanted.len())?;
            let fits = place.iter().zip(&wanted).all(|(field, wanted)| field == "*" || field == wanted);
            fits.then(|| password.clone())
        })
    }

    pub(super) fn tls(&self) -> Result<Option<rustls::ClientConfig>> {
        match self.sslmode.as_deref().unwrap_or("prefer") {
            "disable" | "allow" | "prefer" => return Ok(None),
            "require" | "verify-ca" | "verify-full" => (),
            other => return Err(Error::usage(format!("PGSSLMODE '{other}' is not a mode of libpq"))),
        }
        let Some(path) = &self.sslrootcert else {
            return Err(Error::usage(
                "PGSSLMODE asks for TLS, but PGSSLROOTCERT names no certificate authority to check the server by",
            ));
        };
        use rustls::pki_types::pem::PemObject;
        let mut roots = rustls::RootCertStore::empty();
        let certificates = rustls::pki_types::CertificateDer::pem_file_iter(path)
            .map_err(|e| Error::usage(format!("PGSSLROOTCERT {}: {e}", path.display())))?;
        for certificate in certificates.flatten() {
            roots.add(certificate).map_err(|e| Error::usage(format!("PGSSLROOTCERT {}: {e}", path.display())))?;
        }
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::internal("TLS").source(e))?;
        Ok(Some(config.with_root_certificates(roots).with_no_client_auth()))
    }
}

/// Fields of a password file's line; `\:` and `\\` stand for the bare characters.
fn passfile_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            ':' if fields.len() < 5 => fields.push(String::new()),
            '\\' => fields.last_mut().into_iter().for_each(|field| field.extend(characters.next())),
            other => fields.last_mut().into_iter().for_each(|field| field.push(other)),
        }
    }
    fields
}

fn text_of(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) => format!("{}: {}", said.severity(), said.message()),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}")
        }
    }
}

pub(super) fn sql_error(sql: &str, error: &tokio_postgres::Error) -> Error {
    let start: String = sql.chars().take(80).collect();
    Error::postgres(format!("{} (in: {start})", text_of(error)))
}

/// Whether two paths are one directory.
pub fn same_directory(a: &Path, b: &Path) -> Result<bool> {
    Ok(std::fs::canonicalize(a).on("resolve", a)? == std::fs::canonicalize(b).on("resolve", b)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_comes_from_the_first_fitting_line_of_a_private_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "# comment\nother:*:*:*:no\nlocalhost:5433:*:po\\:st:a\\\\b:c\n*:*:*:*:last\n")
            .expect("written");
        let options = ConnectOptions { passfile: Some(path.clone()), ..ConnectOptions::default() };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        assert_eq!(options.password_from_file("/run", 5433, "po:st", "db").as_deref(), Some("a\\b:c"));
        assert_eq!(options.password_from_file("h", 1, "u", "d").as_deref(), Some("last"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("set");
        assert_eq!(options.password_from_file("h", 1, "u", "d"), None, "a file others can read");
    }
}
