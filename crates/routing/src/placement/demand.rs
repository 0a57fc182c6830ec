//! How much each expert is wanted: rows per expert as the hash tables foretell them, and how many copies more
//! than the others that is worth. Kept by the writer of the placement.
//!
//! The problem: load moves all the time, a copy costs a load from disk and room on a node, so copies must
//! follow the load slowly and never flap. Three things see to that:
//!
//! - rows fade exponentially ([`Demand::decay`]), so that a burst counts for little;
//! - the steps are doublings: an expert deserves k copies more from 2^k times an even share of its layer's rows
//!   on, and loses the k-th only below *half* of that ([`Demand::settle`]). Between the two nothing changes, so
//!   the load must change by a factor of two to undo what it did;
//! - a level moves by one per settling, and a layer that has seen fewer than [`ROWS_MIN`] rows does not move.

use crate::{ExpertKey, Placement};

/// Rows of a layer below which nothing is concluded from them.
pub const ROWS_MIN: f64 = 1000.0;
/// The most copies more that are told apart: 2^8 times an even share is a whole layer of 256 experts.
const LEVELS_MAX: u8 = 8;

/// Rows seen per expert, and what was concluded from them.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    num_experts: usize,
    /// (moe_layers, num_experts), fading.
    rows: Vec<f64>,
    /// (moe_layers,): the sums of `rows`.
    layers: Vec<f64>,
    /// (moe_layers, num_experts): copies more than the others that are deserved.
    levels: Vec<u8>,
}

impl Demand {
    /// Nothing seen yet.
    pub fn new(moe_layers: usize, num_experts: usize) -> Self {
        let experts = moe_layers * num_experts;
        Self { num_experts, rows: vec![0.0; experts], layers: vec![0.0; moe_layers], levels: vec![0; experts] }
    }

    /// Rows that go, or will go, to an expert. One that the model does not have is not counted.
    pub fn note(&mut self, key: ExpertKey, rows: u64) {
        if let Some(at) = self.at(key) {
            self.rows[at] += rows as f64;
            self.layers[usize::from(key.layer.0)] += rows as f64;
        }
    }

    /// Lets what was seen fade to `factor` of it, which is in [0, 1]. At a fixed pace, so that it is a half-life.
    pub fn decay(&mut self, factor: f64) {
        debug_assert!((0.0..=1.0).contains(&factor), "{factor} is no fading");
        self.rows.iter_mut().chain(&mut self.layers).for_each(|rows| *rows *= factor);
    }

    /// Adds what another coordinator has seen of the same model; of another extent it adds nothing.
    pub fn merge(&mut self, other: &Self) {
        if (self.num_experts, self.rows.len()) == (other.num_experts, other.rows.len()) {
            let pairs = self.rows.iter_mut().zip(&other.rows).chain(self.layers.iter_mut().zip(&other.layers));
            pairs.for_each(|(mine, theirs)| *mine += theirs);
        }
    }

    /// The share of its layer's rows that an expert has, in [0, 1]; 0 where nothing was seen.
    pub fn share(&self, key: ExpertKey) -> f64 {
        self.at(key).map_or(0.0, |at| self.share_at(at))
    }

    /// Copies more than the others that an expert deserves, as last settled.
    pub fn level(&self, key: ExpertKey) -> usize {
        self.at(key).map_or(0, |at| self.level_at(at))
    }

    /// Concludes from what was seen: every expert's level moves by at most one, and only out of its band. At a
    /// fixed pace, after [`Demand::decay`].
    pub fn settle(&mut self) {
        for at in 0..self.rows.len() {
            if self.layers[at / self.num_experts] < ROWS_MIN {
                continue;
            }
            // 1: an even share.
            let load = self.share_at(at) * self.num_experts as f64;
            let level = &mut self.levels[at];
            if *level < LEVELS_MAX && load >= f64::from(1u32 << (*level + 1)) {
                *level += 1;
            } else if *level > 0 && load < f64::from(1u32 << *level) / 2.0 {
                *level -= 1;
            }
        }
    }

    /// Takes over the levels that an earlier writer acted on, as its placement shows them, so that a change of
    /// the writer moves nothing by itself. An expert that was in the middle of a move looks hotter by one copy,
    /// until it is seen that its load is less than even.
    pub fn adopt(&mut self, placement: &Placement) {
        let extent = placement.extent();
        if (extent.num_experts, extent.experts()) != (self.num_experts, self.rows.len()) {
            return;
        }
        for (level, copies) in self.levels.iter_mut().zip(placement.counts()) {
            let more = (copies as usize).saturating_sub(extent.replicas);
            *level = u8::try_from(more).unwrap_or(u8::MAX).min(LEVELS_MAX);
        }
    }

    /// Levels of all experts, layer by layer.
    pub(super) fn level_at(&self, at: usize) -> usize {
        self.levels.get(at).copied().map_or(0, usize::from)
    }

    fn share_at(&self, at: usize) -> f64 {
        let layer = self.layers[at / self.num_experts];
        if layer > 0.0 { self.rows[at] / layer } else { 0.0 }
    }

    fn at(&self, key: ExpertKey) -> Option<usize> {
        let (layer, expert) = (usize::from(key.layer.0), usize::from(key.expert.0));
        (layer < self.layers.len() && expert < self.num_experts).then(|| layer * self.num_experts + expert)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ExpertId, LayerId};

