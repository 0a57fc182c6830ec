//! What must hold, checked as things happen. A violation is kept as a sentence; the first one ends the run.

use std::collections::BTreeMap;

use sida_routing::{Placement, placement::moves};

use crate::event::{Actor, Micros};

/// Without any fault a call is done in that time at most: two ways on a slow link, loads, compute.
pub(crate) const CALL_NORMAL_MAX: Micros = 130_000;
/// What one lost node may cost a request.
pub(crate) const STALL_MAX: Micros = 300_000;
/// A node that could be reached for so long without a break must have answered.
pub(crate) const REACHABLE_MIN: Micros = 1_500_000;

#[derive(Default)]
pub(crate) struct Ledger {
    /// Every placement ever written, by epoch.
    placements: BTreeMap<u64, Placement>,
    /// The epoch each life of a process acts on.
    adopted: BTreeMap<(Actor, u32), u64>,
    pub(crate) violation: Option<String>,
    pub(crate) counts: Counts,
}

/// What a run saw, to tell that it tested something.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) events: u64,
    pub(crate) requests: u64,
    pub(crate) failed_requests: u64,
    /// Requests whose callers left.
    pub(crate) left_requests: u64,
    pub(crate) failed_calls: u64,
    /// Calls that were on their way far longer than others.
    pub(crate) straggled: u64,
    pub(crate) stale_calls: u64,
    pub(crate) placements: u64,
    /// Copies of experts that placements added to the ones before.
    pub(crate) moves: u64,
    pub(crate) refused_writes: u64,
    pub(crate) elections: u64,
    pub(crate) stall_max: Micros,
}

impl Counts {
    /// Adds those of another run.
    pub(crate) fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.requests += other.requests;
        self.failed_requests += other.failed_requests;
        self.left_requests += other.left_requests;
        self.failed_calls += other.failed_calls;
        self.straggled += other.straggled;
        self.stale_calls += other.stale_calls;
        self.placements += other.placements;
        self.moves += other.moves;
        self.refused_writes += other.refused_writes;
        self.elections += other.elections;
        self.stall_max = self.stall_max.max(other.stall_max);
    }
}

/// A request that was answered.
pub(crate) struct Answered {
    pub(crate) took: Micros,
    /// Of that, calls that were answered: with rows, or with a newer placement.
    pub(crate) worked: Micros,
    /// Calls that were not.
    pub(crate) failures: u32,
    /// Something other than one lost node held it up: nobody else was up, or its coordinator stood still.
    pub(crate) is_excused: bool,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn violated(&mut self, what: impl FnOnce() -> String) {
        self.violation.get_or_insert_with(what);
    }

    /// A placement goes into the store.
    pub(crate) fn written(&mut self, writer: Actor, before: Option<&Placement>, written: &Placement) {
        self.counts.placements += 1;
        self.counts.moves += before.map_or(0, |before| moves(before, written)) as u64;
        let (epoch, before_epoch) = (written.epoch(), before.map_or(0, Placement::epoch));
        if epoch <= before_epoch {
            self.violated(|| format!("{writer:?} wrote epoch {epoch} over {before_epoch}"));
        }
        for key in written.keys() {
            let holders: Vec<_> = written.holders(key).collect();
            if holders.is_empty() {
                self.violated(|| format!("epoch {epoch} leaves {key} to nobody"));
            }
            let stayed = |before: &Placement| before.holders(key).any(|old| holders.contains(&old));
            let could_stay =
                |before: &Placement| before.holders(key).any(|old| written.nodes().binary_search(old).is_ok());
            if before.is_some_and(|before| could_stay(before) && !stayed(before)) {
                self.violated(|| format!("epoch {epoch} drops the last live holder of {key}"));
            }
        }
        self.same(writer, written);
    }

    /// Somebody acts on a placement from now on.
    pub(crate) fn adopted(&mut self, actor: Actor, life: u32, placement: &Placement) {
        let epoch = placement.epoch();
        let last = self.adopted.insert((actor, life), epoch).unwrap_or(0);
        if epoch <= last {
            self.violated(|| format!("{actor:?} went from epoch {last} to {epoch}"));
        }
        self.same(actor, placement);
    }

    fn same(&mut self, actor: Actor, placement: &Placement) {
        let epoch = placement.epoch();
        match self.placements.get(&epoch) {
            Some(known) if known.same_holders(placement) => {}
            Some(_) => self.violated(|| format!("{actor:?} has another placement of epoch {epoch}")),
            None => _ = self.placements.insert(epoch, placement.clone()),
        }
    }

    /// An expert-node computes a call.
    pub(crate) fn computes(&mut self, node: Actor, known: u64, call: u64) {
        if call < known {
            self.violated(|| format!("{node:?} computes for epoch {call} and knows {known}"));
        }
    }

    /// A request whose caller left so long ago is over. What was under way is answered, or costs what a lost node does.
    pub(crate) fn left(&mut self, coordinator: Actor, request: u64, ago: Micros, stood_still: bool) {
        self.counts.left_requests += 1;
        if ago > STALL_MAX && !stood_still {
            self.violated(|| format!("{coordinator:?} works at request {request} {ago} us after its caller left"));
        }
    }

    pub(crate) fn answered(&mut self, coordinator: Actor, request: u64, answered: &Answered) {
        self.counts.requests += 1;
        let &Answered { took, worked, failures, is_excused } = answered;
        let stall = took - worked.min(took);
        if is_excused {
            return;
        }
        self.counts.stall_max = self.counts.stall_max.max(stall);
        if stall > STALL_MAX * u64::from(failures.max(1)) {
            self.violated(|| format!("{coordinator:?} request {request}: {stall} us lost to {failures} failed calls"));
        }
    }
}
