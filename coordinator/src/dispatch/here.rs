//! Calls to nodes in this process: all of a round at the same time, on the threads that everything here computes on, so
//! that none of these waits while one node is through and another has not begun. Used by [`crate::dispatch`].

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts};
use sida_model::{ModelError, side_by_side};
use sida_routing::{
    dispatch::Call,
    failover::{Blame, CallFailure},
};

use crate::dispatch::{
    calls,
    layer_rows::{Activations, LayerRows},
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

/// What a call cost, or why it failed, and how long that took.
type Outcome = (Result<CallReport, CallFailure>, Duration);

impl Here {
    /// Makes `calls` with rows of `x` (tokens, d_model); what they computed goes to `results` (rows of the layer, d_model), in
    /// grouped order.
    pub(crate) fn make(
        &self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        x: &[f32],
        d_model: usize,
        calls: Vec<(&Arc<dyn LocalExperts>, Call)>,
        results: &mut [f32],
    ) -> Vec<Made> {
        let effort: usize = calls.iter().map(|(_, call)| call.rows() * d_model * d_model).sum();
        let made = Mutex::new(Vec::with_capacity(calls.len()));
        let make = |(experts, call): (&Arc<dyn LocalExperts>, Call)| {
            let start = Instant::now();
            let _span = calls::span(roster, rows, &call);
            let mut room = self.rooms.lock().pop().unwrap_or_default();
            let outcome = room.compute(&**experts, rows, x, d_model, &call);
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
        x: &[f32],
        d_model: usize,
        call: &Call,
    ) -> Result<CallReport, CallFailure> {
        calls::gather(rows.grouping, x, d_model, &call.pieces, &mut self.gathered);
        self.computed.resize(self.gathered.len(), 0.0);
        let groups = call.groups();
        let expert_call = ExpertCall { layer: rows.layer, groups: &groups, activations: &self.gathered };
        // A node's bug must not take the coordinator down with it.
        let outcome = catch_unwind(AssertUnwindSafe(|| experts.compute(expert_call, &mut self.computed)));
        outcome.map_err(|_| CallFailure::Panicked)?.map_err(|error| refused(&error))
    }
}

/// Has a node in this process start a call on the device that the rows are on, if its experts are there, too. Returns what
/// it cost and how long that took; `None`: the rows are not on its device.
pub(crate) fn start_on_device(
    roster: &Roster,
    rows: &LayerRows<'_>,
    activations: &mut Activations<'_>,
    experts: &dyn LocalExperts,
    call: &Call,
) -> Result<Option<Outcome>, ModelError> {
    let Some(device) = activations.device() else { return Ok(None) };
    let start = Instant::now();
    let _span = calls::span(roster, rows, call);
    // As above.
    let started = catch_unwind(AssertUnwindSafe(|| device.compute(experts, rows.layer, call)));
    let outcome = match started {
        Ok(None) => return Ok(None),
        Ok(Some(outcome)) => outcome.map_err(|error| refused(&error)),
        Err(_) => Err(CallFailure::Panicked),
    };
    if outcome.is_err() {
        device.forget(call)?;
    }
    Ok(Some((outcome, start.elapsed())))
}

/// Why a node in this process refused.
fn refused(error: &CallError) -> CallFailure {
    let blame = match error {
        CallError::Malformed(_) => Blame::Call,
        CallError::Load { .. } => Blame::Expert,
        CallError::Device { .. } | CallError::ShuttingDown => Blame::Node,
    };
    CallFailure::Refused { blame, message: error.to_string() }
}
