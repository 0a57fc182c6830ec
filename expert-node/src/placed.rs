//! Follows the placement: loads what is newly placed on this node into room that nobody misses, and then says so, so
//! that the writer of the placement lets this node take the place of another. Started by [`crate::run`] where the
//! membership is alive.

use std::{sync::Arc, thread, time::Duration};

use sida_cluster::Cluster;
use sida_routing::{ExpertKey, NodeId};
use sida_telemetry::{gauge, names};
use tokio::task;

use crate::{
    cache::{ExpertCache, NextPlaced},
    engine::Engine,
};

/// How long calls that wait for a slot go first before it is looked again.
const YIELD: Duration = Duration::from_millis(2);

/// Loads and reports, placement by placement, for as long as the cluster is followed.
pub(crate) async fn follow(engine: Arc<Engine>, cluster: Cluster, node: NodeId) {
    let mut views = cluster.changed();
    loop {
        let placement = cluster.placement();
        let placed: Vec<ExpertKey> = placement.held_by(&node).collect();
        let (epoch, count) = (placement.epoch(), placed.len());
        gauge!(names::PLACEMENT_EPOCH).set(epoch as f64);
        let is_newest = {
            let cluster = cluster.clone();
            move || cluster.placement().epoch() == epoch
        };
        let loading = engine.clone();
        match task::spawn_blocking(move || load(loading.cache(), &placed, is_newest)).await {
            Ok(Some(loaded)) => {
                if loaded > 0 {
                    tracing::info!(%node, epoch, placed = count, loaded, "loaded what is placed here");
                }
                cluster.report_ready(epoch);
            }
            // A newer placement is there; what is loaded already stays.
            Ok(None) => continue,
            Err(error) => tracing::error!(%node, %error, "loading what is placed here panicked"),
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Loads what is missing, as far as there is room; how many. `None`: the placement is not the newest any more.
fn load(cache: &ExpertCache, placed: &[ExpertKey], is_newest: impl Fn() -> bool) -> Option<usize> {
    let mut loaded = 0;
    while is_newest() {
        match cache.next_placed(placed) {
            NextPlaced::Done => return Some(loaded),
            NextPlaced::Busy => thread::sleep(YIELD),
            NextPlaced::Load(unfilled) => {
                let key = unfilled.key();
                match unfilled.fill() {
                    Ok(_) => loaded += 1,
                    // Not tried again before a plan or a call names it; then it is told who wants it.
                    Err(error) => tracing::warn!(%key, %error, "an expert that is placed here cannot be loaded"),
                }
            }
        }
    }
    None
}
