//! What the elected coordinator writes next: the first placement, or a step from the stored one towards what the
//! members and the load ask for, at a bounded pace. Kept by the coordinator that holds the election, made anew
//! with each term.
//!
//! What failures took is restored as fast as steps go. What only improves (a node joined or leaves, a load
//! moved) is paid from a bucket that fills with [`Pace::moves_per_minute`] and is empty at the begin of a term,
//! so that the bound holds across writers too. Dead holders are dropped at once whatever the pace says; but who
//! was never seen in a term may only be late, and is waited for.

use std::time::Duration;

use crate::{
    Candidate, Demand, Extent, NodeId, Placement, PlacementError, Policy,
    placement::{Allowance, moves, step_within, target},
};

/// Epochs that a store can have lost: one every millisecond for seven weeks.
const EPOCHS_LOST_MAX: u64 = 1 << 32;

/// How fast the placement may change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Copies per minute that are moved without need.
    pub moves_per_minute: u32,
    /// Between two steps, unless a holder died: each step makes everybody look at what they hold.
    pub step_interval: Duration,
    /// How long after an election those are waited for who hold experts and are not registered: the time of a
    /// lease. The election may come of the store having lost all leases, and a writer that has just started
    /// cannot know who was registered before.
    pub absence_borne: Duration,
    /// How long the first members of a cluster must have been the same before they are placed on: nodes start
    /// one after another, and the first must not be given everything.
    pub gather: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            moves_per_minute: 600,
            step_interval: Duration::from_millis(250),
            absence_borne: Duration::from_secs(10),
            gather: Duration::from_secs(2),
        }
    }
}

/// An expert-node that counts as a member and has the cluster's model.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Its name.
    pub node: NodeId,
    /// Its share, relative to the others. Positive and finite.
    pub weight: f64,
    /// It is on its way out: it gets nothing more, and what it holds goes to others while it still answers.
    pub is_leaving: bool,
    /// The epoch up to which it has loaded what is placed on it; 0 after a start.
    pub ready_epoch: u64,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Write this in place of the stored one, and only in its place.
    Write(Placement),
    /// Nothing now. Decide again when something changes, or at this time.
    Wait(Option<Duration>),
}

/// The writer of the placement, for one term.
#[derive(Clone, Debug)]
pub struct Writer {
    policy: Policy,
    pace: Pace,
    /// Moves that may be made now. Invariant: at most a minute's.
    moves: f64,
    filled: Duration,
    stepped: Option<Duration>,
    elected: Duration,
    /// Everybody who was a member in this term, ascending.
    seen: Vec<NodeId>,
    /// The members seen last, and since when they are these.
    gathered: (Vec<NodeId>, Duration),
}

impl Writer {
    /// Elected at `now`.
    pub fn new(policy: Policy, pace: Pace, now: Duration) -> Self {
        let (seen, gathered) = (Vec::new(), (Vec::new(), now));
        Self { policy, pace, moves: 0.0, filled: now, stepped: None, elected: now, seen, gathered }
    }

    /// Decides on what to write next. `current` is the latest placement this coordinator has adopted, and
    /// `stored_epoch` that of the one in the store, 0 if there is none: a store that lost what was written gets
    /// what is known, under an epoch beyond all that anybody has seen.
    pub fn decide(
        &mut self,
        now: Duration,
        current: Option<&Placement>,
        stored_epoch: u64,
        extent: Extent,
        members: &[Standing],
        demand: &Demand,
    ) -> Result<Decision, PlacementError> {
        self.fill(now);
        if members.iter().all(|member| member.is_leaving) {
            // Nobody to place on: the last placement stays, in case they come back.
            return Ok(Decision::Wait(None));
        }
        let is_member = |node: &NodeId| members.iter().any(|member| member.node == *node);
        let is_unseen = |node: &NodeId| !is_member(node) && self.seen.binary_search(node).is_err();
        let borne_until = self.elected + self.pace.absence_borne;
        if now < borne_until && current.is_some_and(|current| current.nodes().iter().any(is_unseen)) {
            // Whoever this term has not seen may be about to register again.
            self.see(members);
            return Ok(Decision::Wait(Some(borne_until)));
        }
        self.see(members);
        let candidate = |member: &Standing| Candidate {
            node: member.node.clone(),
            weight: if member.is_leaving { 0.0 } else { member.weight },
        };
        let candidates: Vec<Candidate> = members.iter().map(candidate).collect();
        let target = target(extent, &candidates, demand, &self.policy)?;
        let decision = match current {
            None => self.first(now, target),
            Some(current) => match self.next(now, current, &target, members) {
                Decision::Wait(_) if stored_epoch < current.epoch() => Decision::Write(current.clone()),
                decision => decision,
            },
        };
        let Decision::Write(placement) = decision else { return Ok(decision) };
        let known = stored_epoch.max(current.map_or(0, Placement::epoch));
        // Members may have seen what the store lost. One that claims an absurd epoch must not use them up.
        let ready = members.iter().map(|member| member.ready_epoch);
        let seen = ready.filter(|epoch| epoch.saturating_sub(known) < EPOCHS_LOST_MAX).max().unwrap_or(0);
        let next = known.max(seen).checked_add(1);
        Ok(next.map_or(Decision::Wait(None), |epoch| Decision::Write(placement.with_epoch(epoch))))
    }

