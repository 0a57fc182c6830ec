//! A pass through the model: whole, or as micro-batches that take turns or go side by side. Which is decided by
//! `routing::micro_batches`; how one goes through the layers is in `walker`. Called by the engine, on its thread.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use parking_lot::Mutex;
use sida_model::{Dense, DeviceError, ModelConfig, ModelError, Stack, States, side_by_side};
use sida_routing::micro_batches::{MicroBatches, PassSize, Way};

use crate::{
    config::MicroBatching,
    dispatch::dispatch::Dispatch,
    forward::{batch::Batch, costs::Costs, route_measures::RouteMeasures, walker::Walker},
    measures::statistics::Statistics,
};

/// Micro-batches that take turns on one thread.
const TURNS: usize = 2;

/// One pass through the model after another.
pub(crate) struct Forward {
    /// One for each thread that computes, as far as each has a way to the weights of its own. The first walks with whole
    /// batches.
    /// Invariant: not empty.
    walkers: Vec<Walker>,
    statistics: Arc<Statistics>,
    micro_batching: MicroBatching,
    micro_batches: MicroBatches,
}

/// How batches may be cut.
#[derive(Clone, Copy)]
enum Cut {
    Not,
    InTurns,
    SideBySide,
}

impl Forward {
    /// `dispatch` makes one for each walker; `enforce_capacity` drops tokens beyond the model's `expert_capacity`, per
    /// sequence.
    pub(crate) fn new(
        dense: Dense,
        dispatch: impl Fn() -> Dispatch,
        enforce_capacity: bool,
        micro_batching: MicroBatching,
        statistics: Arc<Statistics>,
    ) -> Self {
        let measures = Arc::new(RouteMeasures::new(dense.config(), statistics.clone()));
        let others: Vec<Dense> = (1..rayon::current_num_threads()).filter_map(|_| dense.another()).collect();
        let walker = |dense| Walker { dense, dispatch: dispatch(), enforce_capacity, measures: measures.clone() };
        let walkers = std::iter::once(dense).chain(others).map(walker).collect();
        Self { walkers, statistics, micro_batching, micro_batches: MicroBatches::default() }
    }

    /// What the model is.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.walkers[0].dense.config()
    }

    /// The dense part of the model.
    pub(crate) fn dense(&mut self) -> &mut Dense {
        &mut self.walkers[0].dense
    }

    /// As how many micro-batches a batch may go; 1: whole.
    pub(crate) fn parts(&mut self) -> usize {
        let cut = self.cut();
        self.parts_of(cut)
    }

    fn parts_of(&self, cut: Cut) -> usize {
        match cut {
            Cut::Not => 1,
            Cut::InTurns => TURNS,
            Cut::SideBySide => self.walkers.len(),
        }
    }

    /// Asked once for each pass: nodes come and go meanwhile.
    fn cut(&mut self) -> Cut {
        let Walker { dense, dispatch, .. } = &mut self.walkers[0];
        match (dense.rows_on_device(), dispatch.is_remote()) {
            (Some(_), _) => Cut::Not,
            (None, true) => Cut::InTurns,
            (None, false) => Cut::SideBySide,
        }
    }

    /// What a stack makes of a batch: a row for each token.
    pub(crate) fn pass(&mut self, batch: Batch<'_, '_>, costs: &mut Costs) -> Result<States, ModelError> {
        let start = Instant::now();
        let rows = batch.spans.rows();
        let size = PassSize::new(batch.stack == Stack::Decoder, rows);
        let cut = self.cut();
        let parts = self.parts_of(cut).min(batch.spans.len());
        let way = match self.micro_batching {
            MicroBatching::AsMeasured if parts > 1 => self.micro_batches.way(size),
            MicroBatching::Always if parts > 1 => Way::Parts,
            _ => Way::Whole,
        };
        let states = match (way, cut) {
            (Way::Parts, Cut::InTurns) => self.walkers[0].walk(batch.cut(parts), costs),
            (Way::Parts, Cut::SideBySide) => self.side_by_side(batch.cut(parts), costs),
            (Way::Whole, _) | (_, Cut::Not) => self.walkers[0].walk(vec![batch], costs),
        };
        let states = states.and_then(States::join);
        if let Err(ModelError::Device(DeviceError::Lost(_))) = &states {
            self.statistics.is_device_lost.store(true, Ordering::Relaxed);
        }
        costs.finish_pass(start);
        if parts > 1 && states.is_ok() {
            self.micro_batches.note(size, way, rows, start.elapsed());
        }
        states
    }

    /// Each micro-batch by a walker, at the same time. There are not more of them than walkers.
    fn side_by_side(&mut self, batches: Vec<Batch<'_, '_>>, costs: &mut Costs) -> Result<Vec<States>, ModelError> {
        let walked = Mutex::new(Vec::with_capacity(batches.len()));
        let walks = self.walkers.iter_mut().zip(batches).enumerate().collect();
        let part = costs.of_part();
        side_by_side::each(walks, |(at, (walker, batch)): (usize, (&mut Walker, Batch<'_, '_>))| {
            let mut costs = part;
            let states = walker.walk(vec![batch], &mut costs);
            walked.lock().push((at, states, costs));
        });
        let mut walked = walked.into_inner();
        walked.sort_by_key(|(at, ..)| *at);
        costs.add_parts(&walked.iter().map(|(.., costs)| *costs).collect::<Vec<_>>());
        let states = walked.into_iter().map(|(_, states, _)| states).collect::<Result<Vec<_>, _>>()?;
        Ok(states.into_iter().flatten().collect())
    }
}
