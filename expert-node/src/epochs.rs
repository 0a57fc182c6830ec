//! Refuses calls of an older placement than this node knows. The refusal carries the newer placement, so that a
//! coordinator that was cut off from the membership learns it from the nodes that it calls.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use sida_cluster::Cluster;
use sida_proto::{v1, wire::PlacementRecord};
use sida_routing::{Digest, Placement};
use sida_rpc::Reason;

/// The newest placement that this node knows.
pub(crate) struct Epochs {
    cluster: Cluster,
    model: Digest,
    /// The placement of this epoch, encoded: a coordinator that is behind is told at each of its calls.
    encoded: Mutex<Option<(u64, Bytes)>>,
}

impl Epochs {
    /// The placements of `cluster` for `model`.
    pub(crate) fn new(cluster: Cluster, model: Digest) -> Self {
        Self { cluster, model, encoded: Mutex::new(None) }
    }

    /// Whether a sender that knew `epoch` is behind. 0 is no epoch, and a newer one than ours is welcome: the
    /// sender heard of it first.
    pub(crate) fn is_stale(&self, epoch: u64) -> bool {
        epoch != 0 && epoch < self.cluster.placement().epoch()
    }

    /// The record of a placement, or nothing if it is too large to be sent: then the refusal tells no more than that.
    fn record(&self, placement: &Arc<Placement>) -> Bytes {
        let record = PlacementRecord { model: self.model, placement: placement.clone() };
        record.encode().map(Bytes::from).unwrap_or_else(|error| {
            tracing::warn!(%error, "the placement cannot be sent to a coordinator that is behind");
            Bytes::new()
        })
    }

    /// What to answer to a call of `epoch`, if it is refused.
    pub(crate) fn refusal(&self, epoch: u64) -> Option<v1::CallError> {
        if !self.is_stale(epoch) {
            return None;
        }
        let placement = self.cluster.placement_as_written();
        let mut encoded = self.encoded.lock();
        let newer_placement = match &*encoded {
            Some((known, bytes)) if *known == placement.epoch() => bytes.clone(),
            _ => {
                let bytes = self.record(&placement);
                encoded.insert((placement.epoch(), bytes)).1.clone()
            }
        };
        let message = format!("the call knew placement {epoch}, this node knows {}", placement.epoch());
        let (code, reason) = (Reason::StaleEpoch.code().into(), Reason::StaleEpoch.name().into());
        Some(v1::CallError { code, reason, message, newer_placement })
    }
}
