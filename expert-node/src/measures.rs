//! The metrics of an expert-node: handles on those of [`sida_telemetry::names`], labelled with
//! the node's name since one process may hold several. Counters move as things happen; gauges that need a look
//! at every expert are set once a second by [`crate::prefetch`].

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};
use sida_routing::{
    ExpertKey, NodeId,
    residency::{LoadKind, Residency},
};
use sida_telemetry::{counter, gauge, histogram, names};

/// Handles, so that recording costs an atomic addition and no look-up.
pub(crate) struct Measures {
    expert_bytes: u64,
    resident_bytes: Gauge,
    idle_bytes: Gauge,
    /// One for each layer.
    resident: Vec<Gauge>,
    slow_load_share: Gauge,
    demand: LoadMeasures,
    prefetch: LoadMeasures,
    evictions: Counter,
    rows: Counter,
    compute_seconds: Histogram,
}

struct LoadMeasures {
    loads: Counter,
    bytes: Counter,
    seconds: Histogram,
}

impl LoadMeasures {
    fn new(node: &str, kind: &'static str) -> Self {
        Self {
            loads: counter!(names::EXPERT_LOADS_TOTAL, names::NODE => node.to_owned(), names::KIND => kind),
            bytes: counter!(names::EXPERT_LOAD_BYTES_TOTAL, names::NODE => node.to_owned(), names::KIND => kind),
            seconds: histogram!(names::EXPERT_LOAD_DURATION_SECONDS, names::NODE => node.to_owned(), names::KIND => kind),
        }
    }
}

impl Measures {
    /// The metrics of a node of `layers` MoE layers that may hold `budget_bytes` of experts of `expert_bytes` each.
    pub(crate) fn new(node: &NodeId, layers: usize, expert_bytes: u64, budget_bytes: u64) -> Self {
        let node = node.as_str();
        gauge!(names::EXPERT_BUDGET_BYTES, names::NODE => node.to_owned()).set(budget_bytes as f64);
        let of_layer = |layer: usize| gauge!(names::EXPERTS_RESIDENT, names::NODE => node.to_owned(), names::LAYER => layer.to_string());
        Self {
            expert_bytes,
            resident_bytes: gauge!(names::EXPERT_RESIDENT_BYTES, names::NODE => node.to_owned()),
            idle_bytes: gauge!(names::EXPERT_IDLE_BYTES, names::NODE => node.to_owned()),
            resident: (0..layers).map(of_layer).collect(),
            slow_load_share: gauge!(names::EXPERT_SLOW_LOAD_SHARE, names::NODE => node.to_owned()),
            demand: LoadMeasures::new(node, "demand"),
            prefetch: LoadMeasures::new(node, "prefetch"),
            evictions: counter!(names::EXPERT_EVICTIONS_TOTAL, names::NODE => node.to_owned()),
            rows: counter!(names::EXPERT_ROWS_TOTAL, names::NODE => node.to_owned()),
            compute_seconds: histogram!(names::EXPERT_COMPUTE_DURATION_SECONDS, names::NODE => node.to_owned()),
        }
    }

    /// An expert is resident now.
    pub(crate) fn loaded(&self, kind: LoadKind, took: Duration) {
        let measures = match kind {
            LoadKind::Demand => &self.demand,
            LoadKind::Prefetch => &self.prefetch,
        };
        measures.loads.increment(1);
        measures.bytes.increment(self.expert_bytes);
        measures.seconds.record(took);
    }

    /// Somebody left, or nobody.
    pub(crate) fn evicted(&self, evicted: Option<ExpertKey>) {
        if evicted.is_some() {
            self.evictions.increment(1);
        }
    }

    /// A call is done.
    pub(crate) fn computed(&self, rows: usize, took: Duration) {
        self.rows.increment(rows as u64);
        self.compute_seconds.record(took);
    }

    /// A pass on the node's device went through a layer.
    pub(crate) fn passed(&self, rows: u64) {
        self.rows.increment(rows);
    }

    /// Sets what only a look at every expert can tell.
    pub(crate) fn look(&self, residency: &Residency) {
        let mut by_layer = vec![0u64; self.resident.len()];
        let (mut resident, mut idle) = (0, 0);
        for (key, planned) in residency.resident() {
            by_layer[usize::from(key.layer.0)] += 1;
            resident += self.expert_bytes;
            idle += if planned { 0 } else { self.expert_bytes };
        }
        self.resident_bytes.set(resident as f64);
        self.idle_bytes.set(idle as f64);
        self.slow_load_share.set(residency.slow_load_share());
        self.resident.iter().zip(by_layer).for_each(|(gauge, experts)| gauge.set(experts as f64));
    }
}
