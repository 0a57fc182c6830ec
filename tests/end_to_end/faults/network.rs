//! What a network does between a coordinator and an expert-node, and between it and everybody else's ends.

use std::time::Duration;

use sida_tests::{
    FaultProxy, Sandbox, SandboxConfig,
    fault_proxy::{Direction, Link},
    load_client::Report,
};
use tokio::time::sleep;

use super::{assert_unharmed, fault_free, load};

/// A cluster whose links can be broken, and what it does while they are not. Each fault of a test gets a link of its
/// own: a node that failed is left alone for longer each time, and a fault that meets no call proves nothing.
async fn start() -> (Sandbox, Report) {
    let config = SandboxConfig { expert_nodes: 3, replicas: 2, proxies: true, ..Default::default() };
    let sandbox = Sandbox::start(config).await;
    let normal = fault_free(&load(&sandbox), Duration::from_millis(1500)).await;
    (sandbox, normal)
}

/// What a load returns while something happens to the link of a node, which is good afterwards.
async fn under(sandbox: &Sandbox, node: &str, fault: impl AsyncFn(&FaultProxy)) -> Report {
    let running = load(sandbox).start();
    sleep(Duration::from_millis(100)).await;
    let proxy = sandbox.proxy(node);
    fault(proxy).await;
    proxy.set(Link::Good);
    sleep(Duration::from_millis(300)).await;
    running.stop().await
}

/// Does something so many times, so far apart.
async fn repeated(times: u32, period: Duration, fault: impl Fn()) {
    for _ in 0..times {
        fault();
        sleep(period).await;
    }
}

/// A link that is dead or reset would fail requests, hold them, or change their tokens.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_is_not_noticed() {
    let (sandbox, normal) = start().await;
    let report = under(&sandbox, "expert-node-0", async |proxy| {
        proxy.set(Link::Dead);
        sleep(Duration::from_millis(400)).await;
        // New connections hang, too.
        proxy.cut();
        sleep(Duration::from_millis(1200)).await;
    })
    .await;
    assert_unharmed("partition without a word", &report, &normal);
    assert!(report.failovers() > 0);

    let report = under(&sandbox, "expert-node-1", async |proxy| {
        proxy.set(Link::Closed);
        proxy.cut();
        sleep(Duration::from_millis(400)).await;
    })
    .await;
    assert_unharmed("connections refused", &report, &normal);
    let report = under(&sandbox, "expert-node-2", async |proxy| {
        repeated(6, Duration::from_millis(130), || proxy.cut()).await;
    })
    .await;
    assert_unharmed("connections reset", &report, &normal);
}

/// A connection that ends within a message would fail its request, or the half of a message be taken for a whole.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_message_is_none() {
    let (sandbox, normal) = start().await;
    for (direction, node) in [(Direction::There, "expert-node-0"), (Direction::Back, "expert-node-1")] {
        let report = under(&sandbox, node, async |proxy| {
            repeated(5, Duration::from_millis(150), || proxy.reset_within_next(direction)).await;
        })
        .await;
        assert_unharmed(&format!("reset in the middle of a message, {direction:?}"), &report, &normal);
        assert!(report.failovers() > 0);
    }
}

/// A bit that flips on its way would become a wrong token.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_bit_is_noticed() {
    let (sandbox, normal) = start().await;
    for (direction, node) in [(Direction::There, "expert-node-0"), (Direction::Back, "expert-node-1")] {
        let report = under(&sandbox, node, async |proxy| {
            repeated(20, Duration::from_millis(50), || proxy.corrupt_next(direction)).await;
        })
        .await;
        assert_unharmed(&format!("a wrong bit, {direction:?}"), &report, &normal);
        assert!(report.failovers() > 0);
    }
}

/// A node behind a link that is slow, or far, would slow every layer of every request down.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_is_passed_over() {
    let (sandbox, normal) = start().await;
    let faults = [
        ("expert-node-0", Link::Slow(50_000)),
        ("expert-node-1", Link::Slow(500_000)),
        ("expert-node-2", Link::Late(Duration::from_millis(10))),
    ];
    for (node, link) in faults {
        let report = under(&sandbox, node, async |proxy| {
            proxy.set(link);
            sleep(Duration::from_millis(1200)).await;
        })
        .await;
        assert_unharmed(&format!("{link:?}"), &report, &normal);
    }
    let again = load(&sandbox).run(Duration::from_millis(500)).await;
    assert_unharmed("afterwards", &again, &normal);
}
