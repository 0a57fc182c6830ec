//! Nobody is there for a moment: every expert-node stands still at once, or all of them are started anew.

use std::time::Duration;

use sida_tests::{Sandbox, SandboxConfig, load_client::Report};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request};

use super::{STALL_MAX_SHARED, fault_free, load};
use crate::client::{greedy, prompts};
use sida_proto::v1::inference_client::InferenceClient;

const NODES: [&str; 3] = ["expert-node-0", "expert-node-1", "expert-node-2"];

async fn start() -> Sandbox {
    Sandbox::start(SandboxConfig { expert_nodes: NODES.len(), replicas: 2, ..Default::default() }).await
}

/// No error, no changed token, and no wait that is much longer than the outage.
fn assert_waited(what: &str, outage: Duration, report: &Report, normal: &Report) {
    println!("{what}: {report} longest {:.1?} beyond the outage", report.latency(1.0).saturating_sub(outage));
    report.assert_as(&normal.answers());
    let most = normal.latency(1.0) + outage + STALL_MAX_SHARED;
    assert!(report.latency(1.0) <= most, "{what}: a request took {:?}, {most:?} at most", report.latency(1.0));
}

/// A second in which no node answers would fail every request of that second; or requests would go on waiting when the
/// nodes are back.
#[tokio::test(flavor = "multi_thread")]
async fn everybody_stands_still() {
    let sandbox = start().await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(1)).await;
    // Shorter than anybody takes for the end of a connection; longer than that.
    for pause in [1000, 4500].map(Duration::from_millis) {
        let running = load.start();
        sleep(Duration::from_millis(300)).await;
        NODES.iter().for_each(|name| sandbox.process(name).signal("STOP"));
        sleep(pause).await;
        NODES.iter().for_each(|name| sandbox.process(name).signal("CONT"));
        sleep(Duration::from_millis(700)).await;
        let report = running.stop().await;
        assert_waited(&format!("all stopped for {pause:?}"), pause, &report, &normal);
    }
}

/// A cluster whose nodes are all killed would fail what is under way, although they are back within a second.
#[tokio::test(flavor = "multi_thread")]
async fn everybody_is_started_anew() {
    let mut sandbox = start().await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_secs(1)).await;
    let running = load.start();
    sleep(Duration::from_millis(300)).await;
    let killed = Instant::now();
    NODES.iter().for_each(|name| sandbox.take(name).kill());
    sleep(Duration::from_millis(500)).await;
    sandbox = tokio::task::spawn_blocking(move || {
        NODES.iter().for_each(|name| sandbox.restart(name));
        sandbox
    })
    .await
    .expect("they start again");
    let outage = killed.elapsed();
    sleep(Duration::from_millis(500)).await;
    let report = running.stop().await;
    assert_waited("all killed and started again", outage, &report, &normal);
    drop(sandbox);
}

/// A caller whose time is up would wait for an outage to end, and what nobody waits for would be worked on after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_wait() {
    let sandbox = start().await;
    let load = load(&sandbox);
    let normal = fault_free(&load, Duration::from_millis(500)).await;
    NODES.iter().for_each(|name| sandbox.process(name).signal("STOP"));
    // Later than all connections are given up, so that it is the wait for a node that has to end.
    let patience = Duration::from_secs(5);
    let mut request = Request::new(greedy(&prompts()[0], 4));
    request.set_timeout(patience);
    let asked = Instant::now();
    let answer =
        async { InferenceClient::new(sandbox.channel()).generate(request).await?.into_inner().message().await };
    let status = answer.await.expect_err("nobody computes it");
    let took = asked.elapsed();
    println!("told {took:.1?} after it asked for an answer within {patience:?}: {status}");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(took >= patience && took < patience + Duration::from_secs(1), "told after {took:?}");
    let idle = super::cancellations::idle(&sandbox).await;
    println!("idle {idle:.0?} after");
    assert!(idle < Duration::from_secs(2), "it is still waited for by nobody {idle:?} later");
    NODES.iter().for_each(|name| sandbox.process(name).signal("CONT"));
    load.run(Duration::from_millis(500)).await.assert_as(&normal.answers());
}
