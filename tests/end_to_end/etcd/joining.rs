//! Nodes that come in any order, and go.

use sida_rpc::Reason;
use sida_tests::{
    Etcd, LiveCluster,
    live_cluster::{LEASE_TTL, healthy, is_settled},
};
use tonic::Code;

use super::{EXPERTS, REPLICAS, answers, cluster, load, settled};
use crate::client::{generate, greedy, prompts};

/// A cluster would start only in one order: etcd, then experts, then the coordinator; and say it is ready when it is not.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_come_in_any_order() {
    let etcd = Etcd::prepare(1, None);
    let mut live = LiveCluster::new(&etcd.endpoints());
    live.start("coordinator-0");
    let refused = generate(&live.channel("coordinator-0").await, greedy(&prompts()[0], 2)).await.err();
    let refused = refused.expect("nobody can compute an expert");
    assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unavailable, Some(Reason::ExpertUnavailable)));
    assert!(refused.message().contains("no expert-node"), "{}", refused.message());
    assert!(!live.is_serving("coordinator-0").await, "it is not ready without an expert-node");
    live.start("expert-node-0");
    let etcd = etcd.started();
    settled(&live, &["coordinator-0", "expert-node-0"]).await;
    let asked = load(&live, &["coordinator-0"]).await;
    answers(&asked).await;
    // Everything is where an operator would look for it.
    let keys = etcd.ctl(&["get", "--prefix", "--keys-only", "/sida/default/"]);
    for key in ["leader", "members/coordinator-0", "members/expert-node-0", "placement"] {
        assert!(keys.lines().any(|line| line == format!("/sida/default/{key}")), "{key}: {keys}");
    }
}

/// Experts of a dead node would stay without their copies, and requests would fail meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn the_copies_of_a_dead_node_are_restored() {
    let etcd = Etcd::start(1);
    let mut live = cluster(&etcd, &["coordinator-0", "expert-node-0", "expert-node-1", "expert-node-2"]).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    let epoch = live.status("coordinator-0").await.expect("a status").placement_epoch;
    let running = asked.start();
    live.take("expert-node-1").kill();
    let left = ["expert-node-0", "expert-node-2"];
    let started = std::time::Instant::now();
    let status =
        live.wait("coordinator-0", "the copies of the dead node", |s| is_settled(s, &left, EXPERTS, REPLICAS)).await;
    println!("restored {:?} after the kill, of which {LEASE_TTL:?} are the lease", started.elapsed());
    assert!(status.placement_epoch > epoch);
    // It comes back under its name, and gets its share again.
    live.start("expert-node-1");
    settled(&live, &["coordinator-0", "expert-node-0", "expert-node-1", "expert-node-2"]).await;
    running.stop_as(&right).await;
}

/// A node that is told to end would stay in the placement until its lease runs out, and be asked in vain.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_ends_leaves_first() {
    let etcd = Etcd::start(1);
    let mut live = cluster(&etcd, &["coordinator-0", "expert-node-0", "expert-node-1"]).await;
    let node = live.take("expert-node-0");
    let started = std::time::Instant::now();
    assert!(tokio::task::spawn_blocking(move || node.terminate()).await.expect("no panic").success());
    assert!(started.elapsed() < LEASE_TTL, "it waited for something: {:?}", started.elapsed());
    // The coordinator has placed everything anew already.
    let status = live.status("coordinator-0").await.expect("a status");
    assert_eq!(healthy(&status, "expert-node"), ["expert-node-1"]);
    let held: Vec<_> = status.nodes.iter().filter(|node| node.experts_held > 0).map(|node| &node.node).collect();
    assert_eq!(held, ["expert-node-1"]);
    settled(&live, &["coordinator-0", "expert-node-1"]).await;
}

/// A node with room for a fraction of what is placed on it would never say that it is ready: the node whose place it
/// takes would be asked for ever, and copies of a dead one never counted as restored.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_little_room_is_ready() {
    let etcd = Etcd::start(1);
    let mut live = LiveCluster::new(&etcd.endpoints());
    live.start("coordinator-0");
    live.start("expert-node-0");
    settled(&live, &["coordinator-0", "expert-node-0"]).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    // What is asked for competes with what is placed for the little room that there is.
    let running = asked.start();
    live.set_expert_memory("2%");
    live.start("expert-node-1");
    settled(&live, &["coordinator-0", "expert-node-0", "expert-node-1"]).await;
    live.take("expert-node-0").kill();
    let status = live.wait("coordinator-0", "the small node alone", |s| is_settled(s, &["expert-node-1"], EXPERTS, 1));
    let status = status.await;
    let small = status.nodes.iter().find(|node| node.node == "expert-node-1").expect("it is a member");
    assert_eq!((small.experts_held, small.ready_epoch >= status.placement_epoch), (EXPERTS, true));
    running.stop_as(&right).await;
}
