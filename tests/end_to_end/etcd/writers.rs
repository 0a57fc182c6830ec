//! Two coordinators: one writes the placement, and when it cannot, the other.

use std::time::Duration;

use sida_tests::{Etcd, LiveCluster, live_cluster::is_settled};

use super::{EXPERTS, REPLICAS, answers, cluster, load, settled};

/// A coordinator that was paused past its lease would write an older placement over the newer one of its successor.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_writer_writes_no_more() {
    let etcd = Etcd::start(1);
    let mut live = cluster(&etcd, &["coordinator-0", "expert-node-0", "expert-node-1", "coordinator-1"]).await;
    let status = live.status("coordinator-1").await.expect("a status");
    let (first, second) = match status.leader.as_str() {
        "coordinator-0" => ("coordinator-0", "coordinator-1"),
        _ => ("coordinator-1", "coordinator-0"),
    };
    let asked = load(&live, &[second]).await;
    let right = answers(&asked).await;
    let running = asked.start();
    live.process(first).signal("STOP");
    // Work for a writer, which the paused one has not seen to the end.
    live.start("expert-node-2");
    let three = ["expert-node-0", "expert-node-1", "expert-node-2"];
    let taken_over = live
        .wait(second, "the other writer's placement", |s| {
            s.leader == second && is_settled(s, &three, EXPERTS, REPLICAS)
        })
        .await;
    assert!(taken_over.placement_epoch > status.placement_epoch);
    let written = |live: &LiveCluster| live.process(first).log().matches("wrote the placement").count();
    let before = written(&live);
    live.process(first).signal("CONT");
    settled(&live, &["coordinator-0", "coordinator-1", "expert-node-0", "expert-node-1", "expert-node-2"]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(written(&live), before, "it wrote: {}", live.process(first).log());
    for coordinator in [first, second] {
        let status = live.status(coordinator).await.expect("a status");
        assert_eq!(status.leader, second, "{coordinator} sees it");
        assert!(status.placement_epoch >= taken_over.placement_epoch, "{coordinator} went back");
    }
    running.stop_as(&right).await;
}
