//! What a layer does when nobody is left to ask for some of its rows: it waits until somebody is back, for as long as
//! those who wait for the rows do, and at most for a limit. Kept by [`crate::dispatch`] for each layer.

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

/// See the file's head.
pub(crate) struct NodeWait {
    patience: Patience,
    /// The patience counts time from here.
    origin: Instant,
    /// The layer before waited in vain for any node to come back, and none has answered since.
    is_given_up: bool,
    /// Whether the log knows of it.
    is_told: bool,
}

impl NodeWait {
    /// A layer begins, which may wait for `limit`; or not at all if the one before has done so in vain (`is_given_up`),
    /// lest those who are queued wait as long, one batch after the other.
    pub(crate) fn new(limit: Duration, is_given_up: bool) -> Self {
        let patience = Patience::new(limit, Duration::ZERO);
        Self { patience, origin: Instant::now(), is_given_up, is_told: false }
    }

    /// A node has answered: it is worth waiting again.
    pub(crate) fn answered(&mut self) {
        self.is_given_up = false;
    }

    /// What the next layer has to know.
    pub(crate) fn is_given_up(&self) -> bool {
        self.is_given_up
    }

    /// A wait that was to end at `until` ended at `now`.
    pub(crate) fn passed(&mut self, until: Instant, now: Instant) {
        self.patience.passed(self.since(until), self.since(now));
    }

    /// Whether it has lasted for as long as it may.
    pub(crate) fn is_over(&self) -> bool {
        self.patience.is_over()
    }

    /// Whether those who failed and are back may be asked again.
    pub(crate) fn may_ask_again(&self, now: Instant) -> bool {
        self.patience.may_ask_again(self.since(now))
    }

    /// They are.
    pub(crate) fn asked_again(&mut self, now: Instant) {
        self.patience.asked_again(self.since(now));
    }

    /// Until it is worth looking again who is back.
    pub(crate) fn pause(&mut self) {
        let until = Instant::now() + LOOK;
        thread::sleep(LOOK);
        self.passed(until, Instant::now());
    }

    /// What becomes of a piece that nobody can be asked for now: the error that it ends with, or `None`: it waits.
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
