//! Experts without a holder, and a cluster without an expert-node.

use std::time::Duration;

use sida_rpc::Reason;
use sida_tests::{Sandbox, SandboxConfig};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::load;
use crate::client::{generate, greedy, prompts};

/// With the last copy of an expert its requests would be lost, although another node could load it; or a cluster
/// without any expert-node would not say so.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_copy_is_loaded_elsewhere() {
    let coordinator_flags = ["--expert-call-timeout", "2s"].map(str::to_owned).to_vec();
    let mut sandbox = Sandbox::start(SandboxConfig { replicas: 1, coordinator_flags, ..Default::default() }).await;
    let load = load(&sandbox);
    let normal = load.every_text().await.answers();
    sandbox.take("expert-node-0").kill();
    load.run(Duration::from_secs(1)).await.assert_as(&normal);

    sandbox.take("expert-node-1").kill();
    // The first waits for one to come back, for as long as it may; whoever comes after it need not find out anew.
    for most in [5, 1].map(Duration::from_secs) {
        let start = Instant::now();
        let refused = generate(&sandbox.channel(), greedy(&prompts()[0], 4)).await.err().expect("nobody is left");
        assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unavailable, Some(Reason::ExpertUnavailable)));
        println!("nobody is left, told after {:.1?}", start.elapsed());
        assert!(start.elapsed() < most, "it took {:?} to say so", start.elapsed());
    }

    // Whoever comes back is found again, without a new placement.
    sandbox = tokio::task::spawn_blocking(move || {
        sandbox.restart("expert-node-1");
        sandbox
    })
    .await
    .expect("it starts again");
    let start = Instant::now();
    while generate(&sandbox.channel(), greedy(&prompts()[0], 4)).await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "the node that came back is not asked");
        sleep(Duration::from_millis(20)).await;
    }
    println!("the only node was asked again {:.0?} after it listened", start.elapsed());
    load.run(Duration::from_millis(500)).await.assert_as(&normal);
}
