//! The wait for a node when none is left to ask for some of a layer's rows: until one comes back, at most for a limit,
//! and no longer than the callers wait.

use std::{
    thread,
    time::{Duration, Instant},
};

use sida_routing::{
    ExpertKey, NodeId,
    failover::{Patience, patience::LOOK},
};

use crate::{
    answer::request_error::RequestError,
    dispatch::{
        calls::{self, Piece},
        nodes::Roster,
        remote::call_failure::CallFailure,
    },
};

/// How long one layer has waited, and whether it may wait on.
pub(crate) struct NodeWait {
    patience: Patience,
    /// The moment from which `patience` counts time.
    origin: Instant,
    /// An earlier layer waited in vain for any node to come back, and none has answered since.
    is_given_up: bool,
    /// Whether this wait was logged.
    is_told: bool,
}

impl NodeWait {
    /// For a layer that begins. It may wait for `limit`, or not at all if the layer before has waited in vain
    /// (`is_given_up`): else every queued batch would wait as long, one after the other.
    pub(crate) fn new(limit: Duration, is_given_up: bool) -> Self {
        let patience = Patience::new(limit, Duration::ZERO);
        Self { patience, origin: Instant::now(), is_given_up, is_told: false }
    }

    /// Notes that a node has answered, so that waiting is worth while again.
    pub(crate) fn answered(&mut self) {
        self.is_given_up = false;
    }

    /// Whether the next layer need not wait, because this one has waited in vain.
    pub(crate) fn is_given_up(&self) -> bool {
        self.is_given_up
    }

    /// Notes that a wait that was to end at `until` ended at `now`.
    pub(crate) fn passed(&mut self, until: Instant, now: Instant) {
        self.patience.passed(self.since(until), self.since(now));
    }

    /// Whether the wait has lasted for as long as it may.
    pub(crate) fn is_over(&self) -> bool {
        self.patience.is_over()
    }

    /// Whether nodes that failed and are back may be asked again.
    pub(crate) fn may_ask_again(&self, now: Instant) -> bool {
        self.patience.may_ask_again(self.since(now))
    }

    /// Notes that nodes which failed and are back were asked again.
    pub(crate) fn asked_again(&mut self, now: Instant) {
        self.patience.asked_again(self.since(now));
    }

    /// Sleeps until it is worth looking again which nodes are back.
    pub(crate) fn pause(&mut self) {
        let until = Instant::now() + LOOK;
        thread::sleep(LOOK);
        self.passed(until, Instant::now());
    }

    /// The error that ends a piece for which no node can be asked now; `None` if the piece waits.
    pub(crate) fn verdict(&mut self, roster: &Roster, key: ExpertKey, piece: &Piece) -> Option<RequestError> {
        let may_be_back =
            |(node, failure): &(NodeId, CallFailure)| failure.may_pass() && roster.position(node).is_some();
        let is_in_vain = !piece.tried.iter().any(may_be_back);
        self.is_given_up |= !is_in_vain && self.is_over();
        if is_in_vain || self.is_given_up {
            return Some(RequestError::ExpertUnavailable { key, tried: calls::reasons(&piece.tried) });
        }
        if !std::mem::replace(&mut self.is_told, true) {
            tracing::warn!(%key, "every expert-node failed; waiting for one to come back");
        }
        None
    }

    fn since(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.origin)
    }
}
