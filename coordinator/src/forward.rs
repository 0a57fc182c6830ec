//! The model, layer by layer: everything dense here, every MoE layer through `dispatch`. The encoder runs over
//! whole prompts, the decoder over the new tokens of each sequence. Called by the engine, on its thread.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use metrics::Counter;
use sida_model::{Dense, DeviceError, ModelConfig, ModelError, SequenceState, Spans, Stack, States, Walk, router};
use sida_routing::{Grouping, LayerId, Routes};
use sida_telemetry::{Span, TraceContext, counter, names, spans};

use crate::{
    callers::Callers,
    dispatch::Dispatch,
    layer_rows::{LayerRows, Place},
    measures::Phases,
    request::Request,
    routing_mode::{self, Part},
    statistics::Statistics,
    trace::HashCounts,
};

/// One pass through the model after another.
pub(crate) struct Forward {
    dense: Dense,
    dispatch: Dispatch,
    enforce_capacity: bool,
    statistics: Arc<Statistics>,
    /// For each MoE layer: predictions that were the first choice, another one, a miss.
    predictions: Vec<[Counter; 3]>,
    /// For each MoE layer and expert: rows. Empty where there are too many to export.
    routed: Vec<Vec<Counter>>,
}

/// Series of `sida_routed_rows_total` at most.
const ROUTED_SERIES_MAX: usize = 4096;

/// What a pass cost, for every sequence in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Costs {
    /// The pass's span, and since when dense layers have been computed in it.
    trace: Option<(TraceContext, Instant)>,
    /// Dense layers, routers and the head.
    pub(crate) backbone: Duration,
    /// Dispatch, expert compute and combine, without `load`.
    pub(crate) experts: Duration,
    /// Waiting for experts to be loaded.
    pub(crate) load: Duration,
    /// Experts that had to be loaded first.
    pub(crate) demand_loads: u64,
    /// Calls that went to another node.
    pub(crate) failovers: u64,
}

impl Forward {
    /// `enforce_capacity` drops tokens beyond the model's `expert_capacity`, per sequence.
    pub(crate) fn new(dense: Dense, dispatch: Dispatch, enforce_capacity: bool, statistics: Arc<Statistics>) -> Self {
        let outcomes = |layer: usize| {
            ["top1", "hit", "miss"].map(|outcome| {
                counter!(names::HASH_PREDICTIONS_TOTAL, names::LAYER => layer.to_string(), names::OUTCOME => outcome)
            })
        };
        let (layers, experts) = (dense.config().moe_layer_count(), dense.config().num_experts);
        let predictions = (0..layers).map(outcomes).collect();
        let rows = |layer: usize, expert: usize| counter!(names::ROUTED_ROWS_TOTAL, names::LAYER => layer.to_string(), names::EXPERT => expert.to_string());
        let exported = if layers * experts <= ROUTED_SERIES_MAX { layers } else { 0 };
        let routed = (0..exported).map(|layer| (0..experts).map(|expert| rows(layer, expert)).collect()).collect();
        Self { dense, dispatch, enforce_capacity, statistics, predictions, routed }
    }

