//! SIGKILL at random moments under load.

use std::time::Duration;

use rand::Rng;
use sida_tests::{Sandbox, SandboxConfig};
use tokio::time::sleep;

use super::{assert_unharmed, fault_free, is_long, load, random};

/// The death of an expert-node would fail requests, change their tokens, or hold them up.
#[tokio::test(flavor = "multi_thread")]
async fn expert_nodes_are_killed_under_load() {
    let (kills, normal) = if is_long() { (200, 20) } else { (5, 2) };
    let mut random = random("kills");
    let config = SandboxConfig { expert_nodes: 3, replicas: 2, ..Default::default() };
    let mut sandbox = Sandbox::start(config).await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(normal)).await;
    let running = load.start();
    for kill in 0..kills {
        sleep(Duration::from_millis(random.random_range(100..600))).await;
        let name = format!("expert-node-{}", random.random_range(0..3));
        sandbox.take(&name).kill();
        sleep(Duration::from_millis(random.random_range(50..500))).await;
        // Starting blocks until the node listens.
        sandbox = tokio::task::spawn_blocking(move || {
            sandbox.restart(&name);
            sandbox
        })
        .await
        .expect("it starts again");
        if kill % 20 == 19 {
            println!("{} kills, {} requests", kill + 1, running.count());
        }
    }
    sleep(Duration::from_millis(500)).await;
    let report = running.stop().await;
    assert_unharmed(&format!("{kills} kills"), &report, &normal);
    assert!(report.failovers() > 0, "no kill hit a call");
}