    /// The decision on `current` was written at `now`.
    pub fn written(&mut self, now: Duration, current: Option<&Placement>, written: &Placement) {
        self.fill(now);
        self.stepped = Some(now);
        if let Some(current) = current {
            let made = moves(current, written).saturating_sub(restored(current, written));
            self.moves = (self.moves - made as f64).max(0.0);
        }
    }

    /// The first placement of a cluster: as it should be, for there is nothing to move.
    fn first(&mut self, now: Duration, target: Placement) -> Decision {
        if self.gathered.0 != target.nodes() {
            self.gathered = (target.nodes().to_vec(), now);
        }
        let complete = self.gathered.1 + self.pace.gather;
        if now >= complete { Decision::Write(target) } else { Decision::Wait(Some(complete)) }
    }

    fn next(&self, now: Duration, current: &Placement, target: &Placement, members: &[Standing]) -> Decision {
        let has_died = |node: &NodeId| target.node_index(node).is_none();
        let is_urgent = current.nodes().iter().any(has_died);
        let earliest = self.stepped.map_or(Duration::ZERO, |stepped| stepped + self.pace.step_interval);
        if !is_urgent && now < earliest {
            return Decision::Wait(Some(earliest));
        }
        let ready = |node: &NodeId| {
            let standing = members.iter().find(|member| member.node == *node);
            standing.map_or(0, |member| member.ready_epoch)
        };
        let missing = moves(current, target);
        // Moves go in batches, lest each trickles into an epoch of its own.
        let batch = (f64::from(self.pace.moves_per_minute) / 12.0).ceil().min(missing as f64).max(1.0);
        let affordable = if self.moves >= batch { self.moves as usize } else { 0 };
        let allowance = Allowance { copies: self.policy.moves_max, moves: affordable };
        if let Some(placement) = step_within(current, target, &ready, allowance) {
            return Decision::Write(placement);
        }
        let is_held_back = missing > 0 && affordable == 0 && self.pace.moves_per_minute > 0;
        let seconds = (batch - self.moves) * 60.0 / f64::from(self.pace.moves_per_minute.max(1));
        // A little more, lest rounding makes it a moment too early.
        Decision::Wait(is_held_back.then(|| now + Duration::from_secs_f64(seconds) + Duration::from_millis(1)))
    }

    fn see(&mut self, members: &[Standing]) {
        for member in members {
            if let Err(at) = self.seen.binary_search(&member.node) {
                self.seen.insert(at, member.node.clone());
            }
        }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        let minute = f64::from(self.pace.moves_per_minute);
        self.moves = (self.moves + passed * minute / 60.0).min(minute);
    }
}

/// How many of the copies that `after` adds are in place of lost ones, or of ones there were too few of.
fn restored(before: &Placement, after: &Placement) -> usize {
    let replicas = after.extent().replicas;
    let of_key = |key| {
        let is_there = |node: &&NodeId| after.node_index(node).is_some();
        let alive: Vec<&NodeId> = before.holders(key).filter(is_there).collect();
        let added = after.holders(key).filter(|node| !alive.contains(node)).count();
        added.min(replicas.saturating_sub(alive.len()))
    };
    after.keys().map(of_key).sum()
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
