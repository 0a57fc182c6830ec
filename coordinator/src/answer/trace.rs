//! The trace of a request: where its time went, what the hash table knew, which experts its rows went to. The scheduler
//! fills it, and every answer carries it.

use std::time::Duration;

use sida_routing::{ExpertId, LayerId};

use crate::answer::{hash_layers::HashLayers, routing_mode::RoutingMode};

/// The trace of one request.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The routing mode it ran in.
    pub mode: RoutingMode,
    /// Whether some steps had no hash table, and so ran `exact`, without hints. Where expert-nodes gain nothing by plans, few
    /// requests in `exact` are predicted.
    pub unpredicted: bool,
    /// Where the request's time went.
    pub timings: Timings,
    /// Tokens of the prompt that were not computed, since another sequence of the same client began with them.
    pub cached_tokens: usize,
    /// (token, layer) pairs whose routed expert was in the hash table's top k, and those that were not. The
    /// routed expert is the router's; where no router runs (`hash` with predicted alphas) nothing is counted.
    pub hash: HashCounts,
    /// Experts in (token, layer) pairs that the router would not have chosen, had it been free: in `guided` mode only.
    pub rerouted: u64,
    /// The same layer by layer, and which experts the tables named: where predictions are evaluated.
    pub hash_layers: Option<HashLayers>,
    /// Experts that had to be loaded while a step of this request waited.
    pub demand_loads: u64,
    /// Calls that were made again after one failed.
    pub failovers: u64,
    /// Which experts the request's rows went to.
    pub experts: ExpertSets,
}

impl Trace {
    /// A trace of nothing yet.
    pub(crate) fn new(mode: RoutingMode, moe_layers: usize, num_experts: usize) -> Self {
        Self {
            mode,
            unpredicted: false,
            timings: Timings::default(),
            cached_tokens: 0,
            hash: HashCounts::default(),
            rerouted: 0,
            hash_layers: None,
            demand_loads: 0,
            failovers: 0,
            experts: ExpertSets::new(moe_layers, num_experts),
        }
    }
}

/// Wall-clock time by phase. A step is shared by the sequences of its batch and counted whole for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for a place in a batch.
    pub queue: Duration,
    /// Filling hash tables.
    pub predict: Duration,
    /// Waiting for experts to be loaded.
    pub load: Duration,
    /// Dense layers, routers and the head.
    pub backbone: Duration,
    /// Dispatch, expert compute and combine, without `load`.
    pub experts: Duration,
    /// From acceptance to the answer.
    pub total: Duration,
}

/// How often the hash table named the experts that rows were routed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashCounts {
    /// The routed expert was among the table's k.
    pub hits: u64,
    /// Hits whose routed expert was the table's first choice.
    pub top1_hits: u64,
    /// Hits whose routed expert was among the table's first three.
    pub top3_hits: u64,
    /// The routed expert was not among the table's k.
    pub misses: u64,
}

impl HashCounts {
    /// Adds other counts.
    pub(crate) fn add(&mut self, other: HashCounts) {
        self.hits += other.hits;
        self.top1_hits += other.top1_hits;
        self.top3_hits += other.top3_hits;
        self.misses += other.misses;
    }
}

/// For each MoE layer, a set of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertSets {
    words_per_layer: usize,
    /// (layers, words_per_layer): bit e of a layer's words is expert e.
    words: Vec<u64>,
}

impl ExpertSets {
    /// Empty sets for every layer.
    pub(crate) fn new(moe_layers: usize, num_experts: usize) -> Self {
        let words_per_layer = num_experts.div_ceil(64);
        Self { words_per_layer, words: vec![0; moe_layers * words_per_layer] }
    }

    /// Puts an expert into its layer's set.
    pub(crate) fn insert(&mut self, layer: LayerId, expert: ExpertId) {
        let expert = usize::from(expert.0);
        self.words[usize::from(layer.0) * self.words_per_layer + expert / 64] |= 1 << (expert % 64);
    }

    /// Puts all of `other` (of the same model) into these.
    pub(crate) fn union(&mut self, other: &ExpertSets) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Every layer with its experts, ascending.
    pub fn layers(&self) -> impl Iterator<Item = (LayerId, Vec<ExpertId>)> + '_ {
        self.words.chunks(self.words_per_layer.max(1)).enumerate().map(|(layer, words)| {
            let bits = words.iter().enumerate().flat_map(|(at, &word)| {
                (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| ExpertId((at * 64 + bit) as u16))
            });
            (LayerId(layer as u16), bits.collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_keep_layers_apart() {
        // Would break: the picture of which experts woke up shows another layer's, or loses those above 64.
        let mut sets = ExpertSets::new(2, 130);
        sets.insert(LayerId(1), ExpertId(129));
        let mut more = ExpertSets::new(2, 130);
        more.insert(LayerId(0), ExpertId(63));
        more.insert(LayerId(1), ExpertId(64));
        sets.union(&more);
        let layers: Vec<_> = sets.layers().collect();
        assert_eq!(layers, [(LayerId(0), vec![ExpertId(63)]), (LayerId(1), vec![ExpertId(64), ExpertId(129)])]);
    }
}
