//! Which slot is given up first, as one number per slot and a tournament over them: the largest rank wins.
//! A tree instead of a scan, because a layer of 64 experts may evict 64 times within one call, and every
//! eviction happens while calls wait. Owned by [`super::Residency`].

use super::SlotId;

/// How readily a slot is given up.
///
/// `HELD` < planned (the farther its next use, the larger) < unplanned (the less worth, the larger) < `EMPTY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u64);

/// Positions of use and what experts are worth stay below this: at a billion uses per second for decades.
const TIME_MAX: u64 = 1 << 62;

impl Rank {
    /// In use or loading: never evicted.
    pub(super) const HELD: Self = Self(0);
    /// Holds nothing.
    pub(super) const EMPTY: Self = Self(u64::MAX);

    /// Next used at this position of the queued plans.
    pub(super) fn planned(at: u64) -> Self {
        debug_assert!(at < TIME_MAX);
        Self(1 + at)
    }

    /// Whether it is one of [`Rank::planned`].
    pub(super) fn is_planned(self) -> bool {
        self != Self::HELD && !self.is_free()
    }

    /// Whether nobody will miss what is there, if anything is: neither a call nor a plan.
    pub(super) fn is_free(self) -> bool {
        self >= Self::unplanned(TIME_MAX - 1)
    }

    /// In no plan, and worth so much.
    pub(super) fn unplanned(worth: u64) -> Self {
        debug_assert!(worth < TIME_MAX);
        Self(2 * TIME_MAX - worth)
    }
}

/// The slots in order of eviction. Setting a rank costs O(log slots), asking for the first O(log slots).
#[derive(Debug)]
pub(super) struct EvictionOrder {
    /// A complete binary tree in heap order: node i has the children 2i and 2i+1, the leaves are the slots.
    /// Invariant: every inner node is the larger of its children.
    ranks: Vec<Rank>,
    leaves: usize,
}

impl EvictionOrder {
    /// All of `slots` empty.
    pub(super) fn new(slots: usize) -> Self {
        let leaves = slots.next_power_of_two().max(2);
        let mut order = Self { ranks: vec![Rank::HELD; 2 * leaves], leaves };
        (0..slots).for_each(|slot| order.set(SlotId(slot as u32), Rank::EMPTY));
        order
    }

    /// How readily this slot is given up.
    pub(super) fn rank(&self, slot: SlotId) -> Rank {
        self.ranks[self.leaves + slot.index()]
    }

    pub(super) fn set(&mut self, slot: SlotId, rank: Rank) {
        let mut node = self.leaves + slot.index();
        self.ranks[node] = rank;
        // Up to the root.
        for _ in 0..self.leaves.ilog2() {
            node /= 2;
            let winner = self.ranks[2 * node].max(self.ranks[2 * node + 1]);
            if self.ranks[node] == winner {
                break;
            }
            self.ranks[node] = winner;
        }
    }

    /// The slot to give up first with its rank, the lowest slot among equals; `None` if all are held.
    pub(super) fn first(&self) -> Option<(SlotId, Rank)> {
        let rank = self.ranks[1];
        if rank == Rank::HELD {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            node = if self.ranks[2 * node] == rank { 2 * node } else { 2 * node + 1 };
        }
        Some((SlotId((node - self.leaves) as u32), rank))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranks_follow_the_rules_of_eviction() {
        // Broken: something planned goes before something unplanned, or the nearer use before the farther.
        assert!(Rank::HELD < Rank::planned(0));
        assert!(Rank::planned(3) < Rank::planned(4));
        assert!(Rank::planned(TIME_MAX - 1) < Rank::unplanned(TIME_MAX - 1));
        assert!(Rank::unplanned(5) < Rank::unplanned(4));
        assert!(Rank::unplanned(0) < Rank::EMPTY);
        assert!(Rank::planned(0).is_planned() && Rank::planned(TIME_MAX - 1).is_planned());
        assert!([Rank::HELD, Rank::unplanned(TIME_MAX - 1), Rank::EMPTY].iter().all(|rank| !rank.is_planned()));
        assert!(Rank::unplanned(TIME_MAX - 1).is_free() && Rank::unplanned(0).is_free() && Rank::EMPTY.is_free());
        assert!(!Rank::HELD.is_free() && !Rank::planned(TIME_MAX - 1).is_free());
    }

    proptest! {
        #[test]
        fn first_is_the_largest_rank(slots in 1usize..40, sets in prop::collection::vec((0usize..40, 0u64..8), 0..200)) {
            // Broken: the tree forgets an update, and something else than the first of the order is evicted.
            let mut order = EvictionOrder::new(slots);
            let mut ranks = vec![Rank::EMPTY; slots];
            for (slot, rank) in sets {
                let (slot, rank) = (slot % slots, Rank(rank));
                order.set(SlotId(slot as u32), rank);
                ranks[slot] = rank;
                let best = *ranks.iter().max().unwrap();
                let expected = (best != Rank::HELD)
                    .then(|| (SlotId(ranks.iter().position(|&r| r == best).unwrap() as u32), best));
                prop_assert_eq!(order.first(), expected);
                prop_assert!((0..slots).all(|slot| order.rank(SlotId(slot as u32)) == ranks[slot]));
            }
        }
    }
}
