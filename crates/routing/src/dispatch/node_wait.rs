//! The wait for a node when none is left to ask for some of a layer's rows: until one comes back, at most for a limit,
//! and no longer than the callers wait.

use std::time::Duration;

use super::{Driver, Note};
use crate::{
    ExpertKey, NodeId,
    failover::{CallFailure, Patience},
};

/// How long one layer has waited, and whether it may wait on.
#[derive(Debug)]
pub(super) struct NodeWait {
    patience: Patience,
    /// An earlier layer waited in vain for any node to come back, and none has answered since.
    is_given_up: bool,
    /// Whether this wait was noted.
    is_told: bool,
}

impl NodeWait {
    /// For a layer that begins. It may wait for `limit`, or not at all if the layer before has waited in vain
    /// (`is_given_up`).
    pub(super) fn new(limit: Duration, is_given_up: bool, now: Duration) -> Self {
        Self { patience: Patience::new(limit, now), is_given_up, is_told: false }
    }

    /// Notes that a node has answered, so that waiting is worth while again.
    pub(super) fn answered(&mut self) {
        self.is_given_up = false;
    }

    /// Whether the next layer need not wait, because this one has waited in vain.
    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up
    }

    /// Notes that a wait that was to end at `until` ended at `now`.
    pub(super) fn passed(&mut self, until: Duration, now: Duration) {
        self.patience.passed(until, now);
    }

    /// Whether the wait has lasted for as long as it may.
    pub(super) fn is_over(&self) -> bool {
        self.patience.is_over()
    }

    /// Whether nodes that failed and are back may be asked again.
    pub(super) fn may_ask_again(&self, now: Duration) -> bool {
        self.patience.may_ask_again(now)
    }

    /// Notes that nodes which failed and are back were asked again.
    pub(super) fn asked_again(&mut self, now: Duration) {
        self.patience.asked_again(now);
    }

    /// Whether it is no use to wait for anyone to come back and compute an expert, since these were `tried`.
    pub(super) fn is_in_vain(
        &mut self,
        driver: &mut impl Driver,
        key: ExpertKey,
        tried: &[(NodeId, CallFailure)],
    ) -> bool {
        let placement = driver.placement();
        let may_be_back = |(node, failure): &(NodeId, CallFailure)| {
            failure.may_pass() && placement.node_index(node).is_some()
        };
        if !tried.iter().any(may_be_back) {
            return true;
        }
        self.is_given_up |= self.is_over();
        if !self.is_given_up && !std::mem::replace(&mut self.is_told, true) {
            driver.note(Note::Waits(key));
        }
        self.is_given_up
    }
}
