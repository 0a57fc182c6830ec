//! The model, layer by layer: everything dense here, every MoE layer through `dispatch`. The encoder runs over
//! whole prompts, the decoder over the new tokens of each sequence. Called by the engine, on its thread.
//!
//! Where rows leave the process, a batch may go as two micro-batches that take turns: one is computed here, up to its next
//! MoE layer, while the rows of the other are at the experts. `routing::micro_batches` decides whether.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use metrics::Counter;
use sida_model::{Dense, DeviceError, ModelConfig, ModelError, Spans, Stack, States, Walk, router};
use sida_routing::{
    Grouping, LayerId, Routes,
    micro_batches::{MicroBatches, PassSize, Way},
};
use sida_telemetry::{Span, TraceContext, counter, names, spans};

use crate::{
    batch::Batch,
    config::Halving,
    dispatch::{Dispatch, Dispatched, UnderWay},
    layer_rows::Place,
    measures::Phases,
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
    halving: Halving,
    micro_batches: MicroBatches,
}

/// A batch, or a half of it, on its way through a stack.
struct Walking<'b, 's> {
    batch: Batch<'b, 's>,
    walk: Walk,
    /// Where its rows are away.
    gate: Option<Gate>,
}

/// An MoE layer whose rows are at the experts.
struct Gate {
    layer: LayerId,
    grouping: Grouping,
    /// Of the layer.
    span: Option<Span>,
    experts: Experts,
    /// What sending them off took.
    took: Duration,
}

enum Experts {
    UnderWay(Box<UnderWay>),
    /// On a device, where one batch walks at a time.
    Done(Dispatched),
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
    pub(crate) fn new(
        dense: Dense,
        dispatch: Dispatch,
        enforce_capacity: bool,
        halving: Halving,
        statistics: Arc<Statistics>,
    ) -> Self {
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
        let micro_batches = MicroBatches::default();
        Self { dense, dispatch, enforce_capacity, statistics, predictions, routed, halving, micro_batches }
    }

    /// What the model is.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.dense.config()
    }

    /// The dense part of the model.
    pub(crate) fn dense(&mut self) -> &mut Dense {
        &mut self.dense
    }

    /// What a stack makes of a batch: a row for each token.
    pub(crate) fn pass(&mut self, batch: Batch<'_, '_>, costs: &mut Costs) -> Result<States, ModelError> {
        let start = Instant::now();
        let rows = batch.spans.rows();
        let size = PassSize::new(batch.stack == Stack::Decoder, rows);
        let may_be_cut = batch.spans.len() > 1 && self.dense.rows_on_device().is_none() && self.dispatch.is_remote();
        let way = match self.halving {
            Halving::AsMeasured if may_be_cut => self.micro_batches.way(size),
            Halving::Always if may_be_cut => Way::Halves,
            _ => Way::Whole,
        };
        let batches = match way {
            Way::Whole => vec![batch],
            Way::Halves => batch.halves(),
        };
        let states = self.walk(batches, costs);
        if let Err(ModelError::Device(DeviceError::Lost(_))) = &states {
            self.statistics.is_device_lost.store(true, Ordering::Relaxed);
        }
        costs.finish_pass(start);
        if may_be_cut {
            self.micro_batches.note(size, way, rows, start.elapsed());
        }
        states
    }

    /// Walks through a stack with the parts of a batch, which take turns at the MoE layers.
    fn walk(&mut self, batches: Vec<Batch<'_, '_>>, costs: &mut Costs) -> Result<States, ModelError> {
        let mut walking = Vec::with_capacity(batches.len());
        for batch in batches {
            let walk = self.dense.begin(batch.stack, batch.ids, &batch.spans, batch.states)?; // h (tokens, d_model)
            walking.push(Walking { batch, walk, gate: None });
        }
        let mut is_walking = true;
        while is_walking {
            is_walking = false;
            for one in &mut walking {
                self.finish_moe(one, costs)?;
                match self.dense.advance(&mut one.walk, &one.batch.spans, one.batch.states)? {
                    Some(layer) => {
                        self.begin_moe(one, layer, costs)?;
                        is_walking = true;
                    }
                    None => costs.dense_until(Instant::now()),
                }
            }
        }
        let finish = |Walking { batch, walk, .. }| self.dense.finish(walk, &batch.spans, batch.states);
        States::join(walking.into_iter().map(finish).collect::<Result<_, _>>()?)
    }

    /// `h += sum over its experts of weight * expert(x)`, row by row: x leaves for the experts.
    fn begin_moe(&mut self, one: &mut Walking<'_, '_>, layer: LayerId, costs: &mut Costs) -> Result<(), ModelError> {
        let Walking { batch, walk, gate } = one;
        let before: Vec<HashCounts> = batch.parts.iter().map(|part| part.hash).collect();
        let mut routes = routing_mode::routes(&self.dense, walk, layer, &batch.spans, batch.parts)?;
        if self.enforce_capacity {
            router::enforce_capacity(&mut routes, &batch.spans, self.config().expert_capacity);
        }
        self.note(layer, &routes, &batch.spans, batch.parts, &before);

        let start = Instant::now();
        costs.dense_until(start);
        let grouping = Grouping::new(&routes);
        if let Some(routed) = self.routed.get(usize::from(layer.0)) {
            for group in &grouping.groups {
                routed[usize::from(group.expert.0)].increment(u64::from(group.rows));
            }
        }
        let span = costs.trace.map(|(pass, _)| Span::below(pass, "dispatch").with("sida.layer", i64::from(layer.0)));
        let rows = batch.layer_rows(layer, &grouping, span.as_ref());
        let Self { dense, dispatch, .. } = self;
        let experts = match dense.rows_on_device() {
            Some(on_device) => Experts::Done(dispatch.moe(&rows, Place::on_device(on_device, &grouping)?)?),
            None => Experts::UnderWay(Box::new(dense.rows(walk, |x| dispatch.begin(&rows, &mut Place::Here(x)))??)),
        };
        *gate = Some(Gate { layer, grouping, span, experts, took: start.elapsed() });
        costs.dense_from(Instant::now());
        Ok(())
    }

    /// Takes what became of x, if it is under way, and adds it to h.
    fn finish_moe(&mut self, one: &mut Walking<'_, '_>, costs: &mut Costs) -> Result<(), ModelError> {
        let Walking { batch, walk, gate } = one;
        let Some(Gate { layer, grouping, span, experts, took }) = gate.take() else { return Ok(()) };
        let start = Instant::now();
        let Self { dense, dispatch, .. } = self;
        let rows = batch.layer_rows(layer, &grouping, span.as_ref());
        let mut dispatched = match experts {
            Experts::Done(dispatched) => dispatched,
            Experts::UnderWay(rows_away) => {
                dense.rows(walk, |x| dispatch.finish(*rows_away, &rows, Place::Here(x)))??
            }
        };
        if let Some(out) = dispatched.out.take() {
            dense.add(walk, out)?;
        }
        for (rows, error) in &dispatched.failed {
            for &token in &grouping.tokens[rows.clone()] {
                if let Some(part) = batch.spans.holder(token as usize) {
                    batch.parts[part].failure.get_or_insert_with(|| error.clone());
                }
            }
        }
        drop(span);
        costs.add(&dispatched, took + start.elapsed());
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

    /// An MoE layer took so long, without what was computed here meanwhile.
    fn add(&mut self, dispatched: &Dispatched, took: Duration) {
        let load = dispatched.load.min(took);
        self.experts += took - load;
        self.load += load;
        self.demand_loads += dispatched.demand_loads;
        self.failovers += dispatched.failovers;
        self.dense_from(Instant::now());
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
