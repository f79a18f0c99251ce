//! Machines that die, pause and come back against a store that lies: no acknowledged byte may ever be lost.
//!
//! Goal: the real claim, seal, log, acknowledgement and collection code (`perennial::repository::log`) keeps one history,
//! whatever the order of events. Method: a seed decides everything (`world.rs`); two or three machines boot, write, are
//! paused, crash at any await and boot again, while requests are refused, lost, late or doubled. What each client was told
//! is compared with what every later boot reads. Then the faults stop, and the next boot must get through.
//!
//! `PERENNIAL_SIM_SEED=n cargo test --test sim` replays one seed with a trace; `PERENNIAL_SIM_SEEDS=n` runs more.
//! Each ablation leaves one check out and must find the loss: that the checks bite is tested too.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test that cannot go on fails"
)]
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "the seed comes from the environment, the trace goes to the terminal"
)]

mod machine;
mod world;

use machine::{Life, Verdict};
use perennial::repository::log::Checks;
use world::{Faults, World};

/// Seeds of an ordinary run: a minute or two on two cores.
const SEEDS: u64 = 3000;

/// Seeds after which an ablation that found nothing has failed.
const ABLATION_SEEDS: u64 = 20_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn simulate(seed: u64, checks: Checks, trace: bool) -> Verdict {
    let faults = match seed % 4 {
        0 => Faults { refused: 3, lost: 2, answer_lost: 3, late: 3, twice: 2 },
        1 => Faults { refused: 0, lost: 0, answer_lost: 10, late: 10, twice: 10 },
        2 => Faults::NONE,
        _ => Faults { refused: 10, lost: 5, answer_lost: 5, late: 2, twice: 1 },
    };
    let world = World::new(seed, faults);
    let life = Life::new(world.clone(), checks, trace);
    let machines = 2 + seed % 2;
    world.run(life.clone().story(machines)).unwrap_or_else(|| Verdict::Stuck("nothing can happen any more".to_owned()))
}

/// Runs seeds side by side; the first that breaks the promise.
fn first_broken(seeds: std::ops::Range<u64>, checks: Checks) -> Option<(u64, Verdict)> {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let found = std::sync::Mutex::new(None);
    let work = || loop {
        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if seed >= seeds.end || found.lock().expect("not poisoned").is_some() {
            return;
        }
        let verdict = simulate(seed, checks, false);
        if !matches!(verdict, Verdict::Kept { .. }) {
            *found.lock().expect("not poisoned") = Some((seed, verdict));
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    found.into_inner().expect("not poisoned")
}

#[test]
fn no_acknowledged_byte_is_ever_lost_and_there_is_one_history() {
    if let Some(seed) = number("PERENNIAL_SIM_SEED") {
        let verdict = simulate(seed, Checks::ALL, true);
        assert!(matches!(verdict, Verdict::Kept { .. }), "seed {seed}: {verdict:?}");
        return;
    }
    let seeds = number("PERENNIAL_SIM_SEEDS").unwrap_or(SEEDS);
    if let Some((seed, verdict)) = first_broken(0..seeds, Checks::ALL) {
        panic!(
            "seed {seed}: {verdict:?}\nreplay: PERENNIAL_SIM_SEED={seed} cargo test --test sim -- --nocapture no_acknowledged"
        );
    }
}

#[test]
fn a_run_is_decided_by_its_seed() {
    for seed in [1, 2, 3] {
        assert_eq!(
            format!("{:?}", simulate(seed, Checks::ALL, false)),
            format!("{:?}", simulate(seed, Checks::ALL, false))
        );
    }
}

#[test]
fn runs_are_worth_something() {
    let (mut boots, mut acknowledged, mut fenced, mut collected) = (0, 0, 0, 0);
    for seed in 0..40 {
        if let Verdict::Kept { boots: b, acknowledged: a, fenced: f, collected: c, .. } =
            simulate(seed, Checks::ALL, false)
        {
            (boots, acknowledged, fenced, collected) = (boots + b, acknowledged + a, fenced + f, collected + c);
        }
    }
    assert!(
        boots > 150 && acknowledged > 1000 && fenced > 100 && collected > 300,
        "{boots} {acknowledged} {fenced} {collected}"
    );
}

fn must_find_a_loss(checks: Checks) {
    let found = first_broken(0..ABLATION_SEEDS, checks);
    assert!(
        matches!(found, Some((_, Verdict::Lost(_)))),
        "the simulation does not see that the check is missing: {found:?}"
    );
}

#[test]
fn without_the_seal_bytes_are_lost() {
    must_find_a_loss(Checks { seals: false, ..Checks::ALL });
}

#[test]
fn without_the_second_look_at_the_bound_bytes_are_lost() {
    must_find_a_loss(Checks { bound_again: false, ..Checks::ALL });
}

#[test]
fn without_the_write_id_bytes_are_lost() {
    must_find_a_loss(Checks { write_id: false, ..Checks::ALL });
}
