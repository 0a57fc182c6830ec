//! Clusters whose members find each other in etcd: real nodes, real etcd. `SIDA_LONG_TESTS=1` makes the short pauses
//! long.
//!
//! In reading order: [`joining`] (in any order, and out again), [`away`] (etcd stops for a while), [`leases`] (a node
//! loses its place), [`behind`] (it stands still for less than that takes), [`writers`] (two coordinators),
//! [`restarts`] (one node after the other), [`secured`] (TLS and passwords),
//! [`hundred`] (many nodes).

mod away;
mod behind;
mod hundred;
mod joining;
mod leases;
mod restarts;
mod secured;
mod writers;

use std::{collections::BTreeMap, time::Duration};

use sida_proto::v1::RoutingMode;
use sida_tests::{Etcd, LiveCluster, Load, live_cluster::is_settled};

/// Experts of the model that ships, in all layers.
pub(crate) const EXPERTS: u64 = 384;
/// Holders per expert unless a flag says otherwise.
pub(crate) const REPLICAS: u64 = 2;
const TOKENS: u32 = 6;

/// A pause: so long in every run, so long with `SIDA_LONG_TESTS=1`.
pub(crate) fn pause(short: Duration, long: Duration) -> Duration {
    if std::env::var_os("SIDA_LONG_TESTS").is_some() { long } else { short }
}

/// A cluster that serves: these nodes, started in this order, the experts where they should be.
pub(crate) async fn cluster(etcd: &Etcd, names: &[&str]) -> LiveCluster {
    let mut cluster = LiveCluster::new(&etcd.endpoints());
    for name in names {
        cluster.start(name);
    }
    settled(&cluster, names).await;
    cluster
}

/// Waits until every coordinator of `names` serves and sees every expert where it should be.
pub(crate) async fn settled(cluster: &LiveCluster, names: &[&str]) {
    let mut expert_nodes: Vec<&str> = names.iter().copied().filter(|name| name.starts_with("expert-node")).collect();
    expert_nodes.sort_unstable();
    for coordinator in names.iter().filter(|name| name.starts_with("coordinator")) {
        let what = format!("every expert on {expert_nodes:?}");
        cluster.wait(coordinator, &what, |status| is_settled(status, &expert_nodes, EXPERTS, REPLICAS)).await;
        cluster.wait_until_serving(coordinator).await;
    }
}

/// What is asked of these coordinators; whoever is refused by the first goes on with the next.
pub(crate) async fn load(cluster: &LiveCluster, coordinators: &[&str]) -> Load {
    let mut channels = Vec::new();
    for coordinator in coordinators {
        channels.push(cluster.channel(coordinator).await);
    }
    let texts = crate::client::prompts().into_iter().take(4).collect();
    Load { channels, texts, mode: RoutingMode::Exact, tokens: TOKENS, workers: 2 }
}

/// The right answers to a load: the oracle's.
pub(crate) async fn answers(load: &Load) -> BTreeMap<usize, Vec<u32>> {
    let asked = answered(load).await;
    let oracle = crate::client::Oracle::open();
    for (text, tokens) in &asked {
        let expected = oracle.greedy(&load.texts[*text], TOKENS);
        // The oracle ends at an end of sequence, the load goes on.
        assert_eq!(&tokens[..expected.len()], expected, "{}", load.texts[*text]);
    }
    asked
}

async fn answered(load: &Load) -> BTreeMap<usize, Vec<u32>> {
    let mut answers = BTreeMap::new();
    for text in 0..load.texts.len() {
        let asked = load.ask(format!("before-{text}"), text).await;
        answers.insert(text, asked.outcome.expect("an answer before anything is broken"));
    }
    answers
}
