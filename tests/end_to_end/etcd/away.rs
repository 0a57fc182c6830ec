//! etcd that stops for a while: serving goes on, and everybody is back when it is.

use std::time::Duration;

use sida_tests::Etcd;

use super::{answers, cluster, load, pause, settled};

/// Requests would fail while etcd is away, or its return would shuffle the experts.
#[tokio::test(flavor = "multi_thread")]
async fn serving_goes_on_without_etcd() {
    let mut etcd = Etcd::start(1);
    let mut names = vec!["coordinator-0", "expert-node-0", "expert-node-1"];
    let mut live = cluster(&etcd, &names).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    let before = live.status("coordinator-0").await.expect("a status");
    let running = asked.start();
    etcd.kill(0);
    live.wait("coordinator-0", "that etcd is away", |status| !status.etcd_connected).await;
    // Longer than the leases.
    tokio::time::sleep(pause(Duration::from_secs(4), Duration::from_secs(60))).await;
    let during = live.status("coordinator-0").await.expect("a status");
    assert_eq!((during.placement_epoch, during.nodes.len()), (before.placement_epoch, before.nodes.len()));
    etcd.restart(0);
    live.wait("coordinator-0", "etcd again", |status| status.etcd_connected && !status.leader.is_empty()).await;
    settled(&live, &names).await;
    let after = live.status("coordinator-0").await.expect("a status");
    assert_eq!(after.placement_epoch, before.placement_epoch, "nobody came or went, so nothing moves");
    // Whoever comes now is seen.
    live.start("expert-node-2");
    names.push("expert-node-2");
    settled(&live, &names).await;
    running.stop_as(&right).await;
    let log = live.process("coordinator-0").log();
    assert_eq!(log.matches("etcd is away").count(), 1, "told once: {log}");
}

/// The loss of one of three members of etcd would be seen by requests, or would leave nodes without etcd.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_of_etcd_dies() {
    let mut etcd = Etcd::start(3);
    let mut names = vec!["coordinator-0", "expert-node-0", "expert-node-1"];
    let mut live = cluster(&etcd, &names).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    let running = asked.start();
    let leader = etcd.leader();
    etcd.kill(leader);
    live.start("expert-node-2");
    names.push("expert-node-2");
    settled(&live, &names).await;
    running.stop_as(&right).await;
}
