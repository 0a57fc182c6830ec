//! Calls to nodes in this process: all of a round at the same time, on the threads that everything here computes on, so
//! that none of these waits while one node is through and another has not begun. Used by [`crate::dispatch`].

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts};
use sida_model::side_by_side;
use sida_rpc::Reason;

use crate::{
    call_failure::CallFailure,
    calls::{self, Call},
    dispatch::LayerRows,
    nodes::Roster,
};

/// Calls with less to do are made one after another: waking a thread costs more. Counted as `d_model`^2 per row, of
/// which experts have eight or so.
const TOGETHER_MIN: usize = 250_000;

/// The buffers of such calls, kept from round to round.
#[derive(Default)]
pub(crate) struct Here {
    rooms: Mutex<Vec<Room>>,
}

/// (rows of a call, d_model): what goes to a node, and what it makes of it.
#[derive(Default)]
struct Room {
    gathered: Vec<f32>,
    computed: Vec<f32>,
}

/// A call that was made.
pub(crate) struct Made {
    pub(crate) call: Call,
    pub(crate) outcome: Result<CallReport, CallFailure>,
    pub(crate) took: Duration,
    room: Room,
}

impl Here {
    /// Makes `calls`; what they computed goes to `results` (rows of the layer, d_model), in grouped order.
    pub(crate) fn make(
        &self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        d_model: usize,
        calls: Vec<(Arc<dyn LocalExperts>, Call)>,
        results: &mut [f32],
    ) -> Vec<Made> {
        let effort: usize = calls.iter().map(|(_, call)| call.rows() * d_model * d_model).sum();
        let made = Mutex::new(Vec::with_capacity(calls.len()));
        let make = |(experts, call): (Arc<dyn LocalExperts>, Call)| {
            let start = Instant::now();
            let _span = calls::span(roster, rows, &call);
            let mut room = self.rooms.lock().pop().unwrap_or_default();
            let outcome = room.compute(&*experts, rows, d_model, &call);
            made.lock().push(Made { call, outcome, took: start.elapsed(), room });
        };
        match effort < TOGETHER_MIN {
            true => calls.into_iter().for_each(make),
            false => side_by_side::each(calls, make),
        }
        let mut made = made.into_inner();
        for Made { call, room, outcome, .. } in &mut made {
            let mut from = &room.computed[..];
            for piece in call.pieces.iter().filter(|_| outcome.is_ok()) {
                let (rows, rest) = from.split_at(piece.rows * d_model);
                results[piece.first_row * d_model..][..rows.len()].copy_from_slice(rows);
                from = rest;
            }
            self.rooms.lock().push(std::mem::take(room));
        }
        made
    }
}

impl Room {
    fn compute(
        &mut self,
        experts: &dyn LocalExperts,
        rows: &LayerRows<'_>,
        d_model: usize,
        call: &Call,
    ) -> Result<CallReport, CallFailure> {
        calls::gather(rows.grouping, rows.x, d_model, &call.pieces, &mut self.gathered);
        self.computed.resize(self.gathered.len(), 0.0);
        let groups = call.groups();
        let expert_call = ExpertCall { layer: rows.layer, groups: &groups, activations: &self.gathered };
        // A node's bug must not take the coordinator down with it.
        let outcome = catch_unwind(AssertUnwindSafe(|| experts.compute(expert_call, &mut self.computed)));
        outcome
            .map_err(|_| CallFailure::Panicked)?
            .map_err(|error| CallFailure::Refused { reason: reason(&error), message: error.to_string() })
    }
}

/// Why a node in this process refused, in the words that one behind a lane would use.
fn reason(error: &CallError) -> Reason {
    match error {
        CallError::Malformed(_) => Reason::MalformedMessage,
        CallError::Load { .. } => Reason::ExpertLoadFailed,
        CallError::Device { .. } => Reason::DeviceFailed,
        CallError::ShuttingDown => Reason::ShuttingDown,
    }
}
