//! Many deaths in a row: machines under load are killed at a random moment, their disk is wiped, and the next one has the
//! address alone. Not part of the ordinary tests; `make torture` runs it, `PERENNIAL_TORTURE_ROUNDS` says how often, and
//! `PERENNIAL_SEED` repeats the moments of a run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, and waits for real processes by a real clock"
)]

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use support::chance::Chance;
use support::clients::Clients;
use support::*;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// What one machine's clients were told, and when it died.
struct Past {
    round: u64,
    told: Vec<(Instant, u64)>,
    died: Instant,
    log: String,
}

impl Past {
    /// How long before the death each missing commit was acknowledged.
    fn missing(&self, there: &BTreeSet<u64>) -> Vec<Duration> {
        let missing = self.told.iter().filter(|(_, id)| !there.contains(id));
        missing.map(|(at, _)| self.died.saturating_duration_since(*at)).collect()
    }
}

fn torture(rpo: &str, bound: Duration) {
    let rounds = number("PERENNIAL_TORTURE_ROUNDS").unwrap_or(5);
    let seed = number("PERENNIAL_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("rpo {rpo}: {rounds} rounds, seed {seed} (PERENNIAL_SEED={seed} repeats the moments)");
    let mut chance = Chance(seed);
    let scratch = Scratch::new();
    let bucket = Bucket::s3();
    let (mut all_told, mut all_missing, mut worst) = (0, 0, Duration::ZERO);
    let mut kept: BTreeSet<u64> = BTreeSet::new();
    let mut past: Option<Past> = None;
    for round in 1..=rounds {
        let mut machine = Machine::new(&scratch, &format!("m{round}"), &bucket);
        let began = Instant::now();
        machine.start(&["--init", "--rpo", rpo, "--backup-every", "30s"]);
        // Now and then a machine dies while it is still coming up.
        if round > 1 && chance.below(4) == 0 {
            std::thread::sleep(Duration::from_millis(chance.below(2500)));
            machine.vanish();
            machine.start(&["--init", "--rpo", rpo, "--backup-every", "30s"]);
        }
        machine.ready();
        let up = began.elapsed();
        if round == 1 {
            machine.with_backup();
        }
        if let Some(past) = past.take() {
            let there: BTreeSet<u64> =
                machine.sql("SELECT id FROM ledger").lines().map(|line| line.parse().expect("a number")).collect();
            let lost_again = kept.iter().filter(|id| !there.contains(id)).count();
            assert_eq!(lost_again, 0, "round {round}: commits that earlier machines had are gone");
            let missing = past.missing(&there);
            let oldest = missing.iter().max().copied().unwrap_or_default();
            println!(
                "round {:>3}: {:>6} acknowledged, {:>4} missing, the oldest {:>4} ms old; up again in {:.1} s",
                past.round,
                past.told.len(),
                missing.len(),
                oldest.as_millis(),
                up.as_secs_f64()
            );
            let lines: Vec<&str> = past.log.lines().collect();
            assert!(
                oldest <= bound,
                "round {}: an acknowledged commit of {oldest:?} before the death is gone; its machine's log ended with:\n{}",
                past.round,
                lines[lines.len().saturating_sub(30)..].join("\n")
            );
            (all_told, all_missing, worst) =
                (all_told + past.told.len(), all_missing + missing.len(), worst.max(oldest));
            kept = there;
        }
        if round == rounds {
            machine.vanish();
            break;
        }
        machine.sql("CREATE TABLE IF NOT EXISTS ledger (id bigint PRIMARY KEY)");
        machine.archived();
        let clients = Clients::start(&machine, 16, round * 1_000_000_000);
        std::thread::sleep(Duration::from_millis(300 + chance.below(4000)));
        let died = Instant::now();
        machine.vanish();
        past = Some(Past { round, told: clients.end(), died, log: machine.log() });
    }
    println!("rpo {rpo}: {all_told} acknowledged, {all_missing} missing, the oldest {} ms old", worst.as_millis());
}

#[test]
#[ignore = "long: make torture"]
fn at_rpo_zero_nothing_acknowledged_is_ever_lost() {
    torture("0", Duration::ZERO);
}

#[test]
#[ignore = "long: make torture"]
fn at_rpo_one_second_never_more_than_a_second_and_a_half_is_lost() {
    torture("1s", Duration::from_millis(1500));
}
