//! The model, layer by layer: everything dense here, every MoE layer through `dispatch`. The encoder runs over
//! whole prompts, the decoder over the new tokens of each sequence. Used by `forward`.
//!
//! A walker may have several micro-batches, which take turns: one is computed here, up to its next MoE layer, while the rows
//! of the others are at the experts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sida_model::{Dense, ModelError, States, Walk, router};
use sida_routing::{Grouping, LayerId};
use sida_telemetry::Span;

use crate::{
    answer::trace::HashCounts,
    dispatch::{
        dispatch::{Dispatch, Dispatched, UnderWay},
        layer_rows::Place,
    },
    forward::{batch::Batch, costs::Costs, expert_choice, route_measures::RouteMeasures},
};

/// What one thread walks through the model with.
pub(crate) struct Walker {
    pub(crate) dense: Dense,
    pub(crate) dispatch: Dispatch,
    /// Drops tokens beyond the model's `expert_capacity`, per sequence.
    pub(crate) enforce_capacity: bool,
    pub(crate) measures: Arc<RouteMeasures>,
}

/// A batch, or a micro-batch, on its way through a stack.
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

impl Walker {
    /// Walks through a stack with micro-batches, in turns; what is left of each.
    pub(crate) fn walk(&mut self, batches: Vec<Batch<'_, '_>>, costs: &mut Costs) -> Result<Vec<States>, ModelError> {
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
        walking.into_iter().map(finish).collect()
    }

    /// `h += sum over its experts of weight * expert(x)`, row by row: x leaves for the experts.
    fn begin_moe(&mut self, one: &mut Walking<'_, '_>, layer: LayerId, costs: &mut Costs) -> Result<(), ModelError> {
        let Walking { batch, walk, gate } = one;
        let before: Vec<HashCounts> = batch.routings.iter().map(|part| part.hash).collect();
        let mut routes = expert_choice::routes(&self.dense, walk, layer, &batch.spans, batch.routings)?;
        if self.enforce_capacity {
            router::enforce_capacity(&mut routes, &batch.spans, self.dense.config().expert_capacity);
        }
        self.measures.note(layer, &routes, &batch.spans, batch.routings, &before);

        let start = Instant::now();
        costs.dense_until(start);
        let grouping = Grouping::new(&routes);
        self.measures.note_rows(layer, &grouping);
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
                    batch.routings[part].failure.get_or_insert_with(|| error.clone());
                }
            }
        }
        drop(span);
        costs.add(&dispatched, took + start.elapsed());
        self.measures.note_failovers(dispatched.failovers);
        Ok(())
    }
}
