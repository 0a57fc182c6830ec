//! What a network does between a coordinator and an expert-node, and between it and everybody else's ends.

use std::time::Duration;

use sida_tests::{
    FaultProxy, Sandbox, SandboxConfig,
    fault_proxy::{Direction, Link},
    load_client::Report,
};
use tokio::time::sleep;

use super::{assert_unharmed, fault_free, load};

const NODE: &str = "expert-node-1";

async fn under(sandbox: &Sandbox, fault: impl AsyncFn(&FaultProxy)) -> Report {
    let running = load(sandbox).start();
    sleep(Duration::from_millis(100)).await;
    let proxy = sandbox.proxy(NODE);
    fault(proxy).await;
    proxy.set(Link::Good);
    sleep(Duration::from_millis(300)).await;
    running.stop().await
}

/// A link that is late, slow, dead, reset or wrong would fail requests, hold them, or change their tokens.
#[tokio::test(flavor = "multi_thread")]
async fn no_fault_of_a_link_is_seen() {
    let config = SandboxConfig { expert_nodes: 3, replicas: 2, proxies: true, ..Default::default() };
    let sandbox = Sandbox::start(config).await;
    let normal = fault_free(&load(&sandbox), Duration::from_secs(2)).await;
    let carried = || sandbox.proxy(NODE).carried();

    let report = under(&sandbox, async |proxy| {
        proxy.set(Link::Dead);
        sleep(Duration::from_millis(400)).await;
        // New connections hang, too.
        proxy.cut();
        sleep(Duration::from_millis(1500)).await;
    })
    .await;
    assert_unharmed("partition without a word", &report, &normal);
    assert!(report.failovers() > 0);

    let report = under(&sandbox, async |proxy| {
        proxy.set(Link::Closed);
        proxy.cut();
        sleep(Duration::from_millis(500)).await;
    })
    .await;
    assert_unharmed("refused connections", &report, &normal);

    let report = under(&sandbox, async |proxy| {
        for _ in 0..8 {
            proxy.cut();
            sleep(Duration::from_millis(150)).await;
        }
    })
    .await;
    assert_unharmed("connections reset", &report, &normal);

    for direction in [Direction::There, Direction::Back] {
        let report = under(&sandbox, async |proxy| {
            for _ in 0..6 {
                proxy.reset_within_next(direction);
                sleep(Duration::from_millis(150)).await;
            }
        })
        .await;
        assert_unharmed(&format!("reset in the middle of a message, {direction:?}"), &report, &normal);
        let report = under(&sandbox, async |proxy| {
            for _ in 0..20 {
                proxy.corrupt_next(direction);
                sleep(Duration::from_millis(60)).await;
            }
        })
        .await;
        assert_unharmed(&format!("a wrong bit, {direction:?}"), &report, &normal);
    }

    let before = carried();
    let report = under(&sandbox, async |proxy| {
        proxy.set(Link::Slow(50_000));
        sleep(Duration::from_millis(1500)).await;
    })
    .await;
    report.assert_as(&normal.answers());
    println!("50 kB/s: {report} {} bytes carried", carried() - before);
    let report = under(&sandbox, async |proxy| {
        proxy.set(Link::Late(Duration::from_millis(5)));
        sleep(Duration::from_millis(1000)).await;
    })
    .await;
    report.assert_as(&normal.answers());
    println!("5 ms late each way: {report}");

    let again = load(&sandbox).run(Duration::from_secs(1)).await;
    assert_unharmed("afterwards", &again, &normal);
}
