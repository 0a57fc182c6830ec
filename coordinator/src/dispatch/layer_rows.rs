//! One MoE layer's rows on their way through [`crate::dispatch`]: who needs them, where they are, and where the results go.

use sida_cluster::experts::{CallError, CallReport, LocalExperts};
use sida_model::{ModelError, MoeRows, ResultsWindow, RowsOnDevice};
use sida_routing::{Grouping, LayerId, dispatch::Call};
use sida_telemetry::TraceContext;

use crate::dispatch::callers::Callers;

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

/// The rows themselves, where they are.
pub(crate) enum Activations<'a> {
    /// In the host's memory: (tokens, d_model).
    Host(&'a [f32]),
    /// On a device; results are added to what they are to be added to there.
    Device(DeviceRows<'a>),
}

/// Rows on the coordinator's device. Experts on the same device compute them there, nodes of this machine read them there;
/// for all others they are fetched.
pub(crate) struct DeviceRows<'a> {
    rows: RowsOnDevice<'a>,
    /// Whether others can read them yet.
    is_settled: bool,
    fetched: Option<Vec<f32>>,
}

impl<'a> Activations<'a> {
    /// Of a pass, to be grouped so.
    pub(crate) fn new(rows: MoeRows<'a>, grouping: &Grouping) -> Result<Self, ModelError> {
        Ok(match rows {
            MoeRows::Host(x) => Self::Host(x),
            MoeRows::Device(mut rows) => {
                rows.group(grouping)?;
                Self::Device(DeviceRows { rows, is_settled: false, fetched: None })
            }
        })
    }

    /// Those on a device.
    pub(crate) fn device(&mut self) -> Option<&mut DeviceRows<'a>> {
        match self {
            Self::Host(_) => None,
            Self::Device(device) => Some(device),
        }
    }

    /// The rows, (tokens, d_model), in the host's memory.
    pub(crate) fn x(&mut self) -> Result<&[f32], ModelError> {
        match self {
            Self::Host(x) => Ok(x),
            Self::Device(DeviceRows { rows, fetched, .. }) => {
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
        match self {
            Self::Host(x) => {
                let mut out = vec![0.0; x.len()];
                if let Some(results) = results {
                    grouping.combine(0, results, d_model, &mut out);
                }
                Ok(Some(out))
            }
            Self::Device(DeviceRows { mut rows, .. }) => {
                if let Some(results) = results {
                    rows.put(results)?;
                }
                rows.add_computed()?;
                Ok(None)
            }
        }
    }
}

impl DeviceRows<'_> {
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
