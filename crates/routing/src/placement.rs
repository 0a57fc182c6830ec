//! Which expert-nodes hold which expert: who is hinted and called, and who is asked next when a call fails.
//!
//! Three questions, one file each. *Who should hold what*, from the members and the load alone: [`target`], a
//! weighted [`rendezvous`] with more holders for hot experts, which [`demand`] finds. *Who holds what now*: the
//! [`table`], as it is published and stored, which `builder` puts together. *How to get from one to the other* without ever asking for an
//! expert where it is not: [`step`], one publishable placement at a time.
//!
//! Who computes: a cluster that never changes takes [`Placement::compute`] as it is; otherwise the elected
//! writer follows `target` by `step`s (see [`crate::membership`]) and everybody else reads what it wrote.

use thiserror::Error;

use crate::NodeId;

mod builder;
pub mod demand;
mod rendezvous;
pub mod step;
pub mod table;
pub mod target;

pub use demand::Demand;
pub use step::{Allowance, moves, step, step_within};
pub use table::Placement;
pub use target::{Policy, target};

/// The most nodes that can be placed on: far above what one coordinator can talk to.
pub const NODES_MAX: usize = 4096;
/// The most experts of a model, over all layers: bounds the table to a few MiB whatever a config claims.
pub const EXPERTS_MAX: usize = 1 << 20;
/// The most copies of experts, over all nodes.
pub const HOLDERS_MAX: usize = 1 << 24;

/// A node that can hold experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its name. Only the name and the weight decide what it holds, never its place in a list.
    pub node: NodeId,
    /// Its share, relative to the others. 0, which only [`target`] takes, is a node that is leaving: it gets
    /// nothing, but what it holds is moved rather than lost.
    pub weight: f64,
}

/// The extent of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// MoE layers of the model.
    pub moe_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Holders per expert, the primary included; fewer where there are fewer nodes.
    pub replicas: usize,
}

impl Extent {
    /// Experts of the model, over all layers.
    pub fn experts(&self) -> usize {
        self.moe_layers * self.num_experts
    }

    /// Whether both speak of the same experts.
    pub fn same_experts(&self, other: &Self) -> bool {
        (self.moe_layers, self.num_experts) == (other.moe_layers, other.num_experts)
    }

    fn check(&self) -> Result<(), PlacementError> {
        let &Self { moe_layers, num_experts, replicas } = self;
        if replicas == 0 {
            return Err(PlacementError::Replicas);
        }
        let ids = 0..=1 << 16;
        let fits = ids.contains(&moe_layers) && ids.contains(&num_experts) && self.experts() <= EXPERTS_MAX;
        if fits { Ok(()) } else { Err(PlacementError::Experts { moe_layers, num_experts, expected: EXPERTS_MAX }) }
    }
}

/// Why there is no placement.
#[derive(Clone, Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum PlacementError {
    #[error("node {node} has weight {weight}, expected a positive finite number")]
    Weight { node: NodeId, weight: f64 },
    #[error("two expert-nodes are called {node}")]
    Duplicate { node: NodeId },
    #[error("{found} expert-nodes, at most {expected} can be placed on")]
    Nodes { found: usize, expected: usize },
    #[error("{moe_layers} layers x {num_experts} experts are more than {expected}")]
    Experts { moe_layers: usize, num_experts: usize, expected: usize },
    #[error("replicas is 0, expected at least 1 holder per expert")]
    Replicas,
    #[error("more than {expected} copies of experts")]
    Copies { expected: usize },
    #[error("node {node} is out of order, expected ascending names")]
    Order { node: NodeId },
    #[error("holders of {found} experts, expected {expected}")]
    Counts { found: usize, expected: usize },
    #[error("{found} holders, their counts add up to {expected}")]
    Holders { found: usize, expected: u64 },
    #[error("expert {expert} of {experts} is held by node {holder} of {nodes}")]
    Holder { expert: usize, experts: usize, holder: u32, nodes: usize },
    #[error("node {node} holds expert {expert} twice")]
    Twice { expert: usize, node: NodeId },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_taken_up_to_their_bounds() {
        // Broken: a large model could not be served, or an absurd config would fill the memory or wrap ids around.
        let extent = |moe_layers, num_experts| Extent { moe_layers, num_experts, replicas: 1 };
        for (moe_layers, num_experts) in
            [(0, 0), (1, 1 << 16), (1 << 16, 1), (1 << 16, 16), (16, 1 << 16), (1024, 1024)]
        {
            assert_eq!(extent(moe_layers, num_experts).check(), Ok(()));
        }
        let absurd =
            [(1, 65_537), (65_537, 1), (65_537, 0), (1025, 1024), (1024, 1025), (17, 1 << 16), (usize::MAX, 2)];
        for (moe_layers, num_experts) in absurd {
            let refused = PlacementError::Experts { moe_layers, num_experts, expected: EXPERTS_MAX };
            assert_eq!(extent(moe_layers, num_experts).check(), Err(refused));
        }
        assert_eq!(Extent { replicas: 0, ..extent(1, 1) }.check(), Err(PlacementError::Replicas));
    }

    #[test]
    fn the_same_number_of_experts_is_not_the_same_experts() {
        // Broken: the placement of another model would be taken for this one's.
        let extent = |moe_layers, num_experts| Extent { moe_layers, num_experts, replicas: 1 };
        assert!(extent(2, 3).same_experts(&Extent { replicas: 2, ..extent(2, 3) }));
        assert!(!extent(2, 3).same_experts(&extent(3, 2)) && !extent(2, 3).same_experts(&extent(2, 4)));
        assert_eq!(extent(2, 3).experts(), 6);
    }
}
