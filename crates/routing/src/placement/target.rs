//! Who should hold what, from the members and the load alone: what [`super::step`] goes towards. Called by the
//! writer of the placement.

use super::{Candidate, Demand, Extent, Placement, PlacementError};

/// How many copies, and how fast they move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Holders of every expert, the primary included; fewer where there are fewer nodes.
    pub replicas: usize,
    /// Holders more for the hottest experts at most.
    pub hot_replicas_max: usize,
    /// Copies that one step adds at most, but for those of experts that nobody holds.
    pub moves_max: usize,
}

/// Who should hold what. The epoch is 0: nobody publishes a target.
///
/// Every expert has the first of its rendezvous order, `policy.replicas` of them and one more for each level of
/// its demand. So a node that comes or goes, or a level that changes, moves only the copies it is about.
/// A candidate of weight 0 is leaving: it is among the nodes and holds nothing.
pub fn target(
    extent: Extent,
    candidates: &[Candidate],
    demand: &Demand,
    policy: &Policy,
) -> Result<Placement, PlacementError> {
    let extent = Extent { replicas: policy.replicas, ..extent };
    Placement::draw(0, extent, candidates, |expert| {
        policy.replicas.saturating_add(demand.level_at(expert).min(policy.hot_replicas_max))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ExpertId, ExpertKey, LayerId};

    const POLICY: Policy = Policy { replicas: 2, hot_replicas_max: 3, moves_max: 8 };

    fn candidates(weights: &[f64]) -> Vec<Candidate> {
        weights.iter().enumerate().map(|(i, &weight)| Candidate { node: format!("n{i:03}").into(), weight }).collect()
    }

    /// Expert 5 of layer 1 gets half of all rows.
    fn hot(extent: Extent) -> Demand {
        let mut demand = Demand::new(extent.moe_layers, extent.num_experts);
        for expert in 0..extent.num_experts as u16 {
            let rows = if expert == 5 { 1000 * (extent.num_experts as u64 - 1) } else { 1000 };
            demand.note(ExpertKey { layer: LayerId(1), expert: ExpertId(expert) }, rows);
        }
        (0..8).for_each(|_| demand.settle());
        demand
    }

    proptest! {
        #[test]
        fn hot_experts_get_more_holders_and_nothing_else_moves(weights in prop::collection::vec(0.1f64..8.0, 1..12)) {
            // Broken: one hot expert would make the whole cluster load.
            let extent = Extent { moe_layers: 2, num_experts: 32, replicas: 2 };
            let candidates = candidates(&weights);
            let cold = target(extent, &candidates, &Demand::new(2, 32), &POLICY).unwrap();
            let warm = target(extent, &candidates, &hot(extent), &POLICY).unwrap();
            prop_assert!(cold.same_holders(&Placement::compute(1, extent, &candidates).unwrap()));
            for key in cold.keys() {
                let (before, after) = (cold.holder_indices(key), warm.holder_indices(key));
                let expected = if (key.layer.0, key.expert.0) == (1, 5) { 5 } else { 2 };
                prop_assert_eq!(after.len(), expected.min(weights.len()));
                prop_assert_eq!(&after[..before.len()], before);
            }
        }

        #[test]
        fn a_leaving_node_holds_nothing(weights in prop::collection::vec(0.1f64..8.0, 1..12), leaving in 0usize..12) {
            // Broken: a node on its way out would be given experts to load.
            let extent = Extent { moe_layers: 2, num_experts: 32, replicas: 1 };
            let mut with = candidates(&weights);
            let mut without = with.clone();
            let leaving = leaving % weights.len();
            with[leaving].weight = 0.0;
            without.remove(leaving);
            let demand = Demand::new(2, 32);
            let with = target(extent, &with, &demand, &POLICY).unwrap();
            prop_assert_eq!((with.nodes().len(), with.extent().replicas), (weights.len(), POLICY.replicas));
            prop_assert!(with.same_holders(&target(extent, &without, &demand, &POLICY).unwrap()));
        }
    }
}
