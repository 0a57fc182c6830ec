//! What a batch will use, in the order it will use it: the distinct experts of each MoE layer. A plan is a
//! hint to expert-nodes; losing one costs time, never correctness.

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
}

impl Plan {
    /// The distinct experts that `tables` (one per sequence of the batch) predict for the batch, layer by
    /// layer, the most wanted first: with `depth` 1 only each token's likeliest, and so on up to the table's k.
    pub fn from_tables(id: PlanId, tables: &[&HashTable], depth: usize) -> Self {
        let mut experts = Vec::new();
        let layers: std::collections::BTreeSet<LayerId> = tables.iter().flat_map(|t| t.layers()).collect();
        for layer in layers {
            let mut rows: std::collections::BTreeMap<ExpertId, (usize, usize)> = Default::default();
            for table in tables.iter().filter(|t| t.layers().any(|l| l == layer)) {
                for token in 0..table.shape().tokens {
                    for (rank, &expert) in table.experts(layer, token).iter().take(depth).enumerate() {
                        let entry = rows.entry(expert).or_insert((rank, 0));
                        *entry = (entry.0.min(rank), entry.1 + 1);
                    }
                }
            }
            let mut wanted: Vec<_> = rows.into_iter().collect();
            wanted.sort_by_key(|&(expert, (rank, count))| (rank, std::cmp::Reverse(count), expert));
            experts.extend(wanted.into_iter().map(|(expert, _)| ExpertKey { layer, expert }));
        }
        Self { id, experts }
    }
}
