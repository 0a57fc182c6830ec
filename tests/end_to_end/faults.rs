//! What goes wrong while a cluster serves, one file per fault: under all of it, no request fails that any live node
//! could answer, and no token changes. Real processes; the network's faults come from proxies before them.
//!
//! What CI runs is short. `SIDA_LONG_TESTS=1` kills 200 times, `SIDA_SOAK_SECONDS` sets how long the soak lasts. Every
//! random choice follows from a seed that is printed; `SIDA_SEED` repeats one.
//!
//! How long requests stall is printed always, and asserted where the machine is the test's own (`SIDA_LONG_TESTS`):
//! beside other tests on two cores a process may not run for longer than what is asserted.

mod cancellations;
mod coordinators;
mod kills;
mod lost_holders;
mod network;
mod one_expert;
mod outages;
mod partition;
mod pauses;
mod predictors;
mod soak;

use std::{env, time::Duration};

use rand::{SeedableRng, rngs::StdRng};
use sida_proto::v1::RoutingMode;
use sida_tests::{Load, Sandbox, load_client::Report};

use crate::client::prompts;

/// What a fault may cost a request, beyond what the slowest takes without any.
const STALL_MAX: Duration = Duration::from_millis(300);
/// The same where other tests take the machine: only a request that hangs is above it.
const STALL_MAX_SHARED: Duration = Duration::from_secs(5);

/// Whether there is time, and a machine for this test alone.
pub(crate) fn is_long() -> bool {
    env::var_os("SIDA_LONG_TESTS").is_some_and(|value| value == "1")
}

/// Random choices that can be repeated.
fn random(test: &str) -> StdRng {
    let seed = env::var("SIDA_SEED").ok().map(|seed| seed.parse().expect("SIDA_SEED is a number"));
    let seed = seed.unwrap_or_else(rand::random);
    println!("{test}: SIDA_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Some workers that ask the first coordinator for 40 tokens each.
fn load(sandbox: &Sandbox) -> Load {
    Load {
        channels: sandbox.channels()[..1].to_vec(),
        texts: prompts(),
        mode: RoutingMode::Exact,
        tokens: 40,
        workers: 4,
    }
}

/// What a load returns while nothing is broken: the right answers to all texts, and how long they take once nothing is
/// cold.
async fn fault_free(load: &Load, duration: Duration) -> Report {
    let before = load.every_text().await.asked;
    let report = Report { before, ..load.run(duration).await };
    println!("fault-free: {report}");
    report
}

/// Holds a report under faults against one without: no error, no changed token, no long stall.
fn assert_unharmed(what: &str, report: &Report, normal: &Report) {
    report.assert_as(&normal.answers());
    let stall = report.latency(1.0).saturating_sub(normal.latency(1.0));
    println!("{what}: {report} worst stall beyond the slowest normal request {stall:.1?}");
    let stall_max = if is_long() { STALL_MAX } else { STALL_MAX_SHARED };
    assert!(stall <= stall_max, "{what}: a request took {stall:?} longer than any does normally");
}
