//! What the expert-nodes of a cluster hold and have loaded, all of them together. Read by `bench` and `eval` before and
//! after what they measure.

use serde::Serialize;
use sida_proto::v1::StatusResponse;

/// Sums over the expert-nodes of a cluster.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NodeState {
    pub(crate) resident_bytes: u64,
    pub(crate) budget_bytes: u64,
    /// Experts that fit into it.
    pub(crate) slots: u64,
    /// Since the nodes started.
    pub(crate) loads: NodeLoads,
}

/// Loads and evictions, summed over expert-nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct NodeLoads {
    /// Ahead of their use.
    pub(crate) prefetched: u64,
    /// While a call waited.
    pub(crate) demanded: u64,
    /// Experts dropped for another.
    pub(crate) evicted: u64,
}

impl NodeLoads {
    /// What was added since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            prefetched: self.prefetched.saturating_sub(earlier.prefetched),
            demanded: self.demanded.saturating_sub(earlier.demanded),
            evicted: self.evicted.saturating_sub(earlier.evicted),
        }
    }
}

impl NodeState {
    /// What the nodes of a cluster told that answered.
    pub(crate) fn of(status: &StatusResponse) -> Self {
        let mut state = Self::default();
        for node in status.nodes.iter().filter_map(|node| node.residency.as_ref()) {
            state.resident_bytes += node.resident_bytes;
            state.budget_bytes += node.budget_bytes;
            state.slots += node.slots;
            state.loads.prefetched += node.prefetch_loads;
            state.loads.demanded += node.demand_loads;
            state.loads.evicted += node.evictions;
        }
        state
    }
}
