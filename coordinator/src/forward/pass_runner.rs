//! The model, layer by layer: everything dense by the backend, every MoE layer through `dispatch`. The encoder runs over
//! whole prompts, the decoder over the new tokens of each sequence. Used by `forward`.
//!
//! There may be several micro-batches, which take turns: one is computed by the backend, up to its next MoE layer, while the
//! rows of the others are at the experts.
//!
//! Between two layers, and on the processor within long ones, it is looked whether anybody still waits. A pass that is for
//! nobody is given up there, so that a long one does not keep the model from those who come after it. One that is for
//! somebody goes on with all of its rows.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sida_model::{Backend, Beside, ModelError, Passed, ResidentExperts, StillWanted, router};
use sida_routing::{Grouping, LayerId, Routes};
use sida_telemetry::Span;

use crate::{
    answer::request_error::RequestError,
    dispatch::{
        dispatch::{Dispatch, Dispatched, UnderWay},
        layer_rows::Activations,
    },
    forward::{
        batch::Batch,
        costs::Costs,
        expert_choice::{self, MoeLayerRows, SequenceRouting},
        route_measures::RouteMeasures,
    },
    intake::request::Request,
};

/// What one thread runs passes with.
pub(crate) struct PassRunner<B> {
    pub(crate) backend: B,
    pub(crate) dispatch: Dispatch,
    /// Drops tokens beyond the model's `expert_capacity`, per sequence.
    pub(crate) enforce_capacity: bool,
    pub(crate) measures: Arc<RouteMeasures>,
}

/// A batch, or a micro-batch, on its way through a stack.
struct Running<'b, B: Backend> {
    batch: Batch<'b, B>,
    pass: B::Pass<'b>,
    /// Where its rows are at the experts.
    moe: Option<MoeLayer>,
}

/// An MoE layer whose rows left.
struct MoeLayer {
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
    /// On a device, which has one pass at a time.
    Done(Dispatched),
}

impl<B: Backend> PassRunner<B> {
    /// Runs through a stack with micro-batches, in turns; what each pass left. `requests` are those that wait for the batch
    /// that these are of, also where other threads have a part of it.
    pub(crate) fn run(
        &mut self,
        batches: Vec<Batch<'_, B>>,
        requests: &[&Request],
        costs: &mut Costs,
    ) -> Result<Vec<B::States>, RequestError> {
        let is_wanted = || !is_for_nobody(requests);
        let still_wanted = StillWanted::while_true(&is_wanted);
        let mut running = Vec::with_capacity(batches.len());
        for mut batch in batches {
            let sequences = std::mem::take(&mut batch.sequences);
            let beside = Beside { wanted: batch.wanted, still_wanted, experts: self.experts_beside(&batch) };
            let pass = self.backend.begin(batch.stack, batch.ids, &batch.spans, sequences, beside)?;
            running.push(Running { batch, pass, moe: None });
        }
        let mut is_running = true;
        while is_running {
            is_running = false;
            for at in 0..running.len() {
                self.finish_moe(&mut running[at], costs)?;
                let one = &mut running[at];
                let advanced = match still_wanted.check() {
                    Ok(()) => self.backend.advance(&mut one.pass),
                    Err(given_up) => Err(given_up.into()),
                };
                if let Err(ModelError::GivenUp(_)) = advanced {
                    // Nothing of a pass is at the experts any more when it is dropped.
                    running.iter_mut().try_for_each(|one| self.finish_moe(one, costs))?;
                    return Err(RequestError::Cancelled);
                }
                match advanced? {
                    Some(layer) => {
                        self.begin_moe(one, layer, costs)?;
                        is_running = true;
                    }
                    None => costs.dense_until(Instant::now()),
                }
            }
        }
        running.into_iter().map(|one| Ok(self.finish(one)?)).collect()
    }

    /// Experts on the device of the pass: with them it goes through MoE layers by itself, if the router decides freely
    /// over all rows and no token is dropped.
    fn experts_beside(&mut self, batch: &Batch<'_, B>) -> Option<Arc<dyn ResidentExperts>> {
        let is_routed = !self.enforce_capacity && batch.routings.iter().all(SequenceRouting::is_routed);
        self.backend.device().filter(|_| is_routed).and_then(|device| self.dispatch.resident_beside(&device))
    }

