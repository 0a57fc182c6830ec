//! What a batch will use, in the order it will use it: the distinct experts of each MoE layer. A plan is a
//! hint to expert-nodes; losing one costs time, never correctness.

use std::{cmp::Reverse, collections::BTreeSet};

use crate::{ExpertId, ExpertKey, HashTable, LayerId};

/// Names a plan from its hint to its release. Unique per coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanId(pub u64);

/// The experts a batch is expected to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its name.
    pub id: PlanId,
    /// In order of use; the experts of a layer are those with most rows first.
    /// Invariant: no key appears twice.
    pub experts: Vec<ExpertKey>,
    /// Whether its batch begins now: it is used before every plan that waits.
    pub begins: bool,
}

/// How much the tokens of a layer want one expert.
#[derive(Clone, Copy)]
struct Want {
    /// The best place it has in any token's prediction.
    rank: usize,
    /// In how many tokens' predictions it is.
    rows: usize,
}

impl Plan {
    /// The distinct experts that `tables` (one per sequence of the batch, with its depth) predict for the batch,
    /// layer by layer, the most wanted first. With a depth of 1 it is only each token's likeliest, and so on up to
    /// the table's k.
    pub fn from_tables(id: PlanId, tables: &[(&HashTable, usize)]) -> Self {
        let mut experts = Vec::new();
        let all = tables.iter().flat_map(|(table, _)| table.all_experts());
        let experts_max = all.map(|expert| usize::from(expert.0) + 1).max().unwrap_or(0);
        let layers: BTreeSet<LayerId> = tables.iter().flat_map(|(table, _)| table.layers()).collect();
        for layer in layers {
            let mut wants = vec![Want { rank: usize::MAX, rows: 0 }; experts_max];
            for &(table, depth) in tables.iter().filter(|(table, _)| table.layers().any(|l| l == layer)) {
                for token in 0..table.shape().tokens {
                    for (rank, expert) in table.experts(layer, token).iter().take(depth).enumerate() {
                        let want = &mut wants[usize::from(expert.0)];
                        *want = Want { rank: want.rank.min(rank), rows: want.rows + 1 };
                    }
                }
            }
            let mut wanted: Vec<u16> = (0..experts_max as u16).filter(|&e| wants[usize::from(e)].rows > 0).collect();
            wanted.sort_by_key(|&e| (wants[usize::from(e)].rank, Reverse(wants[usize::from(e)].rows)));
            experts.extend(wanted.into_iter().map(|expert| ExpertKey { layer, expert: ExpertId(expert) }));
        }
        Self { id, experts, begins: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, hash_table::Shape};

    fn table(first_layer: u16, layers: usize, experts: &[u16]) -> HashTable {
        let shape = Shape { first_layer: LayerId(first_layer), layers, tokens: experts.len() / layers / 2, top_k: 2 };
        let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
        let alphas = vec![0.5; experts.len()];
        HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 10, experts, alphas).unwrap()
    }

    /// Experts would be preloaded in another order than the batch needs them.
    #[test]
    fn a_plan_names_each_expert_once_in_order_of_use_and_of_likelihood() {
        let a = table(0, 2, &[5, 1, 5, 2, 7, 5, 3, 7]);
        let b = table(0, 2, &[1, 5, 3, 9]);
        let keys = |plan: &Plan| -> Vec<_> { plan.experts.iter().map(|k| (k.layer.0, k.expert.0)).collect() };
        let firsts = Plan::from_tables(PlanId(1), &[(&a, 1), (&b, 1)]);
        assert_eq!(keys(&firsts), [(0, 5), (0, 1), (1, 3), (1, 7)]);
        let both = Plan::from_tables(PlanId(1), &[(&a, 2), (&b, 2)]);
        assert_eq!(keys(&both), [(0, 5), (0, 1), (0, 2), (1, 3), (1, 7), (1, 5), (1, 9)]);
        // Would break: a sequence whose whole table is planned is planned no deeper than those beside it.
        let one = Plan::from_tables(PlanId(1), &[(&a, 1), (&b, 2)]);
        assert_eq!(keys(&one), [(0, 5), (0, 1), (1, 3), (1, 7), (1, 9)]);
        assert_eq!(Plan::from_tables(PlanId(1), &[(&a, usize::MAX), (&b, usize::MAX)]), both);
    }

    /// Sequences that are encoded would be hinted as if they were decoded too, or a batch of both would end a node.
    #[test]
    fn a_table_speaks_of_its_own_layers_only() {
        let (encoder, decoder) = (table(0, 1, &[5, 1]), table(1, 1, &[4, 2]));
        let keys = |tables: &[&HashTable]| -> Vec<_> {
            let tables: Vec<_> = tables.iter().map(|&table| (table, 2)).collect();
            Plan::from_tables(PlanId(1), &tables).experts.iter().map(|k| (k.layer.0, k.expert.0)).collect()
        };
        assert_eq!(keys(&[&encoder, &decoder]), [(0, 5), (0, 1), (1, 4), (1, 2)]);
        assert_eq!(keys(&[&decoder]), [(1, 4), (1, 2)]);
        assert_eq!(keys(&[]), []);
    }
}
