//! An expert call as it goes down a lane, and its answer as it comes back.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use sida_cluster::experts::{CallReport, ExpertCall};
use sida_model::ResultsWindow;
use sida_proto::{v1, wire};
use sida_routing::{
    LayerId, PlacedGroup,
    failover::{Blame, CallFailure},
};
use sida_rpc::Reason;

/// The rows of a call that is to be made.
pub(crate) enum Outgoing<'a> {
    /// The rows travel in the message.
    Rows(ExpertCall<'a>),
    /// The rows lie in this coordinator's window, and the message says where.
    InWindow(LayerId, &'a [PlacedGroup]),
}

/// The results of a call.
pub(crate) enum Results {
    /// (rows, d_model) as a payload of exactly that length.
    Payload(Bytes),
    /// In the node's window, at the places of the call.
    InWindow(Arc<ResultsWindow>),
}

/// Rows that an expert-node computed.
pub(crate) struct Computed {
    /// The rows, or where they are.
    pub(crate) results: Results,
    /// What the call cost on the node.
    pub(crate) report: CallReport,
    /// Whether plans let the node compute sooner.
    pub(crate) gains_by_plans: bool,
    /// How long the call took, seen from the coordinator.
    pub(crate) took: Duration,
}

/// The answer to a call.
pub(crate) struct Reply {
    /// The id that [`crate::dispatch::remote::lane::Lane::start`] returned.
    pub(crate) call_id: u64,
    /// The rows, or why there are none.
    pub(crate) outcome: Result<Computed, CallFailure>,
    /// An encoded `sida.v1.PlacementRecord`, if it is newer than the call's and that is why.
    pub(crate) newer_placement: Bytes,
}

impl Outgoing<'_> {
    /// The message that is sent, and how many rows the call has. Rows that travel are `d_model` wide.
    pub(crate) fn message(&self, call_id: u64, d_model: usize) -> (v1::Activations, usize) {
        match *self {
            Self::Rows(ExpertCall { layer, groups, activations }) => {
                (v1::Activations::new(call_id, layer, groups, activations), activations.len() / d_model)
            }
            Self::InWindow(layer, groups) => {
                let rows = groups.iter().map(|group| group.rows as usize).sum();
                (v1::Activations::in_window(call_id, layer, groups), rows)
            }
        }
    }
}

impl Results {
    /// How many bytes of results travelled.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Payload(payload) => payload.len(),
            Self::InWindow(_) => 0,
        }
    }
}

impl Reply {
    /// The answer to a call of so many rows, checked against it. With a window they must not have travelled.
    pub(crate) fn of(
        results: v1::Results,
        window: Option<&Arc<ResultsWindow>>,
        (rows, d_model): (usize, usize),
        took: Duration,
    ) -> Self {
        let call_id = results.call_id;
        let rows_sent = if window.is_some() { 0 } else { rows };
        let (outcome, newer_placement) = match results.check(rows_sent, d_model) {
            Ok(wire::Answer::Done { payload, report }) => {
                let gains_by_plans = !report.gains_nothing_by_plans;
                let report = CallReport {
                    hits: report.hits,
                    demand_loads: report.demand_loads,
                    load: Duration::from_micros(report.load_us),
                    compute: Duration::from_micros(report.compute_us),
                };
                let results = window.cloned().map_or(Results::Payload(payload), Results::InWindow);
                (Ok(Computed { results, report, took, gains_by_plans }), Bytes::new())
            }
            Ok(wire::Answer::Failed(v1::CallError { reason, message, newer_placement, .. })) => {
                (Err(refused(Reason::from_name(&reason), message)), newer_placement)
            }
            Err(error) => (Err(CallFailure::Malformed { reason: error.to_string() }), Bytes::new()),
        };
        Self { call_id, outcome, newer_placement }
    }
}

/// The failure that a node's refusal stands for.
fn refused(reason: Option<Reason>, message: String) -> CallFailure {
    let blame = match reason {
        Some(Reason::StaleEpoch) => return CallFailure::Stale,
        Some(Reason::ExpertLoadFailed | Reason::Internal) | None => Blame::Expert,
        Some(Reason::ShuttingDown | Reason::DeviceFailed) => Blame::Node,
        Some(_) => Blame::Call,
    };
    CallFailure::Refused { blame, message }
}
