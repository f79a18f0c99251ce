//! What is asked of the restored server: amcheck over everything, and the operator's own assertions.

use crate::error::Result;
use crate::events::{Event, Events, Level};
use crate::postgres::Client;
use crate::repository::DrillRecord;

use super::Options;
use super::sandbox::Server;

/// Findings of a drill that are noted; more say nothing new.
const FAILURES_MAX: usize = 100;

const DATABASES: &str = "SELECT coalesce(json_agg(datname ORDER BY datname), '[]') FROM pg_database WHERE datallowconn";

/// B-trees that are in use (amcheck looks at no others), and tables (`verify_heapam` is there from PostgreSQL 14 on).
const INDEXES: &str = "SELECT coalesce(json_agg(c.oid::bigint ORDER BY c.oid), '[]') FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid";
const TABLES: &str = "SELECT coalesce(json_agg(c.oid::bigint ORDER BY c.oid), '[]') FROM pg_class c JOIN pg_am a ON a.oid = c.relam
    WHERE a.amname = 'heap' AND c.relkind IN ('r', 't', 'm') AND c.relpersistence = 'p' AND EXISTS (SELECT FROM pg_proc WHERE proname = 'verify_heapam')";

pub struct Checks<'a> {
    pub server: &'a Server,
    pub options: &'a Options,
    pub events: &'a Events,
}

impl Checks<'_> {
    pub async fn all(&self, record: &mut DrillRecord) -> Result<()> {
        if self.options.amcheck {
            self.amcheck(record).await?;
        }
        let database = self.options.database.as_deref().unwrap_or("postgres");
        if !self.options.assertions.is_empty() {
            let client = self.server.connect(database).await?;
            for assertion in &self.options.assertions {
                self.assert(&client, assertion, record).await;
            }
        }
        Ok(())
    }

    async fn assert(&self, client: &Client, assertion: &str, record: &mut DrillRecord) {
        match client.text(assertion.trim().trim_end_matches(';')).await {
            Ok(answer) if matches!(answer.as_str(), "true" | "t") => {
                record.checked.push(format!("assertion: {assertion}"))
            }
            Ok(answer) => fail(record, format!("assertion: {assertion}: the answer is '{answer}', not true")),
            Err(error) => fail(record, format!("assertion: {assertion}: {error}")),
        }
    }

    async fn amcheck(&self, record: &mut DrillRecord) -> Result<()> {
        let databases: Vec<String> = list(&self.server.connect("postgres").await?, DATABASES).await?;
        let (mut indexes, mut tables) = (0, 0);
        for database in &databases {
            let client = self.server.connect(database).await?;
            if client.text("SELECT count(*) FROM pg_available_extensions WHERE name = 'amcheck'").await? == "0" {
                record.left_out.push("amcheck is not installed".to_owned());
                return Ok(());
            }
            client.execute("CREATE EXTENSION IF NOT EXISTS amcheck").await?;
            let schema = client
                .text("SELECT quote_ident(nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = 'amcheck'")
                .await?;
            for index in list::<u32>(&client, INDEXES).await? {
                indexes += 1;
                let sql = format!("SELECT {schema}.bt_index_check({index}::regclass, true)");
                if let Err(error) = client.execute(&sql).await {
                    let name = client.text(&format!("{index}::regclass")).await?;
                    fail(record, format!("database {database}, index {name}: {error}"));
                }
            }
            for table in list::<u32>(&client, TABLES).await? {
                tables += 1;
                let sql = format!(
                    "SELECT min(format('block %s, offset %s: %s', blkno, offnum, msg)) FROM {schema}.verify_heapam({table}::regclass)"
                );
                let found = match client.text(&sql).await {
                    Ok(found) => found,
                    Err(error) => error.to_string(),
                };
                if !found.is_empty() {
                    let name = client.text(&format!("{table}::regclass")).await?;
                    fail(record, format!("database {database}, table {name}: {found}"));
                }
            }
            self.events.emit(Event::Note { level: Level::Detail, text: format!("database {database} checked") });
        }
        record
            .checked
            .push(format!("{indexes} indexes and {tables} tables of {} databases, with amcheck", databases.len()));
        Ok(())
    }
}

async fn list<T: serde::de::DeserializeOwned>(client: &Client, sql: &str) -> Result<Vec<T>> {
    let text = client.text(sql).await?;
    serde_json::from_str(&text).map_err(|e| crate::error::Error::internal("a list of the server").source(e))
}

fn fail(record: &mut DrillRecord, what: String) {
    if record.failures.len() < FAILURES_MAX {
        record.failures.push(what);
    }
}
