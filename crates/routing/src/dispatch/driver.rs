//! What the decisions on a layer's calls stand on, and whom they tell.

use std::{ops::Range, time::Duration};

use super::Call;
use crate::{ExpertKey, Placement, failover::CallFailure};

/// Whoever drives [`LayerCalls`](super::LayerCalls), with the nodes as they were when the calls under way were assigned.
/// A node is an index into the nodes of the placement.
pub trait Driver {
    /// Who holds what.
    fn placement(&self) -> &Placement;

    /// Whether a newer placement is known by now.
    fn has_newer_placement(&self) -> bool;

    /// Whether a call would reach the node, as far as is known.
    fn is_up(&self, node: usize, now: Duration) -> bool;

    /// Until when a call that was sent to the node waits for a sign of life.
    fn silent_until(&self, node: usize, sent: Duration) -> Duration;

    /// Whether a caller still waits for any of the grouped rows.
    fn is_wanted(&self, rows: &Range<usize>, now: Duration) -> bool;

    /// A call is made for the first time: it fills the retry budget.
    fn note_call(&mut self, now: Duration);

    /// Takes a retry from the budget, if there is one.
    fn take_retry(&mut self, now: Duration) -> bool;

    /// A call that was sent is given up; unless nobody wants it any more, that speaks against its node.
    fn give_up(&mut self, call_id: u64, node: usize, is_wanted: bool, now: Duration);

    /// A call was, or was not, on its way much longer than those of the same round to other nodes.
    fn note_pace(&mut self, node: usize, straggled: bool, now: Duration);

    /// Something happened that whoever watches should know.
    fn note(&mut self, note: Note<'_>);
}

/// What happens on the way, for logs, metrics and the like.
#[derive(Debug)]
pub enum Note<'a> {
    /// A call failed. Its pieces are shared out again under a newer placement, or asked of somebody else.
    Failed {
        /// The call.
        call: &'a Call,
        /// Why it failed.
        failure: &'a CallFailure,
        /// Whether a newer placement is why.
        is_reshared: bool,
    },
    /// Rows whose call failed like this are asked for again.
    AskedAgain(&'a CallFailure),
    /// The retry budget has nothing left for rows; they wait for it.
    RetryRefused,
    /// All nodes failed, and the layer waits for one to come back: for the first time on account of this expert.
    Waits(ExpertKey),
}
