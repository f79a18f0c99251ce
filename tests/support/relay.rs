//! A way to the store that can be held up, cut, or made to answer that it cannot now.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    Open = 0,
    /// Nothing gets through, and nobody is told.
    Stalled = 1,
    /// Connections are refused and broken.
    Cut = 2,
    /// Every request is answered 503.
    Busy = 3,
}

pub struct Relay {
    pub endpoint: String,
    line: Arc<AtomicU8>,
    brought: Arc<AtomicU64>,
}

impl Relay {
    /// In front of `http://HOST:PORT`.
    pub fn to(endpoint: &str) -> Relay {
        let store: SocketAddr = endpoint.trim_start_matches("http://").parse().expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let line = Arc::new(AtomicU8::new(Line::Open as u8));
        let brought = Arc::new(AtomicU64::new(0));
        let (state, count) = (Arc::clone(&line), Arc::clone(&brought));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (state, count) = (Arc::clone(&state), Arc::clone(&count));
                std::thread::spawn(move || serve(client, store, &state, &count));
            }
        });
        Relay { endpoint: format!("http://{address}"), line, brought }
    }

    /// Bytes that the store has sent since this was asked last.
    pub fn brought(&self) -> u64 {
        self.brought.swap(0, Ordering::SeqCst)
    }

    pub fn set(&self, line: Line) {
        self.line.store(line as u8, Ordering::SeqCst);
    }
}

fn is(state: &AtomicU8, line: Line) -> bool {
    state.load(Ordering::SeqCst) == line as u8
}

fn serve(mut client: TcpStream, store: SocketAddr, state: &Arc<AtomicU8>, brought: &Arc<AtomicU64>) {
    if is(state, Line::Cut) {
        return;
    }
    if is(state, Line::Busy) {
        let _ = client.set_read_timeout(Some(Duration::from_millis(200)));
        let _ = client.read(&mut [0; 65536]);
        let body = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>";
        let _ = write!(
            client,
            "HTTP/1.1 503 Slow Down\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        return;
    }
    let Ok(server) = TcpStream::connect(store) else { return };
    let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else { return };
    let (back, brought) = (Arc::clone(state), Arc::clone(brought));
    let backwards = std::thread::spawn(move || copy(server_too, client_too, &back, &brought));
    copy(client, server, state, &AtomicU64::new(0));
    let _ = backwards.join();
}

/// Copies until either end closes or the line is not open any more, and counts.
fn copy(mut from: TcpStream, mut to: TcpStream, state: &AtomicU8, count_to: &AtomicU64) {
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    let mut buffer = vec![0; 64 << 10];
    loop {
        while is(state, Line::Stalled) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !is(state, Line::Open) {
            break;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                while is(state, Line::Stalled) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                count_to.fetch_add(count as u64, Ordering::SeqCst);
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => (),
            Err(_) => break,
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}
