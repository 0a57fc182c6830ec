//! The way from the placement that is to the one that should be, without a hole on it: one publishable step.
//! Called by the writer of the placement.
//!
//! The problem: whoever is named first for an expert gets its rows at once, but a new holder has to load the
//! expert first. Publishing the target as it is would send every moved expert's rows to nodes that must load
//! them while requests wait, all at the same moment.
//!
//! So a copy moves in three published placements: the new holder is appended last (it loads; only a failure
//! would send it rows), it reports that it is ready, it takes its place and one that should no longer hold the
//! expert is dropped. In every one of them, for an expert that should have w holders:
//!
//! - a live holder is dropped only while w ready ones, or as many as there are, stay; so the last never is;
//! - no more than w + 1 are named, unless more were before: one exchange at a time;
//! - dead holders are dropped at once.
//!
//! A step adds a bounded number of copies, and those first that failures took: experts that nobody holds
//! (unbounded: some node has to load them for the next request in any case, and better the right one), then
//! those with fewest copies left; what is left of the bound goes to moves that only improve.
//!
//! Repeated with nodes that get ready it arrives: each step adds at least one missing copy of every expert
//! that lacks one, or as many as are allowed, and with none missing one more step drops the rest.

use super::{Extent, Placement, Policy, builder::Builder};
use crate::NodeId;

/// How many copies a step may add, besides those of experts that nobody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// In all.
    pub copies: usize,
    /// Of these, copies that restore nothing: for another node's, or for hot experts.
    pub moves: usize,
}

/// One publishable step from `current` towards `target`, with the epoch after `current`'s; `None` if there is
/// nothing to do, or nothing until somebody is ready. `ready(node)` is the epoch up to which `node` has loaded
/// what is placed on it. A node that is not among the target's counts as dead.
pub fn step(
    current: &Placement,
    target: &Placement,
    ready: &dyn Fn(&NodeId) -> u64,
    policy: &Policy,
) -> Option<Placement> {
    step_within(current, target, ready, Allowance { copies: policy.moves_max, moves: policy.moves_max })
}

/// As [`step`], with restored copies and others bounded separately: the others may be held back for a while.
pub fn step_within(
    current: &Placement,
    target: &Placement,
    ready: &dyn Fn(&NodeId) -> u64,
    allowance: Allowance,
) -> Option<Placement> {
    let extent = target.extent();
    let epoch = current.epoch().checked_add(1)?;
    if !current.extent().same_experts(&extent) {
        // Another model's: nothing of it can be kept.
        return Some(target.clone().with_epoch(epoch));
    }
    let plan = Plan::new(current, target, ready);
    let adds = plan.adds(allowance);
    let mut builder = Builder::new(extent);
    let mut kept = Vec::new();
    for (expert, &count) in adds.iter().enumerate() {
        plan.kept(expert, &mut kept);
        let added = plan.missing(expert).take(usize::from(count));
        // Only a target that is full to the brim fails here; it stays as it is.
        builder.push(kept.iter().copied().chain(added)).ok()?;
    }
    let next = builder.finish(epoch, target.nodes().to_vec());
    let unchanged = next.nodes() == current.nodes() && next.same_holders(current) && current.extent() == extent;
    (!unchanged).then_some(next)
}

/// Copies that `to` places on nodes that do not have them in `from`: what must be loaded.
pub fn moves(from: &Placement, to: &Placement) -> usize {
    if !from.extent().same_experts(&to.extent()) {
        return to.all_holders().len();
    }
    let of_from: Vec<Option<u16>> = to.nodes().iter().map(|node| from.node_index(node)).collect();
    let is_new = |expert: usize, holder: u16| {
        of_from[usize::from(holder)].is_none_or(|holder| !from.holders_at(expert).contains(&holder))
    };
    let of_expert = |expert| to.holders_at(expert).iter().filter(|&&holder| is_new(expert, holder)).count();
    (0..to.extent().experts()).map(of_expert).sum()
}

