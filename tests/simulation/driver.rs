//! What the decisions on a layer's calls stand on here, and what they bring about.

use std::{ops::Range, rc::Rc, time::Duration};

use sida_routing::{
    Placement,
    dispatch::{Driver, Note},
};

use crate::{
    coordinator::{Coordinator, Roster},
    core::Core,
    requests::{Course, PATIENCE},
};

/// Drives the calls of a request's layer.
pub(crate) struct LayerDriver<'a> {
    pub(crate) core: &'a mut Core,
    pub(crate) coordinator: &'a mut Coordinator,
    /// The nodes as they were when the calls of this round were assigned.
    pub(crate) roster: Rc<Roster>,
    pub(crate) course: &'a mut Course,
}

impl Driver for LayerDriver<'_> {
    fn placement(&self) -> &Placement {
        &self.roster.placement
    }

    fn has_newer_placement(&self) -> bool {
        self.coordinator.placement().is_some_and(|newest| newest.epoch() > self.roster.placement.epoch())
    }

    fn is_up(&self, node: usize, now: Duration) -> bool {
        self.coordinator.lanes[self.roster.nodes[node]].is_up(now)
    }

    fn silent_until(&self, node: usize, sent: Duration) -> Duration {
        self.coordinator.lanes[self.roster.nodes[node]].silent_until(sent)
    }

    fn is_wanted(&self, _: &Range<usize>, now: Duration) -> bool {
        self.course.leaves.is_none_or(|leaves| now < Duration::from_micros(leaves))
    }

    fn note_call(&mut self, now: Duration) {
        self.coordinator.first_calls += 1;
        self.coordinator.budget.call(now);
    }

    fn take_retry(&mut self, now: Duration) -> bool {
        self.coordinator.budget.take_retry(now)
    }

    fn give_up(&mut self, call_id: u64, node: usize, is_wanted: bool, now: Duration) {
        let sent = self.coordinator.sent.remove(&call_id).expect("a call that is given up was under way");
        let node = self.roster.nodes[node];
        let is_other_up = |&other: &usize| other != node && self.coordinator.lanes[other].is_up(now);
        let is_last = !self.roster.nodes.iter().any(is_other_up);
        if is_wanted && is_last && now < sent.pending.sent + Duration::from_micros(PATIENCE) {
            let me = self.coordinator.me;
            self.core.ledger.violated(|| format!("{me:?} gives node {node} up, and nobody else could answer"));
        }
        self.coordinator.lanes[node].gave_up(&sent.pending, is_wanted, now);
        self.course.failures += u32::from(is_wanted);
    }

    fn note_pace(&mut self, node: usize, straggled: bool, now: Duration) {
        self.core.ledger.counts.straggled += u64::from(straggled);
        self.coordinator.lanes[self.roster.nodes[node]].pace(straggled, now);
    }

    fn note(&mut self, note: Note<'_>) {
        let me = self.coordinator.me;
        match note {
            Note::Failed { call, failure, is_reshared } => {
                let node = self.roster.nodes[call.node];
                self.core.note(|| format!("{me:?}: a call to node {node} failed: {failure}"));
                self.core.ledger.counts.failed_calls += u64::from(!is_reshared);
                if !is_reshared {
                    self.course.tried.insert(node);
                }
            }
            Note::AskedAgain(failure) => self.coordinator.retries += u64::from(failure.may_pass()),
            // Nobody is left to ask, or nothing to pay for it with.
            Note::Waits(_) | Note::RetryRefused => self.course.is_excused = true,
        }
    }
}
