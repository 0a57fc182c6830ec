//! The queued plans as one line of future uses: position 0 is the nearest, and every expert knows the
//! positions at which it is wanted. Owned by [`super::Residency`], which evicts and prefetches by it.
//!
//! A call does not say which plan it belongs to, so a plan advances by what is called: a call of layer L
//! takes the step of layer L from the first plan whose next step it is, else from the first plan that has
//! one ahead. Whatever such a plan expected before or at that step is over, whether it came true or not.
//! A wrong guess costs a worse eviction, never a wrong result.

use std::{collections::VecDeque, ops::Range};

use super::KeyIndex;
use crate::{LayerId, PlanId};

/// Where the first plan is. Far from both ends: at a billion experts a second each lasts for decades.
const MIDDLE: u64 = 1 << 61;

#[derive(Debug)]
struct QueuedPlan {
    id: PlanId,
    /// The position of its first expert. Position of `experts[i]` is `first + i`.
    first: u64,
    experts: Vec<KeyIndex>,
    /// Consecutive experts of one layer: the layer and the end of its run in `experts`.
    steps: Vec<(LayerId, usize)>,
    /// Steps before this one are over.
    next_step: usize,
}

impl QueuedPlan {
    /// Where in `experts` the steps that are not over begin.
    fn ahead(&self) -> usize {
        self.next_step.checked_sub(1).map_or(0, |step| self.steps[step].1)
    }
}

/// A planned expert that is not present.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing {
    pub(super) key: KeyIndex,
    /// The position after the last of the step that wants it.
    pub(super) step_end: u64,
}

/// The queued plans, and when each expert is used next by them.
#[derive(Debug)]
pub(super) struct PlanQueue {
    plans: VecDeque<QueuedPlan>,
    plans_max: usize,
    /// Per expert the positions ahead at which it is wanted, ascending.
    /// Invariant: exactly the positions of `plans` from each plan's `ahead()` on.
    uses: Vec<VecDeque<u64>>,
    /// The positions given out, from the middle of what there is: plans come before and behind those that are there.
    /// No position is given twice.
    given: Range<u64>,
    /// No expert ahead of this position needs a prefetch; see [`PlanQueue::first_missing`].
    searched: u64,
}

impl PlanQueue {
    pub(super) fn new(keys: usize, plans_max: usize) -> Self {
        let uses = (0..keys).map(|_| VecDeque::new()).collect();
        Self { plans: VecDeque::new(), plans_max, uses, given: MIDDLE..MIDDLE, searched: MIDDLE }
    }

    /// How many plans are queued.
    pub(super) fn len(&self) -> usize {
        self.plans.len()
    }

    /// The position of the next planned use of an expert.
    pub(super) fn next_use(&self, key: KeyIndex) -> Option<u64> {
        self.uses[key].front().copied()
    }

    /// Queues a plan, first if its batch `begins`, else last. A plan of the same name is replaced; beyond the limit the
    /// last one is dropped, be it this. `changed` is told every expert whose next use is not what it was.
    pub(super) fn push(
        &mut self,
        id: PlanId,
        experts: Vec<(LayerId, KeyIndex)>,
        begins: bool,
        mut changed: impl FnMut(KeyIndex),
    ) {
        self.remove(id, &mut changed);
        if self.plans_max == 0 || experts.is_empty() {
            return;
        }
        if self.plans.len() >= self.plans_max {
            if !begins {
                return;
            }
            let last = self.plans.pop_back().expect("a full queue has a last plan");
            forget(&mut self.uses, &last, last.ahead()..last.experts.len(), &mut changed);
        }
        let count = experts.len() as u64;
        let first = if begins { self.given.start - count } else { self.given.end };
        let mut steps: Vec<(LayerId, usize)> = Vec::new();
        for (at, &(layer, key)) in experts.iter().enumerate() {
            match steps.last_mut() {
                Some((last, end)) if *last == layer => *end = at + 1,
                _ => steps.push((layer, at + 1)),
            }
            let (uses, position) = (&mut self.uses[key], first + at as u64);
            if begins {
                uses.push_front(position);
            } else {
                uses.push_back(position);
            }
            if begins || uses.len() == 1 {
                changed(key);
            }
        }
        let experts: Vec<KeyIndex> = experts.into_iter().map(|(_, key)| key).collect();
        let plan = QueuedPlan { id, first, experts, steps, next_step: 0 };
        if begins {
            self.given.start = first;
            self.searched = first;
            self.plans.push_front(plan);
        } else {
            self.given.end += count;
            self.plans.push_back(plan);
        }
    }

    /// Forgets a plan, if it is still queued.
    pub(super) fn remove(&mut self, id: PlanId, mut changed: impl FnMut(KeyIndex)) {
        if let Some(at) = self.plans.iter().position(|plan| plan.id == id) {
            let plan = self.plans.remove(at).expect("its position was just found");
            forget(&mut self.uses, &plan, plan.ahead()..plan.experts.len(), &mut changed);
        }
    }

    /// A call of this layer came: its step in the plan that it belongs to is over, and all steps before it.
    pub(super) fn advance(&mut self, layer: LayerId, mut changed: impl FnMut(KeyIndex)) {
        let next = self.plans.iter().position(|plan| plan.steps[plan.next_step].0 == layer);
        let found = next.map(|at| (at, self.plans[at].next_step)).or_else(|| {
            self.plans.iter().enumerate().find_map(|(at, plan)| {
                let ahead = plan.steps[plan.next_step..].iter().position(|step| step.0 == layer)?;
                Some((at, plan.next_step + ahead))
            })
        });
        let Some((at, step)) = found else { return };
        let plan = &mut self.plans[at];
        let over = plan.ahead()..plan.steps[step].1;
        plan.next_step = step + 1;
        forget(&mut self.uses, plan, over, &mut changed);
        if plan.next_step == plan.steps.len() {
            self.plans.remove(at);
        }
    }

    /// The nearest expert that one of the first `plans` plans names and that is not `present`.
    ///
    /// Continues where the last search ended, so that a search costs what is new: whoever makes an expert
    /// absent again must call [`PlanQueue::search_again`].
    pub(super) fn first_missing(&mut self, plans: usize, present: impl Fn(KeyIndex) -> bool) -> Option<Missing> {
        for plan in self.plans.iter().take(plans) {
            let done = self.searched.saturating_sub(plan.first).min(plan.experts.len() as u64) as usize;
            for at in done.max(plan.ahead())..plan.experts.len() {
                let key = plan.experts[at];
                if !present(key) {
                    self.searched = plan.first + at as u64;
                    let step = plan.steps.iter().find(|step| step.1 > at).expect("every expert is of a step");
                    return Some(Missing { key, step_end: plan.first + step.1 as u64 });
                }
            }
        }
        // An earlier search may have gone farther.
        let end = self.plans.get(plans).map_or(self.given.end, |next| next.first);
        self.searched = self.searched.max(end);
        None
    }

    /// An expert is not present any more: the next search must look at it again.
    pub(super) fn search_again(&mut self, key: KeyIndex) {
        if let Some(at) = self.next_use(key) {
            self.searched = self.searched.min(at);
        }
    }
}

/// Takes positions of a plan out of the uses of its experts.
fn forget(uses: &mut [VecDeque<u64>], plan: &QueuedPlan, over: Range<usize>, changed: &mut impl FnMut(KeyIndex)) {
    for at in over {
        let (key, position) = (plan.experts[at], plan.first + at as u64);
        let found = uses[key].binary_search(&position).expect("a position ahead is among the uses of its expert");
        uses[key].remove(found);
        if found == 0 {
            changed(key);
        }
    }
}
