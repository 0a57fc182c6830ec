//! What the expert-nodes of a cluster hold and have loaded, all of them together. Read by `bench` and `eval` before and
//! after what they measure.

use std::collections::BTreeMap;

use serde::Serialize;
use sida_proto::v1::StatusResponse;

/// Sums over the expert-nodes of a cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeState {
    pub(crate) resident_bytes: u64,
    pub(crate) budget_bytes: u64,
    /// Experts that fit into it.
    pub(crate) slots: u64,
    /// Of each node that answered, by its name, since it started.
    loads: BTreeMap<String, NodeLoads>,
}

/// Loads and evictions of expert-nodes.
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
    /// What was added since `earlier`; `None` where that is more, so that it was counted by a process that has ended.
    fn since(self, earlier: Self) -> Option<Self> {
        Some(Self {
            prefetched: self.prefetched.checked_sub(earlier.prefetched)?,
            demanded: self.demanded.checked_sub(earlier.demanded)?,
            evicted: self.evicted.checked_sub(earlier.evicted)?,
        })
    }
}

impl NodeState {
    /// What the nodes of a cluster told that answered.
    pub(crate) fn of(status: &StatusResponse) -> Self {
        let mut state = Self::default();
        for node in &status.nodes {
            let Some(told) = &node.residency else { continue };
            state.resident_bytes += told.resident_bytes;
            state.budget_bytes += told.budget_bytes;
            state.slots += told.slots;
            let loads =
                NodeLoads { prefetched: told.prefetch_loads, demanded: told.demand_loads, evicted: told.evictions };
            state.loads.insert(node.node.clone(), loads);
        }
        state
    }

    /// What all nodes loaded since `earlier`. Of one that was started again meanwhile, or is not there any more, nobody knows what it
    /// did before: it is named in a warning.
    pub(crate) fn loads_since(&self, earlier: &Self) -> NodeLoads {
        let (loads, unknown) = self.known_since(earlier);
        if !unknown.is_empty() {
            let nodes = unknown.join(", ");
            tracing::warn!(
                "loads are of what is known: {nodes} ended meanwhile, and what was loaded there until then is not told"
            );
        }
        loads
    }

    /// And the nodes of which some is not known.
    fn known_since<'n>(&'n self, earlier: &'n Self) -> (NodeLoads, Vec<&'n str>) {
        let gone = earlier.loads.keys().filter(|node| !self.loads.contains_key(*node));
        let (mut sum, mut unknown) = (NodeLoads::default(), gone.map(String::as_str).collect::<Vec<_>>());
        for (node, loads) in &self.loads {
            let before = earlier.loads.get(node).copied().unwrap_or_default();
            let own = loads.since(before).unwrap_or_else(|| {
                unknown.push(node);
                *loads
            });
            sum.prefetched += own.prefetched;
            sum.demanded += own.demanded;
            sum.evicted += own.evicted;
        }
        (sum, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A benchmark in which a node was killed would tell that it loaded nothing.
    #[test]
    fn loads_of_a_node_that_began_anew_are_counted_from_then() {
        let loads = |prefetched, demanded| NodeLoads { prefetched, demanded, evicted: 0 };
        let state = |nodes: &[(&str, NodeLoads)]| NodeState {
            loads: nodes.iter().map(|(node, loads)| ((*node).to_owned(), *loads)).collect(),
            ..NodeState::default()
        };
        let before = state(&[("e0", loads(10, 500)), ("e1", loads(10, 500)), ("e2", loads(0, 7))]);
        let after = state(&[("e0", loads(12, 530)), ("e1", loads(1, 90)), ("e3", loads(4, 4))]);
        assert_eq!(after.known_since(&before), (loads(2 + 1 + 4, 30 + 90 + 4), vec!["e2", "e1"]));
    }
}
