//! SIGSTOP and SIGCONT: a node whose sockets stay open and that says nothing.

use std::time::Duration;

use sida_tests::{Sandbox, SandboxConfig};
use tokio::time::sleep;

use super::{assert_unharmed, fault_free, load};

/// A node that hangs would hold requests until somebody's deadline, or not be used again when it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_expert_node_is_passed_over() {
    let config = SandboxConfig { expert_nodes: 3, replicas: 2, ..Default::default() };
    let sandbox = Sandbox::start(config).await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(2)).await;
    // Shorter than anybody takes for a hang, longer, and long enough for its connection to be given up.
    for pause in [50, 500, 4000].map(Duration::from_millis) {
        let running = load.start();
        sleep(Duration::from_millis(200)).await;
        sandbox.process("expert-node-1").signal("STOP");
        sleep(pause).await;
        let paused = running.count();
        sandbox.process("expert-node-1").signal("CONT");
        sleep(Duration::from_millis(1000)).await;
        let report = running.stop().await;
        assert_unharmed(&format!("paused for {pause:?}"), &report, &normal);
        // Shorter ones may fall between two calls where other tests take the machine.
        if pause > Duration::from_secs(1) {
            assert!(paused > 0, "nothing was answered while one of three nodes was paused");
            assert!(report.failovers() > 0, "the pause of {pause:?} hit no call");
        }
    }
    // It is asked again: the others are gone, and it answers.
    let again = load.run(Duration::from_secs(1)).await;
    assert_unharmed("afterwards", &again, &normal);
}
