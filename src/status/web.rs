//! The board over HTTP: `/ready` for load balancers and orchestrators, `/status` as JSON, `/metrics` for Prometheus.

use std::path::Path;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;

use super::Board;
use crate::error::{Error, IoContext, Kind, Result};

fn router(board: Board) -> Router {
    Router::new()
        .route("/ready", get(ready))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .with_state(board)
}

/// Serves on an address of the machine until dropped.
pub async fn serve(board: Board, address: &str) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|e| {
        Error::new(Kind::Local, format!("could not listen on {address}"))
            .source(e)
            .hint("choose another --http address")
    })?;
    axum::serve(listener, router(board)).await.on("serve", address)
}

/// Serves on a socket that only the server's user can open.
pub async fn serve_on_socket(board: Board, path: &Path) -> Result<()> {
    crate::disk::remove_if_there(path)?;
    let listener = tokio::net::UnixListener::bind(path).on("listen on", path)?;
    axum::serve(listener, router(board)).await.on("serve", path)
}

async fn ready(State(board): State<Board>) -> impl IntoResponse {
    match board.is_ready() {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

async fn status(State(board): State<Board>) -> impl IntoResponse {
    axum::Json(board.report())
}

async fn metrics(State(board): State<Board>) -> impl IntoResponse {
    let report = board.report();
    let gauges = [
        ("ready", "Whether clients are served and WAL is not behind", f64::from(u8::from(board.is_ready()))),
        ("generation", "The generation this server writes under", f64::from(report.generation.0)),
        ("wal_durable_lsn_bytes", "Position up to which WAL is durable in the repository", report.durable_lsn.0 as f64),
        ("wal_server_lsn_bytes", "Position up to which WAL is flushed on the server", report.server_lsn.0 as f64),
        ("wal_behind_bytes", "WAL that would be lost with the machine now", report.bytes_behind as f64),
        ("wal_behind_seconds", "Age of the oldest WAL that is not durable", report.seconds_behind),
        ("log_entries_last_hour", "Requests with WAL in the last hour", report.entries_last_hour as f64),
    ];
    let text: String = gauges
        .iter()
        .map(|(name, help, value)| {
            format!("# HELP perennial_{name} {help}.\n# TYPE perennial_{name} gauge\nperennial_{name} {value}\n")
        })
        .collect();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}
