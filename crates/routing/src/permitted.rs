//! Which experts the router may choose in `guided` mode: those that the hash table of its own sequence names, and
//! with them the plan. So the choice depends neither on who shares the batch nor on what is in memory by then.
//!
//! The choice among them is the router's (`sida_model::router`). Used by the coordinator at each MoE layer.

use std::ops::Range;

use crate::{ExpertId, HashTable, LayerId};

/// The experts of one MoE layer that some tokens may be routed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permitted {
    /// By expert.
    is_permitted: Vec<bool>,
}

impl Permitted {
    /// Every expert that `table` names for one of `tokens` at `layer`, in whichever place: of a layer of `num_experts`.
    /// Panics if the table does not speak of this layer or of these tokens: the caller made the batch.
    pub fn planned(table: &HashTable, layer: LayerId, tokens: Range<usize>, num_experts: usize) -> Self {
        let mut is_permitted = vec![false; num_experts];
        for token in tokens {
            table.experts(layer, token).iter().for_each(|expert| is_permitted[usize::from(expert.0)] = true);
        }
        Self { is_permitted }
    }

    /// Whether it is one of them.
    pub fn contains(&self, expert: ExpertId) -> bool {
        self.is_permitted[usize::from(expert.0)]
    }

    /// Whether all experts of a route are.
    pub fn contains_all(&self, route: &[Option<ExpertId>]) -> bool {
        route.iter().flatten().all(|&expert| self.contains(expert))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Digest, hash_table::Shape};

    const NUM_EXPERTS: usize = 6;

    /// Of two layers, from layer 3 on.
    fn table(tokens: usize, top_k: usize, experts: &[u16]) -> HashTable {
        let shape = Shape { first_layer: LayerId(3), layers: 2, tokens, top_k };
        let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
        let alphas = vec![0.5; experts.len()];
        HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, NUM_EXPERTS, experts, alphas).unwrap()
    }

    #[test]
    fn what_a_table_names_for_these_tokens_and_this_layer() {
        // Would break: a token is sent to an expert that was planned for another layer, or for a token that is not meant.
        let table = table(2, 2, &[0, 1, 1, 2, 5, 4, 3, 3]);
        let permitted = |layer, tokens| {
            let permitted = Permitted::planned(&table, LayerId(layer), tokens, NUM_EXPERTS);
            (0..NUM_EXPERTS as u16).filter(|&expert| permitted.contains(ExpertId(expert))).collect::<Vec<_>>()
        };
        assert_eq!(permitted(3, 0..2), [0, 1, 2]);
        assert_eq!(permitted(3, 0..1), [0, 1]);
        assert_eq!(permitted(4, 1..2), [3]);
        assert_eq!(permitted(4, 0..2), [3, 4, 5]);
        assert_eq!(permitted(4, 0..0), []);
    }

    #[test]
    fn a_route_is_permitted_whole() {
        // Would break: of several experts of a token only the first is looked at, or a dropped token is not let through.
        let permitted = Permitted::planned(&table(1, 2, &[0, 1, 2, 3]), LayerId(3), 0..1, NUM_EXPERTS);
        assert!(permitted.contains_all(&[Some(ExpertId(1)), Some(ExpertId(0))]));
        assert!(!permitted.contains_all(&[Some(ExpertId(1)), Some(ExpertId(2))]));
        assert!(permitted.contains_all(&[None]) && permitted.contains_all(&[]));
    }

    proptest! {
        /// Would break: an expert may be chosen that no plan of the sequence has, or one that it has may not.
        #[test]
        fn it_is_what_a_plan_of_all_candidates_has(experts in prop::collection::vec(0..NUM_EXPERTS as u16, 12)) {
            let table = table(3, 2, &experts);
            let plan = crate::Plan::from_tables(crate::PlanId(1), &[(&table, crate::PlanScope::Everything)], 1);
            for layer in [LayerId(3), LayerId(4)] {
                let permitted = Permitted::planned(&table, layer, 0..3, NUM_EXPERTS);
                for expert in (0..NUM_EXPERTS as u16).map(ExpertId) {
                    let is_planned = plan.experts.contains(&crate::ExpertKey { layer, expert });
                    prop_assert_eq!(permitted.contains(expert), is_planned);
                }
            }
        }
    }
}