    /// `h += sum over its experts of weight * expert(x)`, row by row: x leaves for the experts.
    fn begin_moe(&mut self, one: &mut Running<'_, B>, layer: LayerId, costs: &mut Costs) -> Result<(), ModelError> {
        let Running { batch, pass, moe } = one;
        let at = MoeLayerRows { stack: batch.stack, layer, spans: &batch.spans };
        let mut routes = expert_choice::routes(&mut self.backend, pass, at, batch.routings)?;
        if self.enforce_capacity {
            router::enforce_capacity(&mut routes, &batch.spans, self.backend.config().expert_capacity);
        }
        self.measures.note_experts(layer, &routes, &batch.spans, batch.routings);

        let start = Instant::now();
        costs.dense_until(start);
        let grouping = Grouping::new(&routes);
        self.measures.note_rows(layer, &grouping.groups);
        let span = costs.trace.map(|(pass, _)| Span::below(pass, "dispatch").with("sida.layer", i64::from(layer.0)));
        let rows = batch.layer_rows(layer, &grouping, span.as_ref());
        let experts = match Activations::new(self.backend.rows(pass), &grouping)? {
            on_device @ Activations::Device(_) => Experts::Done(self.dispatch.moe(&rows, on_device)?),
            mut in_host => Experts::UnderWay(Box::new(self.dispatch.begin(&rows, &mut in_host)?)),
        };
        *moe = Some(MoeLayer { layer, grouping, span, experts, took: start.elapsed() });
        costs.dense_from(Instant::now());
        Ok(())
    }

    /// Takes what became of x, if it is under way, and adds it to h.
    fn finish_moe(&mut self, one: &mut Running<'_, B>, costs: &mut Costs) -> Result<(), ModelError> {
        let Running { batch, pass, moe } = one;
        let Some(MoeLayer { layer, grouping, span, experts, took }) = moe.take() else { return Ok(()) };
        let start = Instant::now();
        let rows = batch.layer_rows(layer, &grouping, span.as_ref());
        let mut dispatched = match experts {
            Experts::Done(dispatched) => dispatched,
            Experts::UnderWay(under_way) => {
                let activations = Activations::new(self.backend.rows(pass), &grouping)?;
                self.dispatch.finish(*under_way, &rows, activations)?
            }
        };
        if let Some(out) = dispatched.out.take() {
            self.backend.add(pass, &out)?;
        }
        for (rows, error) in &dispatched.failed {
            for &token in &grouping.tokens[rows.clone()] {
                if let Some(sequence) = batch.spans.holder(token as usize) {
                    batch.routings[sequence].failure.get_or_insert_with(|| error.clone());
                }
            }
        }
        drop(span);
        costs.add(&dispatched, took + start.elapsed());
        self.measures.note_failovers(dispatched.failovers);
        Ok(())
    }

    /// Ends a pass, and notes what its routers chose where rows did not leave.
    fn finish(&mut self, Running { batch, pass, .. }: Running<'_, B>) -> Result<B::States, ModelError> {
        let Passed { states, layers } = self.backend.finish(pass)?;
        for passed in layers {
            let (layer, groups) = (passed.layer, passed.groups());
            let weights = vec![1.0; passed.experts.len()]; // Nobody asks for them any more.
            let experts = passed.experts.into_iter().map(Some).collect();
            let routes = Routes { top_k: self.backend.config().top_k, experts, weights };
            expert_choice::note_choice(layer, &routes, &batch.spans, batch.routings);
            self.measures.note_experts(layer, &routes, &batch.spans, batch.routings);
            self.measures.note_rows(layer, &groups);
        }
        Ok(states)
    }
}

/// Whether there were requests, and none of them is worth an answer any more. Once that is so it stays so, so that all who
/// compute parts of a batch come to the same end.
fn is_for_nobody(requests: &[&Request]) -> bool {
    let now = Instant::now();
    !requests.is_empty() && requests.iter().all(|request| request.over(now).is_some())
}
