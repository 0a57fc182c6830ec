//! Counts the experts whose holders are all away, for a gauge. Requests go on, since any other node loads such an
//! expert from its store, but an operator should know.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use sida_routing::{ExpertId, ExpertKey, LayerId};
use sida_telemetry::{gauge, names};

use crate::dispatch::nodes::{Nodes, Roster};

/// How often the experts are counted.
const PERIOD: Duration = Duration::from_secs(2);

/// Sets the gauge time and again until the nodes are dropped.
pub(crate) async fn watch(nodes: Weak<Nodes>) {
    while let Some((roster, now)) = nodes.upgrade().map(|nodes: Arc<Nodes>| (nodes.roster(), nodes.clock().now())) {
        gauge!(names::EXPERTS_UNHELD).set(count(&roster, now) as f64);
        drop(roster);
        tokio::time::sleep(PERIOD).await;
    }
}

/// How many experts have no holder that is up.
fn count(roster: &Roster, now: Duration) -> usize {
    let is_up: Vec<bool> = roster.links.iter().map(|link| link.is_up(now)).collect();
    let extent = roster.placement.extent();
    let layers = 0..extent.moe_layers as u16;
    let keys = layers.flat_map(|layer| {
        (0..extent.num_experts as u16).map(move |expert| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) })
    });
    keys.filter(|key| !roster.placement.holder_indices(*key).iter().any(|&holder| is_up[usize::from(holder)])).count()
}
