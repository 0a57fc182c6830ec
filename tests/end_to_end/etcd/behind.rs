//! A node that stands still while etcd goes on, for less than its lease: it comes back to a history that is gone.

use std::time::{Duration, Instant};

use sida_tests::{Etcd, LiveCluster, live_cluster::is_settled};

use super::{EXPERTS, REPLICAS, answers, load, settled};

/// `/sida/default/noise`: a key that no node knows, and that every node is told of.
const NOISE: &str = "L3NpZGEvZGVmYXVsdC9ub2lzZQ==";
/// What a stopped watcher's connection and etcd's own buffers for it hold is less than so many puts of so many bytes.
const PUTS: usize = 400;
const PUT_BASE64_BYTES: usize = 64 << 10;

/// Nodes whose leases outlast what is done to them here.
async fn cluster(etcd: &Etcd, names: &[&str]) -> LiveCluster {
    let mut live = LiveCluster::new(&etcd.endpoints());
    live.set_lease_ttl(Duration::from_secs(30));
    names.iter().for_each(|name| _ = live.start(name));
    settled(&live, names).await;
    live
}

async fn wait_for_log(live: &LiveCluster, name: &str, what: &str) {
    let started = Instant::now();
    while !live.process(name).log().contains(what) {
        assert!(started.elapsed() < Duration::from_secs(20), "{name} does not say {what:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A node whose watch is behind what etcd has compacted would never hear of anything again.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_is_behind_a_compaction() {
    let etcd = Etcd::start(1);
    let mut names = vec!["coordinator-0", "expert-node-0", "expert-node-1"];
    let mut live = cluster(&etcd, &names).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    let running = asked.start();
    for name in ["expert-node-1", "coordinator-0"] {
        live.process(name).signal("STOP");
        let started = Instant::now();
        etcd.put_many(NOISE, &"A".repeat(PUT_BASE64_BYTES), PUTS);
        etcd.ctl(&["compact", &etcd.revision()]);
        println!("{name} stood still for {:.1?}", started.elapsed());
        live.process(name).signal("CONT");
        wait_for_log(&live, name, "the watch is behind what etcd has compacted").await;
    }
    // They follow as before.
    live.start("expert-node-2");
    names.push("expert-node-2");
    settled(&live, &names).await;
    running.stop_as(&right).await;
    for name in ["expert-node-1", "coordinator-0"] {
        let log = live.process(name).log();
        assert!(!log.contains("registering again"), "it has lost its lease: {log}");
    }
}

/// A leader that stood still for less than its lease would lose the leadership, or write a placement by what it knew
/// before: without the node that came meanwhile, or over what somebody else has written.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_pause_costs_no_leadership() {
    let etcd = Etcd::start(1);
    let mut live = cluster(&etcd, &["coordinator-0", "expert-node-0", "expert-node-1", "coordinator-1"]).await;
    let before = live.status("coordinator-1").await.expect("a status");
    let leader = before.leader.clone();
    live.process(&leader).signal("STOP");
    live.start("expert-node-2");
    tokio::time::sleep(Duration::from_secs(3)).await;
    live.process(&leader).signal("CONT");
    let three = ["expert-node-0", "expert-node-1", "expert-node-2"];
    let what = "the new node's share, by the same leader";
    // The placement of two nodes is settled, too, with the third as a member that holds nothing yet.
    let epoch = before.placement_epoch;
    live.wait(&leader, what, |s| {
        s.placement_epoch > epoch && s.leader == leader && is_settled(s, &three, EXPERTS, REPLICAS)
    })
    .await;
    let log = live.process(&leader).log();
    let written: Vec<&str> = log.lines().filter(|line| line.contains("wrote the placement")).collect();
    let nodes = |line: &&str| line.contains("nodes=2") || line.contains("nodes=3");
    assert!(written.iter().all(nodes) && written.last().is_some_and(|line| line.contains("nodes=3")), "{written:?}");
    for told in ["etcd refused a placement", "registering again"] {
        assert!(!log.contains(told), "{log}");
    }
    let others = if leader == "coordinator-0" { "coordinator-1" } else { "coordinator-0" };
    assert_eq!(live.process(others).log().matches("this node writes the placement").count(), 0);
}