    fn key(layer: u16, expert: u16) -> ExpertKey {
        ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) }
    }

    /// A layer of 16 experts where expert 0 gets `load` times an even share.
    fn loaded(demand: &mut Demand, load: f64) {
        demand.decay(0.0);
        let of = 1_600_000.0;
        let first = load / 16.0 * of;
        demand.note(key(0, 0), first as u64);
        (1..16).for_each(|expert| demand.note(key(0, expert), ((of - first) / 15.0) as u64));
    }

    #[test]
    fn copies_do_not_flap() {
        // Broken: a load that swings around a threshold would load and drop the same expert for ever.
        let mut demand = Demand::new(1, 16);
        loaded(&mut demand, 2.1);
        demand.settle();
        assert_eq!(demand.level(key(0, 0)), 1);
        for swing in [1.9, 2.1, 1.1, 2.9, 1.05, 3.9] {
            loaded(&mut demand, swing);
            demand.settle();
            assert_eq!(demand.level(key(0, 0)), 1, "{swing}");
        }
        loaded(&mut demand, 0.9);
        demand.settle();
        assert_eq!(demand.level(key(0, 0)), 0);
    }

    #[test]
    fn levels_move_one_at_a_time_and_only_on_evidence() {
        // Broken: one large batch after a start would move half of the cluster's copies.
        let mut demand = Demand::new(2, 16);
        demand.note(key(0, 3), 999);
        demand.settle();
        assert_eq!((demand.level(key(0, 3)), demand.share(key(0, 3)), demand.share(key(1, 0))), (0, 1.0, 0.0));
        demand.note(key(0, 3), 1);
        for expected in [1, 2, 3, 4, 4] {
            demand.settle();
            assert_eq!(demand.level(key(0, 3)), expected, "16 times an even share is 2^4");
        }
    }

    #[test]
    fn what_is_not_of_the_model_is_not_counted() {
        // Broken: a malformed hint would bring the writer down or bend the shares.
        let mut demand = Demand::new(1, 4);
        demand.note(key(1, 0), 5);
        demand.note(key(0, 4), 5);
        assert_eq!(demand, Demand::new(1, 4));
        demand.merge(&Demand::new(2, 2));
        let mut other = Demand::new(1, 4);
        other.note(key(0, 1), 6);
        demand.note(key(0, 2), 2);
        demand.merge(&other);
        assert_eq!(demand.share(key(0, 1)), 0.75);
    }

    #[test]
    fn a_copy_is_lost_only_below_half_of_what_it_took() {
        // Broken: an expert with an even share would lose a copy that the next rows bring back.
        let mut demand = Demand::new(1, 2);
        demand.note(key(0, 0), 1000);
        demand.settle();
        demand.note(key(0, 1), 1000);
        demand.settle();
        assert_eq!((demand.level(key(0, 0)), demand.share(key(0, 0))), (1, 0.5));
        demand.note(key(0, 1), 1);
        demand.settle();
        assert_eq!(demand.level(key(0, 0)), 0);
    }

    #[test]
    fn levels_have_an_end() {
        // Broken: one expert of a layer with very many would be copied to the whole cluster.
        let mut demand = Demand::new(1, 1024);
        demand.note(key(0, 7), 1_000_000);
        (0..20).for_each(|_| demand.settle());
        assert_eq!((demand.level(key(0, 7)), demand.level(key(0, 6))), (8, 0));
        assert_eq!((demand.level(key(0, 1024)), demand.share(key(0, 1024))), (0, 0.0), "an expert there is not");
    }

    #[test]
    fn what_was_seen_fades() {
        // Broken: a burst of long ago would count as much as what is wanted now.
        let mut demand = Demand::new(1, 2);
        demand.note(key(0, 0), 3000);
        demand.decay(0.25);
        demand.note(key(0, 1), 250);
        assert_eq!((demand.share(key(0, 0)), demand.share(key(0, 1))), (0.75, 0.25));
        demand.decay(0.5);
        demand.settle();
        assert_eq!(
            demand,
            Demand { num_experts: 2, rows: vec![375.0, 125.0], layers: vec![500.0], levels: vec![0, 0] }
        );
    }

    #[test]
    fn a_new_writer_goes_on_with_the_copies_that_there_are() {
        // Broken: a change of the writer would drop the copies of hot experts and load them again a minute later.
        let nodes = || (0..12).map(|i| format!("n{i:02}").into()).collect();
        let extent = crate::Extent { moe_layers: 1, num_experts: 4, replicas: 2 };
        let holders: Vec<u32> = [0..2, 0..5, 0..1, 0..12].into_iter().flatten().collect();
        let placement = Placement::from_parts(1, extent, nodes(), &[2, 5, 1, 12], &holders).unwrap();
        let mut demand = Demand::new(1, 4);
        demand.adopt(&placement);
        assert_eq!(demand.levels, [0, 3, 0, 8]);
        for (moe_layers, num_experts) in [(2, 2), (1, 5), (2, 4)] {
            let mut other = Demand::new(moe_layers, num_experts);
            other.adopt(&placement);
            assert_eq!(other, Demand::new(moe_layers, num_experts), "another model's placement says nothing");
        }
    }

    proptest! {
        #[test]
        fn a_steady_load_comes_to_rest(rows in prop::collection::vec(0u64..100_000, 8)) {
            // Broken: copies would move although the load does not.
            let mut demand = Demand::new(1, 8);
            (0..8).for_each(|e| demand.note(key(0, e), rows[usize::from(e)]));
            (0..=LEVELS_MAX).for_each(|_| demand.settle());
            let settled = demand.clone();
            demand.settle();
            prop_assert_eq!(demand, settled);
        }
    }
}
