//! Nodes that lose their place in etcd without noticing anything else.

use std::time::{Duration, Instant};

use sida_tests::Etcd;

use super::{answers, cluster, load, settled};

/// A node whose lease is gone would serve on and never be placed on again.
#[tokio::test(flavor = "multi_thread")]
async fn lost_leases_and_keys_are_got_again() {
    let etcd = Etcd::start(1);
    let mut names = vec!["coordinator-0", "expert-node-0", "expert-node-1"];
    let mut live = cluster(&etcd, &names).await;
    let asked = load(&live, &["coordinator-0"]).await;
    let right = answers(&asked).await;
    let running = asked.start();
    // The history is gone, and then every lease, the leader's among them.
    etcd.ctl(&["compact", &etcd.revision()]);
    for lease in etcd.ctl(&["lease", "list"]).lines().skip(1) {
        etcd.ctl(&["lease", "revoke", lease.trim()]);
    }
    wait_for_keys(&etcd, &["leader", "members/coordinator-0", "members/expert-node-0", "members/expert-node-1"]).await;
    settled(&live, &names).await;
    // Somebody tidied up what was not theirs.
    etcd.ctl(&["del", "/sida/default/members/expert-node-1"]);
    wait_for_keys(&etcd, &["members/expert-node-1"]).await;
    settled(&live, &names).await;
    etcd.ctl(&["del", "/sida/default/placement"]);
    wait_for_keys(&etcd, &["placement"]).await;
    live.start("expert-node-2");
    names.push("expert-node-2");
    settled(&live, &names).await;
    running.stop_as(&right).await;
}

/// Waits until etcd holds these keys of the cluster.
async fn wait_for_keys(etcd: &Etcd, keys: &[&str]) {
    let started = Instant::now();
    loop {
        let listed = etcd.ctl(&["get", "--prefix", "--keys-only", "/sida/default/"]);
        let is_there = |key: &&&str| listed.lines().any(|line| line == format!("/sida/default/{key}"));
        if keys.iter().filter(is_there).count() == keys.len() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{keys:?} do not come back: {listed}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
