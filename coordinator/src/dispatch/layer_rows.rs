//! One MoE layer's rows on their way through [`crate::dispatch`]: who needs them, where they are, and where the results go.

use std::time::Instant;

use sida_cluster::experts::{CallError, CallReport, LocalExperts};
use sida_model::{ModelError, ResultsWindow, RowsOnDevice};
use sida_routing::{Grouping, LayerId};
use sida_telemetry::TraceContext;

use crate::dispatch::{callers::Callers, calls::Call};

/// What is the same wherever they are.
pub(crate) struct LayerRows<'a> {
    /// Which of the MoE layers.
    pub(crate) layer: LayerId,
    /// Which row goes to which expert.
    pub(crate) grouping: &'a Grouping,
    /// Who waits for them.
    pub(crate) callers: Callers<'a>,
    /// Of the layer's span: calls go below it.
    pub(crate) trace: Option<TraceContext>,
}

/// Where they are.
pub(crate) enum Place<'a> {
    /// In this machine's memory: (tokens, d_model).
    Here(&'a [f32]),
    /// On a device; results are added to what they are to be added to there.
    OnDevice(OnDevice<'a>),
}

/// Rows on the coordinator's device. Experts on the same device compute them there, nodes of this machine read them there;
/// for all others they are fetched.
pub(crate) struct OnDevice<'a> {
    rows: RowsOnDevice<'a>,
    /// Whether others can read them yet.
    is_settled: bool,
    fetched: Option<Vec<f32>>,
}

impl LayerRows<'_> {
    /// Whether nobody waits for any row of a call any more.
    pub(crate) fn is_for_nobody(&self, call: &Call, now: Instant) -> bool {
        call.pieces.iter().all(|piece| self.callers.gone(&self.grouping.tokens[piece.range()], now).is_some())
    }
}

impl<'a> Place<'a> {
    /// Rows on a device that are to be grouped so.
    pub(crate) fn on_device(mut rows: RowsOnDevice<'a>, grouping: &Grouping) -> Result<Self, ModelError> {
        rows.group(grouping)?;
        Ok(Self::OnDevice(OnDevice { rows, is_settled: false, fetched: None }))
    }

    /// Where the rows are on a device.
    pub(crate) fn device(&mut self) -> Option<&mut OnDevice<'a>> {
        match self {
            Self::Here(_) => None,
            Self::OnDevice(device) => Some(device),
        }
    }

    /// The rows, (tokens, d_model), in this machine's memory.
    pub(crate) fn x(&mut self) -> Result<&[f32], ModelError> {
        match self {
            Self::Here(x) => Ok(x),
            Self::OnDevice(OnDevice { rows, fetched, .. }) => {
                if fetched.is_none() {
                    *fetched = Some(rows.fetch()?);
                }
                Ok(fetched.as_deref().expect("fetched above"))
            }
        }
    }

    /// Adds up everything: `weight * expert(x)` of every token, (tokens, d_model), or `None` where that was added on the
    /// device. `results`, (places, d_model), are those that came to this machine's memory, if any did.
    pub(crate) fn combine(
        self,
        grouping: &Grouping,
        results: Option<&[f32]>,
        d_model: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let combined = |x: &[f32], results| {
            let mut out = vec![0.0; x.len()];
            grouping.combine(0, results, d_model, &mut out);
            out
        };
        match (self, results) {
            (Self::Here(x), Some(results)) => Ok(Some(combined(x, results))),
            (Self::Here(x), None) => Ok(Some(vec![0.0; x.len()])),
            (Self::OnDevice(OnDevice { mut rows, fetched, .. }), results) => {
                rows.add_computed()?;
                if let Some(results) = results {
                    let x = fetched.expect("results came to this memory, so rows went from it");
                    rows.add(&combined(&x, results))?;
                }
                Ok(None)
            }
        }
    }
}

impl OnDevice<'_> {
    /// Has a node of this process start a call, if its experts are on the same device. `None`: they are not.
    pub(crate) fn compute(
        &mut self,
        experts: &dyn LocalExperts,
        layer: LayerId,
        call: &Call,
    ) -> Option<Result<CallReport, CallError>> {
        experts.compute_beside(layer, &call.placed_groups(), &self.rows)
    }

    /// Nothing that was computed of a call counts: it failed, and is computed again elsewhere.
    pub(crate) fn forget(&mut self, call: &Call) -> Result<(), ModelError> {
        self.rows.forget(&call.places())
    }

    /// Lets nodes of this machine read the rows from now on.
    pub(crate) fn settle(&mut self) -> Result<(), ModelError> {
        if !self.is_settled {
            self.rows.settle()?;
            self.is_settled = true;
        }
        Ok(())
    }

    /// Takes over what a node of this machine made of a call.
    pub(crate) fn take(&mut self, from: &ResultsWindow, call: &Call) -> Result<(), ModelError> {
        self.rows.take(from, &call.places())
    }
}
