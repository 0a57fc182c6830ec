//! The wait for a node when none is left to ask for some of a layer's rows: until one comes back, at most for a limit,
//! and no longer than the callers wait.

use std::time::Duration;

use super::{Driver, Note};
use crate::{
    ExpertKey, NodeId,
    failover::{CallFailure, Patience},
};

/// Whether nodes that are away are waited for at all, as the layers before found it. Else every queued batch would wait
/// out the same outage, one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outlook {
    /// The begin of the last wait that was in vain.
    waited: Option<Duration>,
    /// The last answer.
    answered: Option<Duration>,
}

/// How long one layer has waited, and whether it may wait on.
#[derive(Debug)]
pub(super) struct NodeWait {
    pub(super) patience: Patience,
    outlook: Outlook,
    /// When the layer began to wait.
    since: Option<Duration>,
}

impl Outlook {
    /// Adds what another layer found.
    pub fn learn(&mut self, other: Self) {
        self.waited = self.waited.max(other.waited);
        self.answered = self.answered.max(other.answered);
    }

    /// Whether no node has answered since a wait began that was in vain.
    fn is_bleak(&self) -> bool {
        self.waited > self.answered
    }
}

impl NodeWait {
    /// For a layer that begins. It may wait for `limit`, but not at all if that is bleak.
    pub(super) fn new(limit: Duration, outlook: Outlook, now: Duration) -> Self {
        Self { patience: Patience::new(limit, now), outlook, since: None }
    }

    /// Notes that a node has answered, so that waiting is worth while again.
    pub(super) fn answered(&mut self, now: Duration) {
        self.outlook.answered = Some(now);
    }

    /// What the layers after this one are to know.
    pub(super) fn outlook(&self) -> Outlook {
        self.outlook
    }

    /// Whether it is no use to wait for anyone to come back and compute an expert, since these were `tried`.
    pub(super) fn is_in_vain(
        &mut self,
        driver: &mut impl Driver,
        key: ExpertKey,
        tried: &[(NodeId, CallFailure)],
        now: Duration,
    ) -> bool {
        let placement = driver.placement();
        let may_be_back =
            |(node, failure): &(NodeId, CallFailure)| failure.may_pass() && placement.node_index(node).is_some();
        if !tried.iter().any(may_be_back) || self.outlook.is_bleak() {
            return true;
        }
        let is_over = self.patience.is_over();
        if self.since.is_none() && !is_over {
            driver.note(Note::Waits(key));
        }
        let since = *self.since.get_or_insert(now);
        if is_over {
            self.outlook.waited = Some(since);
        }
        is_over
    }
}
