//! A deterministic simulation of a cluster that breaks: placement, leases, election, expert calls and their failover,
//! with the real decisions of `sida_routing` and models of everything around them. No clock, no threads, one source of
//! chance: a seed says everything that happens, so a failing one replays to the byte.
//!
//! `SIDA_SIMULATION_SEEDS=1000` runs so many seeds instead of a slice; `SIDA_SIMULATION_SEED=17` runs that one
//! and prints its trace.
//!
//! In reading order: `event`, `core` (time, chance, network), `etcd`, `session`, `coordinator`, `requests`, `driver`,
//! `expert_node`, `faults`, `ledger` (what must hold), `world` (one run); `hundred` measures a large cluster.
//!
//! What is modelled: SIGKILL, SIGSTOP and SIGTERM of any process and its return, partitions and slow links
//! between any two, connections that break, an etcd that is away and comes back with or without its leases,
//! compaction, watch events that are late, repeated or lost, experts that cannot be loaded, callers who leave. What is
//! not: lanes that are full, answers that are malformed, an etcd that forgets what was written, and clocks that run at
//! different speeds.

mod coordinator;
mod core;
mod driver;
mod etcd;
mod event;
mod expert_node;
mod faults;
mod hundred;
mod ledger;
mod requests;
mod session;
mod world;

use ledger::Counts;

/// Seeds of a run in CI.
const SLICE: u64 = 200;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is {value:?}, expected a number")))
}

/// Runs one seed; a violation ends the test with the command that replays it.
fn hold(seed: u64) -> Counts {
    let outcome = world::run(seed, false);
    let Some(violation) = outcome.violation else { return outcome.counts };
    let trace = world::run(seed, true).trace;
    let last: Vec<&str> = trace.lines().rev().take(40).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    panic!(
        "seed {seed}: {violation}\n{}\nreplay: SIDA_SIMULATION_SEED={seed} cargo test --release -p sida-tests \
         --test simulation invariants -- --nocapture",
        last.join("\n")
    );
}

/// Some order of faults would bring wrong placements, lost requests, stalls, or a cluster that does not recover.
#[test]
fn invariants_hold_whatever_breaks() {
    if let Some(seed) = number("SIDA_SIMULATION_SEED") {
        let outcome = world::run(seed, true);
        println!("{}{:?}", outcome.trace, outcome.counts);
        return assert_eq!(outcome.violation, None, "seed {seed}");
    }
    let seeds = number("SIDA_SIMULATION_SEEDS").unwrap_or(SLICE);
    let mut sum = Counts::default();
    for seed in 0..seeds {
        sum.add(&hold(seed));
    }
    println!("{seeds} seeds: {sum:?}");
    // The slice would hold because nothing happened in it.
    assert!(sum.elections > seeds && sum.refused_writes > 0 && sum.stale_calls > 0, "{sum:?}");
    assert!(sum.left_requests > seeds / 2 && sum.straggled > seeds, "{sum:?}");
    assert!(sum.failed_calls > seeds * 5 && sum.placements > seeds * 5 && sum.requests > seeds * 100, "{sum:?}");
}

/// A failing seed could not be replayed.
#[test]
fn a_seed_replays_to_the_byte() {
    for seed in [3, 4] {
        let (first, second) = (world::run(seed, true), world::run(seed, true));
        assert!(first.trace.len() > 100_000, "{} bytes are no trace", first.trace.len());
        assert!(first.trace == second.trace, "seed {seed} went two ways");
        assert_eq!(first.counts, world::run(seed, false).counts, "tracing changes what happens");
    }
}
