//! A node whose network cable is pulled: packets that nobody answers. In a network namespace where this machine allows
//! one; elsewhere `network` has the like of it, by a proxy.

use std::{collections::BTreeMap, time::Duration};

use sida_tests::{Namespace, Sandbox, SandboxConfig};
use tokio::time::sleep;

use super::{assert_unharmed, fault_free, load};

/// Requests would wait for a node that is cut off until the kernel gives its connections up, a quarter of an hour.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_cut_off() {
    let namespace = match Namespace::create() {
        Ok(namespace) => namespace,
        Err(reason) => return println!("SKIPPED: no network namespace here, {reason}"),
    };
    let name = "expert-node-1";
    let namespaces = BTreeMap::from([(name.to_owned(), namespace)]);
    let config = SandboxConfig { expert_nodes: 3, replicas: 2, ..Default::default() };
    let sandbox = Sandbox::start_within(config, namespaces).await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(1)).await;
    for cut in [300, 4000].map(Duration::from_millis) {
        let running = load.start();
        sleep(Duration::from_millis(200)).await;
        sandbox.namespace(name).cut();
        sleep(cut).await;
        sandbox.namespace(name).heal();
        sleep(Duration::from_millis(1500)).await;
        let report = running.stop().await;
        assert_unharmed(&format!("cut off for {cut:?}"), &report, &normal);
        // A short one may fall between two calls where other tests take the machine.
        assert!(cut < Duration::from_secs(1) || report.failovers() > 0, "it hit no call");
    }
    let again = load.run(Duration::from_millis(500)).await;
    assert_unharmed("afterwards", &again, &normal);
}
