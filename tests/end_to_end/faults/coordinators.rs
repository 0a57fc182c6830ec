//! Coordinators behind one address: one of two ends while both answer.

use std::time::Duration;

use sida_tests::{Load, Sandbox, SandboxConfig};
use tokio::time::sleep;

use super::{fault_free, load};

/// A rolling update of the coordinators would fail requests.
#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_ends_under_load() {
    let mut sandbox = Sandbox::start(SandboxConfig { coordinators: 2, ..Default::default() }).await;
    let load = Load { channels: sandbox.channels(), ..load(&sandbox) };
    let normal = fault_free(&load, Duration::from_secs(1)).await;
    let running = load.start();
    sleep(Duration::from_millis(500)).await;
    let ending = sandbox.take("coordinator-0");
    let ended = tokio::task::spawn_blocking(move || ending.terminate()).await.expect("it ends");
    assert!(ended.success(), "{ended}");
    sleep(Duration::from_millis(500)).await;
    let report = running.stop().await;
    report.assert_as(&normal.answers());
    let moved = report.asked.iter().filter(|asked| asked.moved > 0).count();
    println!("a coordinator ended: {report} {moved} went on with the other");
    assert!(moved > 0, "nobody went on with the other");
}
