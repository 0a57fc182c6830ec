//! What the hash tables of a request said of each MoE layer: how often they named the experts that the router chose there,
//! and which experts they named at all. Part of a [`crate::answer::trace::Trace`]; whoever evaluates a predictor reads it,
//! since what is to be resident is decided layer by layer and as a set.

use sida_routing::{ExpertId, HashTable, LayerId};

use crate::answer::trace::HashCounts;

/// The place of an expert that no table named.
const NOT_NAMED: u8 = u8::MAX;

/// For each MoE layer, how the hash tables fared and what they named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashLayers {
    counts: Vec<HashCounts>,
    num_experts: usize,
    /// (layers, num_experts): the best place that an expert has in the prediction of any token, 0 the likeliest.
    places: Vec<u8>,
}

impl HashLayers {
    /// Nothing of every layer.
    pub(crate) fn new(moe_layers: usize, num_experts: usize) -> Self {
        let counts = vec![HashCounts::default(); moe_layers];
        Self { counts, num_experts, places: vec![NOT_NAMED; moe_layers * num_experts] }
    }

    /// Adds how the tables fared at a layer.
    pub(crate) fn add(&mut self, layer: LayerId, counts: HashCounts) {
        self.counts[usize::from(layer.0)].add(counts);
    }

    /// Notes every expert that a table names.
    pub(crate) fn note(&mut self, table: &HashTable) {
        for layer in table.layers() {
            let places = &mut self.places[usize::from(layer.0) * self.num_experts..][..self.num_experts];
            for token in 0..table.shape().tokens {
                for (rank, expert) in table.experts(layer, token).iter().enumerate() {
                    let place = &mut places[usize::from(expert.0)];
                    *place = (*place).min(rank.min(usize::from(NOT_NAMED - 1)) as u8);
                }
            }
        }
    }

    /// For each MoE layer, how often the tables named what the router chose.
    pub fn counts(&self) -> &[HashCounts] {
        &self.counts
    }

    /// The experts of a layer that tables named, ascending, each with the best place that it has in the prediction of any
    /// token: 0 the likeliest. What a plan of some depth names are those whose place is less.
    pub fn named(&self, layer: LayerId) -> impl Iterator<Item = (ExpertId, usize)> + '_ {
        let places = &self.places[usize::from(layer.0) * self.num_experts..][..self.num_experts];
        let named = places.iter().enumerate().filter(|&(_, &place)| place != NOT_NAMED);
        named.map(|(expert, &place)| (ExpertId(expert as u16), usize::from(place)))
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{Digest, Plan, PlanId, hash_table::Shape};

    use super::*;

    #[test]
    fn what_is_named_is_what_plans_of_each_depth_name() {
        // Would break: an evaluation tells of other plans than those that are sent to expert-nodes.
        let table = |experts: &[u16]| {
            let shape = Shape { first_layer: LayerId(1), layers: 2, tokens: 2, top_k: 3 };
            let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
            let alphas = vec![0.1; experts.len()];
            HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 9, experts, alphas).expect("valid")
        };
        let tables = [table(&[3, 1, 2, 1, 3, 8, 4, 5, 6, 7, 6, 5]), table(&[2, 3, 1, 2, 3, 1, 0, 1, 2, 0, 2, 1])];
        let mut layers = HashLayers::new(3, 9);
        tables.iter().for_each(|table| layers.note(table));
        assert_eq!(layers.named(LayerId(0)).count(), 0);
        for depth in 1..=3 {
            let plan = Plan::from_tables(PlanId(0), &tables.each_ref().map(|table| (table, depth)));
            for layer in [1, 2].map(LayerId) {
                let mut planned: Vec<_> =
                    plan.experts.iter().filter(|key| key.layer == layer).map(|key| key.expert).collect();
                planned.sort();
                let named = layers.named(layer).filter(|&(_, place)| place < depth).map(|(expert, _)| expert);
                assert_eq!(named.collect::<Vec<_>>(), planned, "depth {depth} of layer {layer}");
            }
        }
    }
}
