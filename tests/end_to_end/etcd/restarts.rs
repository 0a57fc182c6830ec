//! A rolling restart of every role under load.

use sida_tests::{Etcd, LiveCluster};

use super::{answers, cluster, load, settled};

const NAMES: [&str; 5] = ["coordinator-0", "coordinator-1", "expert-node-0", "expert-node-1", "expert-node-2"];

/// An upgrade would cost requests. The client does what every client of two addresses does: it asks the other
/// coordinator when one refuses it or is gone before it has answered.
#[tokio::test(flavor = "multi_thread")]
async fn every_node_is_restarted_under_load() {
    let etcd = Etcd::start(1);
    let mut live = cluster(&etcd, &NAMES).await;
    let asked = load(&live, &["coordinator-0", "coordinator-1"]).await;
    let right = answers(&asked).await;
    let running = asked.start();
    for name in ["expert-node-0", "expert-node-1", "expert-node-2", "coordinator-0", "coordinator-1"] {
        restart(&mut live, name).await;
        settled(&live, &NAMES).await;
    }
    running.stop_as(&right).await;
}

async fn restart(live: &mut LiveCluster, name: &str) {
    let node = live.take(name);
    let ended = tokio::task::spawn_blocking(move || node.terminate()).await.expect("no panic");
    assert!(ended.success(), "{name} ends well");
    live.start(name);
}
