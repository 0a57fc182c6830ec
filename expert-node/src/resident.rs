//! A node's experts as a pass on the same device sees them: where each is, and that none of the layers that the pass is in
//! leaves meanwhile. Made by [`crate::engine`] for a coordinator of the same process.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use sida_model::{DeviceSlots, ResidentExperts, Residents};
use sida_routing::{Group, LayerId};

use crate::cache::ExpertCache;

/// The experts of one node.
pub(crate) struct NodeResidents {
    pub(crate) cache: Arc<ExpertCache>,
    pub(crate) slots: DeviceSlots,
    /// Rows that the node has computed since it started.
    pub(crate) rows: Arc<AtomicU64>,
}

impl ResidentExperts for NodeResidents {
    fn hold(&self, layers: Range<u16>, seen: Option<u64>) -> Option<Residents> {
        self.cache.hold(layers, seen)
    }

    fn release(&self) {
        self.cache.release_held();
    }

    fn used(&self, layer: LayerId, groups: &[Group]) {
        if let Err(error) = self.cache.used(layer, groups.iter().map(|group| group.expert)) {
            // Costs a worse choice of who leaves, and no output.
            tracing::error!(%layer, %error, "a pass used experts that the model does not have");
        }
        let rows = groups.iter().map(|group| u64::from(group.rows)).sum();
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.cache.measures.passed(rows);
    }

    fn slots(&self) -> &DeviceSlots {
        &self.slots
    }
}
