//! Predictor-nodes that are dead, slow, wrong, or of another model: requests run `exact` without hints, say so in
//! their trace, and are answered as ever.

use std::{collections::BTreeMap, time::Duration};

use sida_proto::v1::{RoutingMode, StatusRequest, cluster_client::ClusterClient};
use sida_tests::{
    Load, Sandbox, SandboxConfig,
    binary::repository,
    fault_proxy::{Direction, Link},
    load_client::Report,
};
use tokio::time::sleep;

use super::load;

fn unpredicted(report: &Report) -> usize {
    report.asked.iter().filter(|asked| asked.unpredicted).count()
}

/// The answers that must come whatever the predictor does.
async fn answers(load: &Load) -> BTreeMap<usize, Vec<u32>> {
    load.every_text().await.answers()
}

/// Asks in both modes at once, none of which may fail, and `exact` answers must be as `expected`. Returns what became of the
/// requests in `guided`: all of them are predicted, those in `exact` only while nodes gain by it.
async fn run(load: &Load, duration: Duration, expected: &BTreeMap<usize, Vec<u32>>) -> Report {
    let guided = Load { mode: RoutingMode::Guided, ..load.clone() };
    let (exact, guided) = tokio::join!(load.run(duration), guided.run(duration));
    exact.assert_as(expected);
    assert!(guided.errors().is_empty(), "{:?}", guided.errors());
    guided
}

/// A bad predictor would fail requests, change their tokens, or cost each of them its timeout.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_predictor_costs_hints_only() {
    let config = SandboxConfig { predictor_nodes: 1, proxies: true, ..Default::default() };
    let mut sandbox = Sandbox::start(config).await;
    let load = load(&sandbox);
    let expected = answers(&load).await;
    let predictor = "predictor-node-0";
    let normal = run(&load, Duration::from_secs(1), &expected).await.latency(1.0);

    // Slow: it answers after the coordinator's patience, if at all.
    sandbox.process(predictor).signal("STOP");
    let slow = run(&load, Duration::from_secs(2), &expected).await;
    println!("paused: {slow}");
    assert_eq!(unpredicted(&slow), slow.asked.len());
    // One timeout of 200 ms for whoever finds out, and not one for each of 40 steps; the machine may be slower than it was.
    let limit = 2 * normal + Duration::from_secs(1);
    let waited = slow.asked.iter().filter(|asked| asked.latency > limit).count();
    assert!(waited * 2 < slow.asked.len(), "{waited} of {} requests waited for it", slow.asked.len());

    sandbox.process(predictor).signal("CONT");
    sleep(Duration::from_secs(2)).await;
    let back = run(&load, Duration::from_secs(1), &expected).await;
    assert!(unpredicted(&back) < back.asked.len(), "it is not asked again");

    // Wrong: damaged on their way, predictions are noise or cannot be read.
    let damaging = async {
        for _ in 0..20 {
            sandbox.proxy(predictor).corrupt_next(Direction::Back);
            sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::join!(run(&load, Duration::from_secs(1), &expected), damaging);
    sandbox.proxy(predictor).set(Link::Dead);
    run(&load, Duration::from_secs(1), &expected).await;
    sandbox.proxy(predictor).set(Link::Good);

    sandbox.take(predictor).kill();
    let dead = run(&load, Duration::from_secs(1), &expected).await;
    println!("dead: {dead}");
    assert_eq!(unpredicted(&dead), dead.asked.len());
}

/// Predictions for another model would be used.
#[tokio::test(flavor = "multi_thread")]
async fn a_predictor_of_another_model_is_not_used() {
    // The predictor of the larger model for the smaller, which has none of its own.
    let models = repository().join("models");
    let served = SandboxConfig { model: models.join("switch-mini-8"), ..Default::default() };
    let coordinator_flags = ["--predictor", "off"].map(str::to_owned).to_vec();
    let plain = Sandbox::start(SandboxConfig { coordinator_flags, ..served.clone() }).await;
    let expected = answers(&load(&plain)).await;
    drop(plain);
    let config = SandboxConfig { predictor_nodes: 1, predictor_model: Some(models.join("switch-tiny-64")), ..served };
    let sandbox = Sandbox::start(config).await;
    let report = load(&sandbox).run(Duration::from_secs(1)).await;
    report.assert_as(&expected);
    assert_eq!(unpredicted(&report), report.asked.len());
    let status = ClusterClient::new(sandbox.channel()).status(StatusRequest {}).await.expect("answered").into_inner();
    let told: Vec<_> = status.nodes.iter().map(|node| (&*node.role, node.healthy, &*node.problem)).collect();
    assert!(told.contains(&("predictor-node", false, "serves another model")), "{told:?}");
    assert_eq!(told.iter().filter(|node| node.1).count(), told.len() - 1, "{told:?}");
}