/// A step in the making. Nodes are indices into the target's nodes.
struct Plan<'a> {
    current: &'a Placement,
    target: &'a Placement,
    /// By index into the current nodes: the same node in the target; `None` is a dead one.
    live: Vec<Option<u16>>,
    /// By index into the target's nodes.
    ready: Vec<bool>,
}

impl<'a> Plan<'a> {
    fn new(current: &'a Placement, target: &'a Placement, ready: &dyn Fn(&NodeId) -> u64) -> Self {
        let live = current.nodes().iter().map(|node| target.node_index(node)).collect();
        let ready = target.nodes().iter().map(|node| ready(node) >= current.epoch()).collect();
        Self { current, target, live, ready }
    }

    /// The current holders of an expert that are alive, in their order.
    fn alive(&self, expert: usize) -> impl Iterator<Item = u16> {
        self.current.holders_at(expert).iter().filter_map(|&holder| self.live[usize::from(holder)])
    }

    fn is_wanted(&self, expert: usize, holder: u16) -> bool {
        self.target.holders_at(expert).contains(&holder)
    }

    /// Who should hold an expert and is not yet named, most wanted first.
    fn missing(&self, expert: usize) -> impl Iterator<Item = u16> {
        let is_named = move |holder| self.alive(expert).any(|named| named == holder);
        self.target.holders_at(expert).iter().copied().filter(move |&holder| !is_named(holder))
    }

    /// The holders of an expert that stay, in their new order.
    fn kept(&self, expert: usize, kept: &mut Vec<u16>) {
        kept.clear();
        let wanted = self.target.holders_at(expert);
        let is_ready = |holder: u16| self.ready[usize::from(holder)];
        let (mut named, mut ready) = (0, 0);
        for holder in self.alive(expert).filter(|&holder| self.is_wanted(expert, holder)) {
            named += 1;
            ready += usize::from(is_ready(holder));
        }
        // With nobody to hold it (all are leaving) everything stays where it is.
        let mut others = if wanted.is_empty() { usize::MAX } else { wanted.len() - ready };
        let all_ready = ready == named;
        if all_ready {
            kept.extend(wanted.iter().copied().filter(|&holder| self.alive(expert).any(|named| named == holder)));
        }
        for holder in self.alive(expert) {
            if self.is_wanted(expert, holder) {
                if !all_ready {
                    kept.push(holder);
                }
            } else if others > 0 {
                others -= 1;
                kept.push(holder);
            }
        }
    }

    /// How many of its missing holders each expert gets now.
    fn adds(&self, allowance: Allowance) -> Vec<u16> {
        let &Extent { replicas, .. } = &self.target.extent();
        let mut kept = Vec::new();
        let next = |expert| {
            self.kept(expert, &mut kept);
            Next { has: kept.len(), missing: self.missing(expert).count(), adds: 0 }
        };
        let mut nexts: Vec<Next> = (0..self.target.extent().experts()).map(next).collect();
        nexts.iter_mut().filter(|next| next.has == 0 && next.missing > 0).for_each(|next| next.add(1));
        let mut copies = allowance.copies;
        for copies_left in 1..replicas {
            for next in nexts.iter_mut().filter(|next| next.has == copies_left && next.missing > 0) {
                if copies > 0 {
                    next.add(1);
                    copies -= 1;
                }
            }
        }
        let mut moves = copies.min(allowance.moves);
        for (expert, next) in nexts.iter_mut().enumerate() {
            let wanted = self.target.holders_at(expert).len();
            // A restored copy has its turn first, and at the pace of restored copies.
            if next.has >= replicas.min(wanted) {
                let more = (wanted + 1).saturating_sub(next.has).min(next.missing).min(moves);
                next.add(more);
                moves -= more;
            }
        }
        nexts.into_iter().map(|next| next.adds).collect()
    }
}

/// The holders of one expert in the next placement.
struct Next {
    has: usize,
    /// Of its target's, those that it will not have.
    missing: usize,
    /// Of those that it has, the new ones.
    adds: u16,
}

impl Next {
    fn add(&mut self, copies: usize) {
        self.has += copies;
        self.missing -= copies;
        self.adds += copies as u16;
    }
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
