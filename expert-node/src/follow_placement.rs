//! Follows the placement: loads experts that are newly placed on this node into slots that no call and no plan needs,
//! and then reports this node ready, so that the writer of the placement lets it take the place of another. A node with
//! a device also reads those placed experts that have no slot into the host's memory.

use std::{sync::Arc, thread, time::Duration};

use sida_cluster::Cluster;
use sida_routing::{ExpertKey, NodeId};
use sida_telemetry::{gauge, names};
use tokio::task;

use crate::{
    cache::{ExpertCache, Memory, NextPlaced},
    engine::Engine,
};

/// How long this waits while calls wait for a slot, since those go first.
const YIELD: Duration = Duration::from_millis(2);

/// Loads and reports, placement by placement, for as long as the cluster is followed.
pub(crate) async fn follow(engine: Arc<Engine>, cluster: Cluster, node: NodeId) {
    let mut views = cluster.changed();
    loop {
        let placement = cluster.placement();
        let placed: Arc<[ExpertKey]> = placement.held_by(&node).collect();
        let (epoch, count) = (placement.epoch(), placed.len());
        gauge!(names::PLACEMENT_EPOCH).set(epoch as f64);
        let is_newest = {
            let cluster = cluster.clone();
            move || cluster.placement().epoch() == epoch
        };
        let (loading, keys, newest) = (engine.clone(), placed.clone(), is_newest.clone());
        match task::spawn_blocking(move || load(loading.cache(), &keys, newest)).await {
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
        let near = engine.clone();
        if let Err(error) = task::spawn_blocking(move || keep_near(near.cache(), &placed, is_newest)).await {
            tracing::error!(%node, %error, "reading what is placed here panicked");
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Reads what is placed here into the host's memory, as far as there is room.
fn keep_near(cache: &ExpertCache, placed: &[ExpertKey], is_newest: impl Fn() -> bool) {
    let Memory::Device(device) = cache.memory() else { return };
    for &key in placed {
        if !is_newest() || cache.is_closed() {
            return;
        }
        if let Err(error) = device.keep_near(key) {
            cache.note_failure(&error);
            return tracing::warn!(%key, %error, "an expert that is placed here cannot be read ahead");
        }
    }
}

/// Loads what is missing, as far as there is room; how many. `None`: the placement is not the newest any more.
pub(crate) fn load(cache: &ExpertCache, placed: &[ExpertKey], is_newest: impl Fn() -> bool) -> Option<usize> {
    let (mut loaded, mut failed) = (0, Vec::new());
    let ended = loop {
        if !is_newest() {
            break None;
        }
        match cache.next_placed(placed) {
            NextPlaced::Done => break Some(loaded),
            NextPlaced::Busy => thread::sleep(YIELD),
            NextPlaced::Load(unfilled) => {
                let key = unfilled.key();
                match unfilled.fill() {
                    Ok(_) => loaded += 1,
                    // Not tried again before a plan or a call names it; then it is told who wants it.
                    Err(error) => failed.push((key, error)),
                }
            }
        }
    };
    // A damaged file may have all of them.
    if let Some((key, error)) = failed.first() {
        let experts = failed.len();
        tracing::warn!(experts, %key, %error, "experts that are placed here cannot be loaded; the first of them");
    }
    ended
}
