//! A pass through the model: whole, or as micro-batches that take turns or go side by side. Which is decided by
//! `routing::micro_batches`; how one goes through the layers is in `pass_runner`. Called by the scheduler, on its thread.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use parking_lot::Mutex;
use sida_model::{Backend, DeviceError, ModelConfig, ModelError, Stack, side_by_side};
use sida_routing::micro_batches::{MicroBatches, PassSize, Way};

use crate::{
    answer::request_error::RequestError,
    config::MicroBatching,
    dispatch::dispatch::Dispatch,
    forward::{
        batch::Batch, costs::Costs, expert_choice::SequenceRouting, pass_runner::PassRunner,
        route_measures::RouteMeasures,
    },
    intake::request::Request,
    measures::statistics::Statistics,
};

/// Micro-batches that take turns on one thread.
const TURNS: usize = 2;

/// One pass through the model after another.
pub(crate) struct Forward<B> {
    /// Runs whole batches.
    first: PassRunner<B>,
    /// For the other threads that compute; none where one pass at a time has the backend's memory.
    others: Vec<PassRunner<B>>,
    /// Whether several passes can be under way.
    can_cut: bool,
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

impl<B: Backend> Forward<B> {
    /// `dispatch` makes one for each thread; `enforce_capacity` drops tokens beyond the model's `expert_capacity`, per
    /// sequence.
    pub(crate) fn new(
        backend: B,
        dispatch: impl Fn() -> Dispatch,
        enforce_capacity: bool,
        micro_batching: MicroBatching,
        statistics: Arc<Statistics>,
    ) -> Self {
        let measures = Arc::new(RouteMeasures::new(backend.config(), statistics.clone()));
        let can_cut = backend.another().is_some();
        let others: Vec<B> = (1..rayon::current_num_threads()).filter_map(|_| backend.another()).collect();
        let runner =
            |backend| PassRunner { backend, dispatch: dispatch(), enforce_capacity, measures: measures.clone() };
        let (first, others) = (runner(backend), others.into_iter().map(runner).collect());
        Self { first, others, can_cut, statistics, micro_batching, micro_batches: MicroBatches::default() }
    }

    /// What the model is.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.first.backend.config()
    }

    /// What computes the dense part of the model.
    pub(crate) fn backend(&mut self) -> &mut B {
        &mut self.first.backend
    }

    /// The same, of what changes nothing of a pass.
    pub(crate) fn backend_ref(&self) -> &B {
        &self.first.backend
    }

    /// Whether a device computes, on which one pass after another has the memory.
    pub(crate) fn is_on_device(&self) -> bool {
        !self.can_cut
    }

    /// As how many micro-batches a batch may go; 1: whole.
    pub(crate) fn parts(&self) -> usize {
        let cut = self.cut();
        self.parts_of(cut)
    }

    fn parts_of(&self, cut: Cut) -> usize {
        match cut {
            Cut::Not => 1,
            Cut::InTurns => TURNS,
            Cut::SideBySide => 1 + self.others.len(),
        }
    }

    /// Asked once for each pass: nodes come and go meanwhile.
    fn cut(&self) -> Cut {
        match (self.can_cut, self.first.dispatch.is_remote()) {
            (false, _) => Cut::Not,
            (true, true) => Cut::InTurns,
            (true, false) => Cut::SideBySide,
        }
    }

    /// What a stack makes of a batch: a row for each token. [`RequestError::Cancelled`]: nobody waits for it any more.
    pub(crate) fn pass(&mut self, batch: Batch<'_, B>, costs: &mut Costs) -> Result<B::States, RequestError> {
        let start = Instant::now();
        let requests = batch.requests;
        let rows = batch.spans.rows();
        let size = PassSize::new(batch.stack == Stack::Decoder, rows);
        let cut = self.cut();
        let parts = self.parts_of(cut).min(batch.spans.len());
        let way = match self.micro_batching {
            MicroBatching::AsMeasured if parts > 1 => self.micro_batches.way(size),
            MicroBatching::Always if parts > 1 => Way::Parts,
            _ => Way::Whole,
        };
        let states = match cut {
            // A device computes: no other thread takes part.
            Cut::Not => self.first.run(vec![batch], requests, costs),
            // As one of the threads that compute, so that between its products nobody must be woken.
            Cut::InTurns | Cut::SideBySide => rayon::scope(|_| match (way, cut) {
                (Way::Parts, Cut::SideBySide) => self.side_by_side(batch.cut(parts), requests, costs),
                (Way::Parts, _) => self.first.run(batch.cut(parts), requests, costs),
                (Way::Whole, _) => self.first.run(vec![batch], requests, costs),
            }),
        };
        let states = states.and_then(|parts| Ok(self.first.backend.join(parts)?));
        if let Err(RequestError::Model(error)) = &states
            && let ModelError::Device(DeviceError::Lost(_)) = &**error
        {
            self.statistics.is_device_lost.store(true, Ordering::Relaxed);
        }
        costs.finish_pass(start);
        if parts > 1 && states.is_ok() {
            self.micro_batches.note(size, way, rows, start.elapsed());
        }
        states
    }

    /// Compares the predictions for a pass with what its routers chose, and notes how they fared.
    pub(crate) fn note_predictions(&self, routings: &mut [SequenceRouting]) {
        self.first.measures.note_predictions(routings);
    }

    /// Each micro-batch by a thread, at the same time. There are not more of them than threads.
    fn side_by_side(
        &mut self,
        batches: Vec<Batch<'_, B>>,
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<Vec<B::States>, RequestError> {
        let passed = Mutex::new(Vec::with_capacity(batches.len()));
        let runners = std::iter::once(&mut self.first).chain(&mut self.others);
        let part = costs.of_part();
        let passes = runners.zip(batches).enumerate().collect();
        side_by_side::each(passes, |(at, (runner, batch)): (usize, (&mut PassRunner<B>, Batch<'_, B>))| {
            let mut costs = part;
            let states = runner.run(vec![batch], requests, &mut costs);
            passed.lock().push((at, states, costs));
        });
        let mut passed = passed.into_inner();
        passed.sort_by_key(|(at, ..)| *at);
        costs.add_parts(&passed.iter().map(|(.., costs)| *costs).collect::<Vec<_>>());
        let states = passed.into_iter().map(|(_, states, _)| states).collect::<Result<Vec<_>, _>>()?;
        Ok(states.into_iter().flatten().collect())
    }
}
