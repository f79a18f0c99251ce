//! Clients whose memory of what they were told can be compared with what the database has.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{Machine, wait_until};

/// Clients that append to a ledger, one transaction each, and note outside the database every commit they were told of.
pub struct Clients {
    children: Vec<Child>,
    readers: Vec<std::thread::JoinHandle<()>>,
    told: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Clients {
    /// Each client numbers its rows in a range of its own.
    pub fn start(machine: &Machine, count: u64, first: u64) -> Clients {
        machine.sql("CREATE TABLE IF NOT EXISTS ledger (id bigint PRIMARY KEY)");
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut clients = Clients { children: Vec::new(), readers: Vec::new(), told: Arc::clone(&told) };
        for client in 0..count {
            let mut psql = machine.client("psql");
            psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]);
            psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = psql.spawn().expect("psql runs");
            let mut input = child.stdin.take().expect("a pipe");
            let output = BufReader::new(child.stdout.take().expect("a pipe"));
            let told = Arc::clone(&told);
            let mut id = first + client * 1_000_000;
            clients.readers.push(std::thread::spawn(move || {
                let mut lines = output.lines();
                // RETURNING is sent before the commit is: only the next statement's answer proves that it was told.
                while writeln!(input, "INSERT INTO ledger VALUES ({id});\n\\echo {id}")
                    .and_then(|()| input.flush())
                    .is_ok()
                {
                    match lines.next() {
                        Some(Ok(line)) if line == id.to_string() => {
                            told.lock().expect("not poisoned").push((Instant::now(), id));
                        }
                        _ => return,
                    }
                    id += 1;
                }
            }));
            clients.children.push(child);
        }
        clients
    }

    pub fn told(&self) -> usize {
        self.told.lock().expect("not poisoned").len()
    }

    pub fn wait_for(&self, more: usize) {
        let enough = self.told() + more;
        wait_until("the clients commit", || self.told() >= enough);
    }

    /// Ends the clients; the ids they were told of, with the moment of each.
    pub fn end(mut self) -> Vec<(Instant, u64)> {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        std::mem::take(&mut self.told.lock().expect("not poisoned"))
    }
}

/// What the database has of the ledger.
pub fn ledger(machine: &Machine) -> BTreeSet<u64> {
    machine.sql("SELECT id FROM ledger").lines().map(|line| line.parse().expect("a number")).collect()
}
