//! What is told of a pass's routes: which experts its rows went to, and how the hash tables fared. Used by `pass_runner`.

use std::sync::{Arc, atomic::Ordering};

use metrics::Counter;
use sida_model::{ModelConfig, Spans};
use sida_routing::{Group, LayerId, Routes};
use sida_telemetry::{counter, names};

use crate::{answer::trace::HashCounts, forward::expert_choice::SequenceRouting, measures::statistics::Statistics};

/// Series of `sida_routed_rows_total` at most.
const ROUTED_SERIES_MAX: usize = 4096;

/// Handles on the metrics.
pub(crate) struct RouteMeasures {
    statistics: Arc<Statistics>,
    /// For each MoE layer: predictions that were the first choice, another one, a miss.
    predictions: Vec<[Counter; 3]>,
    /// For each MoE layer and expert: rows. Empty where there are too many to export.
    routed: Vec<Vec<Counter>>,
}

impl RouteMeasures {
    pub(crate) fn new(config: &ModelConfig, statistics: Arc<Statistics>) -> Self {
        let outcomes = |layer: usize| {
            ["top1", "hit", "miss"].map(|outcome| {
                counter!(names::HASH_PREDICTIONS_TOTAL, names::LAYER => layer.to_string(), names::OUTCOME => outcome)
            })
        };
        let (layers, experts) = (config.moe_layer_count(), config.num_experts);
        let predictions = (0..layers).map(outcomes).collect();
        let rows = |layer: usize, expert: usize| counter!(names::ROUTED_ROWS_TOTAL, names::LAYER => layer.to_string(), names::EXPERT => expert.to_string());
        let exported = if layers * experts <= ROUTED_SERIES_MAX { layers } else { 0 };
        let routed = (0..exported).map(|layer| (0..experts).map(|expert| rows(layer, expert)).collect()).collect();
        Self { statistics, predictions, routed }
    }

    /// Notes which experts each part uses.
    pub(crate) fn note_experts(&self, layer: LayerId, routes: &Routes, spans: &Spans, parts: &mut [SequenceRouting]) {
        for (part, range) in parts.iter_mut().zip(spans.ranges()) {
            let rows = range.start * routes.top_k..range.end * routes.top_k;
            for &expert in routes.experts[rows].iter().flatten() {
                part.experts.insert(layer, expert);
            }
        }
    }

    /// Compares the tables of a pass with what its routers chose, and notes how they fared.
    pub(crate) fn note_predictions(&self, parts: &mut [SequenceRouting]) {
        let mut sums = vec![HashCounts::default(); self.predictions.len()];
        for (layer, counts) in parts.iter_mut().flat_map(SequenceRouting::compare) {
            sums[usize::from(layer.0)].add(*counts);
        }
        for (sum, counters) in sums.iter().zip(&self.predictions) {
            let counts = [sum.top1_hits, sum.hits - sum.top1_hits, sum.misses];
            // A single token's layer has one of them, and to add nothing to the others would cost as much.
            for (counter, count) in counters.iter().zip(counts).filter(|&(_, count)| count > 0) {
                counter.increment(count);
            }
        }
        let all = |count: fn(&HashCounts) -> u64| sums.iter().map(count).sum();
        self.statistics.hash_hits.fetch_add(all(|sum| sum.hits), Ordering::Relaxed);
        self.statistics.hash_misses.fetch_add(all(|sum| sum.misses), Ordering::Relaxed);
    }

    /// Notes how many rows each expert gets.
    pub(crate) fn note_rows(&self, layer: LayerId, groups: &[Group]) {
        if let Some(routed) = self.routed.get(usize::from(layer.0)) {
            for group in groups {
                routed[usize::from(group.expert.0)].increment(u64::from(group.rows));
            }
        }
    }

    /// Notes calls that went to another node.
    pub(crate) fn note_failovers(&self, failovers: u64) {
        self.statistics.failovers.fetch_add(failovers, Ordering::Relaxed);
    }
}