    /// What the model is.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.dense.config()
    }

    /// The dense part of the model.
    pub(crate) fn dense(&mut self) -> &mut Dense {
        &mut self.dense
    }

    /// The encoder's states of the prompts that `spans` cuts `ids` into, one of each of `requests`.
    pub(crate) fn encode(
        &mut self,
        ids: &[u32],
        spans: &Spans,
        parts: &mut [Part],
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<States, ModelError> {
        let states = self.pass(Stack::Encoder, ids, spans, &mut [], parts, requests, costs);
        self.noted(states)
    }

    /// The decoder's states of the new tokens of each sequence, whose caches are `caches`, and whose requests `requests`.
    pub(crate) fn decode(
        &mut self,
        ids: &[u32],
        spans: &Spans,
        caches: &mut [&mut SequenceState],
        parts: &mut [Part],
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<States, ModelError> {
        let states = self.pass(Stack::Decoder, ids, spans, caches, parts, requests, costs);
        self.noted(states)
    }

    /// Notes whether a pass ended because the device is lost.
    fn noted<T>(&self, outcome: Result<T, ModelError>) -> Result<T, ModelError> {
        if let Err(ModelError::Device(DeviceError::Lost(_))) = &outcome {
            self.statistics.is_device_lost.store(true, Ordering::Relaxed);
        }
        outcome
    }

    #[allow(clippy::too_many_arguments)] // A batch: its rows, whose they are, and what is noted of it.
    fn pass(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        caches: &mut [&mut SequenceState],
        parts: &mut [Part],
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<States, ModelError> {
        let start = Instant::now();
        let mut walk = self.dense.begin(stack, ids, spans, caches)?; // h (tokens, d_model)
        while let Some(layer) = self.dense.advance(&mut walk, spans, caches)? {
            self.moe(&mut walk, layer, spans, parts, requests, costs)?;
        }
        let states = self.dense.finish(walk, spans, caches)?;
        costs.finish_pass(start);
        Ok(states)
    }

    /// `h += sum over its experts of weight * expert(x)`, row by row.
    fn moe(
        &mut self,
        walk: &mut Walk,
        layer: LayerId,
        spans: &Spans,
        parts: &mut [Part],
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<(), ModelError> {
        let d_model = self.config().d_model;
        let before: Vec<HashCounts> = parts.iter().map(|part| part.hash).collect();
        let mut routes = routing_mode::routes(&self.dense, walk, layer, spans, parts)?;
        if self.enforce_capacity {
            router::enforce_capacity(&mut routes, spans, self.config().expert_capacity);
        }
        self.note(layer, &routes, spans, parts, &before);

        let start = Instant::now();
        costs.dense_until(start);
        let grouping = Grouping::new(&routes);
        let span = costs.trace.map(|(pass, _)| Span::below(pass, "dispatch").with("sida.layer", i64::from(layer.0)));
        let trace = span.as_ref().map(Span::context);
        if let Some(routed) = self.routed.get(usize::from(layer.0)) {
            for group in &grouping.groups {
                routed[usize::from(group.expert.0)].increment(u64::from(group.rows));
            }
        }
        let rows = LayerRows { layer, grouping: &grouping, callers: Callers::new(spans, requests), trace };
        let Self { dense, dispatch, .. } = self;
        let dispatched = match dense.rows_on_device() {
            Some(on_device) => dispatch.moe(&rows, Place::on_device(on_device, &grouping)?)?,
            None => {
                let mut out = vec![0.0; spans.rows() * d_model];
                let dispatched = dense.rows(walk, |x| dispatch.moe(&rows, Place::Here { x, out: &mut out }))??;
                dense.add(walk, out)?;
                dispatched
            }
        };
        for (rows, error) in &dispatched.failed {
            for &token in &grouping.tokens[rows.clone()] {
                if let Some(part) = spans.holder(token as usize) {
                    parts[part].failure.get_or_insert_with(|| error.clone());
                }
            }
        }
        drop(span);
        costs.dense_from(Instant::now());
        costs.experts += start.elapsed().saturating_sub(dispatched.load);
        costs.load += dispatched.load;
        costs.demand_loads += dispatched.demand_loads;
        costs.failovers += dispatched.failovers;
        self.statistics.failovers.fetch_add(dispatched.failovers, Ordering::Relaxed);
        Ok(())
    }

    /// Notes which experts each part uses, and how its table fared since `before`.
    fn note(&self, layer: LayerId, routes: &Routes, spans: &Spans, parts: &mut [Part], before: &[HashCounts]) {
        let mut sum = HashCounts::default();
        for ((part, range), before) in parts.iter_mut().zip(spans.ranges()).zip(before) {
            let rows = range.start * routes.top_k..range.end * routes.top_k;
            for &expert in routes.experts[rows].iter().flatten() {
                part.experts.insert(layer, expert);
            }
            sum.hits += part.hash.hits - before.hits;
            sum.top1_hits += part.hash.top1_hits - before.top1_hits;
            sum.misses += part.hash.misses - before.misses;
        }
        let counters = &self.predictions[usize::from(layer.0)];
        let counts = [sum.top1_hits, sum.hits - sum.top1_hits, sum.misses];
        // A single token's layer has one of them, and to add nothing to the others would cost as much.
        for (counter, count) in counters.iter().zip(counts).filter(|&(_, count)| count > 0) {
            counter.increment(count);
        }
        self.statistics.hash_hits.fetch_add(sum.hits, Ordering::Relaxed);
        self.statistics.hash_misses.fetch_add(sum.misses, Ordering::Relaxed);
    }
}

impl Costs {
    /// Of a pass with this span.
    pub(crate) fn of_pass(span: Option<TraceContext>) -> Self {
        Self { trace: span.map(|span| (span, Instant::now())), ..Self::default() }
    }

    /// Something dense beyond the pass was computed from `start` to now: the head, what the decoder keeps of a prompt.
    pub(crate) fn dense_since(&mut self, start: Instant) {
        let now = Instant::now();
        self.backbone += now - start;
        self.dense_until(now);
    }

    /// Dense layers were computed until then.
    fn dense_until(&mut self, end: Instant) {
        if let Some((pass, since)) = &mut self.trace {
            spans::record(*pass, "backbone", *since, end);
            *since = end;
        }
    }

    /// Dense layers are computed from then on.
    fn dense_from(&mut self, start: Instant) {
        if let Some((_, since)) = &mut self.trace {
            *since = start;
        }
    }

    /// What the pass took beyond the experts was the backbone's.
    fn finish_pass(&mut self, start: Instant) {
        self.backbone += start.elapsed().saturating_sub(self.experts + self.load);
    }

    /// Adds a step's costs to the metrics.
    pub(crate) fn record(&self, phases: &Phases) {
        phases.backbone.record(self.backbone);
        phases.experts.record(self.experts);
        phases.load.record(self.load);
    }
}
