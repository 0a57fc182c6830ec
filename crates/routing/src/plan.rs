//! What a batch will use, in the order it will use it: the distinct experts of each MoE layer. A plan is a
//! hint to expert-nodes; losing one costs time, never correctness.

use std::collections::BTreeSet;

use crate::{ExpertKey, HashTable, LayerForecast, LayerId, forecast::Named};

/// Names a plan from its hint to its release. Unique per coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanId(pub u64);

/// The experts a batch is expected to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its name.
    pub id: PlanId,
    /// In order of use; of the experts of a layer the likeliest to be used are first.
    /// Invariant: no key appears twice.
    pub experts: Vec<ExpertKey>,
    /// Whether its batch begins now: it is used before every plan that waits.
    pub begins: bool,
}

/// How much is planned of what a table names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlanScope {
    /// Each token's likeliest, as many as routers choose for it: all that is used where the table decides.
    FirstChoices,
    /// The experts that the batch uses with this chance or a greater one.
    Likely(f64),
    /// All.
    Everything,
}

impl Plan {
    /// What is planned of what `tables` name: one per sequence of the batch, each with its scope. In order of the layers, and in
    /// each the likeliest to be used first. Chances are of all tables together ([`LayerForecast`]); where several are to be
    /// planned from, the least is. Routers choose `top_k` experts for each token.
    pub fn from_tables(id: PlanId, tables: &[(&HashTable, PlanScope)], top_k: usize) -> Self {
        let mut experts = Vec::new();
        let layers: BTreeSet<LayerId> = tables.iter().flat_map(|(table, _)| table.layers()).collect();
        for layer in layers {
            let of_layer = || tables.iter().filter(|(table, _)| table.layers().any(|l| l == layer));
            let num_experts = of_layer().map(|(table, _)| table.num_experts()).max().unwrap_or(0);
            let mut forecast = LayerForecast::new(num_experts);
            let mut chance: f64 = 1.0;
            let mut is_wanted = vec![false; num_experts];
            for &(table, scope) in of_layer() {
                match scope {
                    PlanScope::FirstChoices => {
                        let tokens = (0..table.shape().tokens).map(|token| table.experts(layer, token));
                        tokens.for_each(|experts| forecast.add_certain(experts, top_k));
                    }
                    PlanScope::Likely(from) => {
                        forecast.add(table, layer, top_k);
                        chance = chance.min(from);
                    }
                    PlanScope::Everything => {
                        forecast.add(table, layer, top_k);
                        let named = (0..table.shape().tokens).flat_map(|token| table.experts(layer, token));
                        named.for_each(|expert| is_wanted[usize::from(expert.0)] = true);
                    }
                }
            }
            let is_planned =
                |named: &Named| f64::from(named.chance) >= chance || is_wanted[usize::from(named.expert.0)];
            let planned = forecast.named().into_iter().filter(is_planned);
            experts.extend(planned.map(|named| ExpertKey { layer, expert: named.expert }));
        }
        Self { id, experts, begins: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, ExpertId, hash_table::Shape};

    fn table(first_layer: u16, layers: usize, experts: &[u16]) -> HashTable {
        let shape = Shape { first_layer: LayerId(first_layer), layers, tokens: experts.len() / layers / 2, top_k: 2 };
        let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
        let alphas = vec![0.5; experts.len()];
        HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 10, experts, alphas).unwrap()
    }

    /// The same, with these chances of the two experts of each token.
    fn with_chances(table: HashTable, chances: &[f32]) -> HashTable {
        table.with_chances(chances.to_vec()).unwrap()
    }

    fn keys(tables: &[(&HashTable, PlanScope)]) -> Vec<(u16, u16)> {
        Plan::from_tables(PlanId(1), tables, 1).experts.iter().map(|key| (key.layer.0, key.expert.0)).collect()
    }

    /// Experts would be preloaded in another order than the batch needs them, or some that are not worth it.
    #[test]
    fn a_plan_names_each_expert_once_in_order_of_use_and_of_likelihood() {
        let a = with_chances(table(0, 2, &[5, 1, 5, 2, 7, 5, 3, 7]), &[0.9, 0.1, 0.5, 0.5, 0.8, 0.2, 0.6, 0.4]);
        let b = with_chances(table(0, 2, &[1, 5, 3, 9]), &[0.7, 0.3, 1.0, 0.0]);
        let both = |scope| [(&a, scope), (&b, scope)];
        assert_eq!(keys(&both(PlanScope::Likely(0.0))), [(0, 5), (0, 1), (0, 2), (1, 3), (1, 7), (1, 5), (1, 9)]);
        assert_eq!(keys(&both(PlanScope::Everything)), keys(&both(PlanScope::Likely(0.0))));
        assert_eq!(keys(&both(PlanScope::Likely(0.7))), [(0, 5), (0, 1), (1, 3), (1, 7)]);
        assert_eq!(keys(&both(PlanScope::Likely(1.0))), [(1, 3)]);
    }

    /// Requests whose experts are chosen otherwise would wait for experts that the plan of those beside them leaves out.
    #[test]
    fn each_table_is_planned_by_its_own_scope() {
        let a = with_chances(table(0, 1, &[5, 1, 5, 2]), &[0.9, 0.1, 0.5, 0.5]);
        let b = with_chances(table(0, 1, &[3, 4]), &[0.01, 0.01]);
        assert_eq!(keys(&[(&a, PlanScope::Likely(0.9)), (&b, PlanScope::Everything)]), [(0, 5), (0, 3), (0, 4)]);
        assert_eq!(keys(&[(&a, PlanScope::Likely(0.96)), (&b, PlanScope::FirstChoices)]), [(0, 3)]);
        assert_eq!(keys(&[(&a, PlanScope::FirstChoices), (&b, PlanScope::FirstChoices)]), [(0, 3), (0, 5)]);
        let two = Plan::from_tables(PlanId(1), &[(&b, PlanScope::FirstChoices)], 2);
        assert_eq!(two.experts.len(), 2);
    }

    /// Sequences that are encoded would be hinted as if they were decoded too, or a batch of both would end a node.
    #[test]
    fn a_table_speaks_of_its_own_layers_only() {
        let (encoder, decoder) = (table(0, 1, &[5, 1]), table(1, 1, &[4, 2]));
        let everything = |tables: &[&HashTable]| {
            keys(&tables.iter().map(|&table| (table, PlanScope::Everything)).collect::<Vec<_>>())
        };
        assert_eq!(everything(&[&encoder, &decoder]), [(0, 5), (0, 1), (1, 4), (1, 2)]);
        assert_eq!(everything(&[&decoder]), [(1, 4), (1, 2)]);
        assert_eq!(everything(&[]), []);
    }
}
