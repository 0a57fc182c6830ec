//! What the hash tables of a request said of each MoE layer: how often they named the experts that the router chose there,
//! and which experts they named at all. Part of a [`crate::answer::trace::Trace`]; whoever evaluates a predictor reads it,
//! since what is to be resident is decided layer by layer and as a set.

use sida_routing::{ExpertId, HashTable, LayerForecast, LayerId};

use crate::answer::trace::HashCounts;

/// The place of an expert that no table named.
const NOT_NAMED: u8 = u8::MAX;

/// For each MoE layer, how the hash tables fared and what they named.
#[derive(Clone, Debug, PartialEq)]
pub struct HashLayers {
    counts: Vec<HashCounts>,
    num_experts: usize,
    /// (layers, num_experts): the best place that an expert has in the prediction of any token, 0 the likeliest.
    places: Vec<u8>,
    /// Of each layer, what is expected to be used.
    forecasts: Vec<LayerForecast>,
    /// Experts that routers choose for a token.
    top_k: usize,
}

impl HashLayers {
    /// Nothing of every layer.
    pub(crate) fn new(moe_layers: usize, num_experts: usize, top_k: usize) -> Self {
        let counts = vec![HashCounts::default(); moe_layers];
        let places = vec![NOT_NAMED; moe_layers * num_experts];
        Self { counts, num_experts, places, forecasts: vec![LayerForecast::new(num_experts); moe_layers], top_k }
    }

    /// Adds how the tables fared at a layer.
    pub(crate) fn add(&mut self, layer: LayerId, counts: HashCounts) {
        self.counts[usize::from(layer.0)].add(counts);
    }

    /// Notes every expert that a table names.
    pub(crate) fn note(&mut self, table: &HashTable) {
        for layer in table.layers() {
            self.forecasts[usize::from(layer.0)].add(table, layer, self.top_k);
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

    /// What is expected to be used of the experts of a layer.
    pub fn forecast(&self, layer: LayerId) -> &LayerForecast {
        &self.forecasts[usize::from(layer.0)]
    }

    /// The experts of a layer that tables named, ascending, each with the best place that it has in the prediction of any
    /// token: 0 the likeliest. So many of each token are those whose place is less.
    pub fn named(&self, layer: LayerId) -> impl Iterator<Item = (ExpertId, usize)> + '_ {
        let places = &self.places[usize::from(layer.0) * self.num_experts..][..self.num_experts];
        let named = places.iter().enumerate().filter(|&(_, &place)| place != NOT_NAMED);
        named.map(|(expert, &place)| (ExpertId(expert as u16), usize::from(place)))
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{Digest, Plan, PlanId, PlanScope, hash_table::Shape};

    use super::*;

    #[test]
    fn what_is_named_is_what_plans_name() {
        // Would break: an evaluation tells of other plans than those that are sent to expert-nodes.
        let table = |experts: &[u16]| {
            let shape = Shape { first_layer: LayerId(1), layers: 2, tokens: 2, top_k: 3 };
            let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
            let (alphas, chances) = (vec![0.1; experts.len()], [0.75, 0.125, 0.0625].repeat(4));
            let table = HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 9, experts, alphas);
            table.and_then(|table| table.with_chances(chances)).expect("valid")
        };
        let tables = [table(&[3, 1, 2, 1, 3, 8, 4, 5, 6, 7, 6, 5]), table(&[2, 3, 1, 2, 3, 1, 0, 1, 2, 0, 2, 1])];
        let mut layers = HashLayers::new(3, 9, 1);
        tables.iter().for_each(|table| layers.note(table));
        assert_eq!(layers.named(LayerId(0)).count(), 0);
        let planned = |scope, top_k, layer| {
            let plan = Plan::from_tables(PlanId(0), &tables.each_ref().map(|table| (table, scope)), top_k);
            plan.experts.into_iter().filter(|key| key.layer == layer).map(|key| key.expert).collect::<Vec<_>>()
        };
        for layer in [1, 2].map(LayerId) {
            for depth in 1..=3 {
                let mut expected = planned(PlanScope::FirstChoices, depth, layer);
                expected.sort();
                let named = layers.named(layer).filter(|&(_, place)| place < depth).map(|(expert, _)| expert);
                assert_eq!(named.collect::<Vec<_>>(), expected, "depth {depth} of layer {layer}");
            }
            for chance in [0.9, 0.5, 0.1, 0.0] {
                let likely = layers.forecast(layer).likely(chance).into_iter().map(|named| named.expert);
                let expected = planned(PlanScope::Likely(chance), 1, layer);
                assert_eq!(likely.collect::<Vec<_>>(), expected, "{chance} of layer {layer}");
            }
        }
    }
}
