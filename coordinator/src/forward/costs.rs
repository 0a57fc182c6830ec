//! What a pass costs: time by phase, loads, failovers, and the spans that say so in a trace. Kept by `forward`.

use std::time::{Duration, Instant};

use sida_telemetry::{TraceContext, spans};

use crate::{dispatch::dispatch::Dispatched, measures::metrics::Phases};

/// What a pass cost, for every sequence in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Costs {
    /// The pass's span, and since when dense layers have been computed in it.
    pub(crate) trace: Option<(TraceContext, Instant)>,
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
    pub(crate) fn dense_until(&mut self, end: Instant) {
        if let Some((pass, since)) = &mut self.trace {
            spans::record(*pass, "backbone", *since, end);
            *since = end;
        }
    }

    /// An MoE layer took so long, without what was computed here meanwhile.
    pub(crate) fn add(&mut self, dispatched: &Dispatched, took: Duration) {
        let load = dispatched.load.min(took);
        self.experts += took - load;
        self.load += load;
        self.demand_loads += dispatched.demand_loads;
        self.failovers += dispatched.failovers;
        self.dense_from(Instant::now());
    }

    /// Dense layers are computed from then on.
    pub(crate) fn dense_from(&mut self, start: Instant) {
        if let Some((_, since)) = &mut self.trace {
            *since = start;
        }
    }

    /// What the pass took beyond the experts was the backbone's.
    pub(crate) fn finish_pass(&mut self, start: Instant) {
        self.backbone += start.elapsed().saturating_sub(self.experts + self.load);
    }

    /// Adds a step's costs to the metrics.
    pub(crate) fn record(&self, phases: &Phases) {
        phases.backbone.record(self.backbone);
        phases.experts.record(self.experts);
        phases.load.record(self.load);
    }

    /// Of a micro-batch of its pass.
    pub(crate) fn of_part(&self) -> Self {
        Self { trace: self.trace, ..Self::default() }
    }

    /// Micro-batches went side by side: time counts as their mean.
    pub(crate) fn add_parts(&mut self, parts: &[Self]) {
        let count = parts.len().max(1) as u32;
        self.experts += parts.iter().map(|part| part.experts).sum::<Duration>() / count;
        self.load += parts.iter().map(|part| part.load).sum::<Duration>() / count;
        self.demand_loads += parts.iter().map(|part| part.demand_loads).sum::<u64>();
        self.failovers += parts.iter().map(|part| part.failovers).sum::<u64>();
        self.dense_from(Instant::now());
    }
}
