//! How a placement is put together, expert by expert: drawn for candidates, or from what was written down. Whatever comes
//! from outside is checked here.

use super::{Candidate, Extent, HOLDERS_MAX, NODES_MAX, Placement, PlacementError, rendezvous::Draws};
use crate::NodeId;

impl Placement {
    /// Computes who should hold what, without regard to load. The same candidates in any order give the same
    /// holders.
    pub fn compute(epoch: u64, extent: Extent, candidates: &[Candidate]) -> Result<Self, PlacementError> {
        if let Some(c) = candidates.iter().find(|c| c.weight <= 0.0) {
            return Err(PlacementError::Weight { node: c.node.clone(), weight: c.weight });
        }
        Self::draw(epoch, extent, candidates, |_| extent.replicas)
    }

    /// As [`Placement::compute`], with `copies(i)` holders for expert i, as far as there are nodes, and none on
    /// candidates of weight 0.
    pub(super) fn draw(
        epoch: u64,
        extent: Extent,
        candidates: &[Candidate],
        copies: impl Fn(usize) -> usize,
    ) -> Result<Self, PlacementError> {
        let mut candidates: Vec<&Candidate> = candidates.iter().collect();
        candidates.sort_by(|a, b| a.node.cmp(&b.node));
        extent.check()?;
        check_candidates(&candidates)?;
        let mut draws = Draws::new(&candidates);
        let nodes = candidates.iter().map(|c| c.node.clone()).collect();
        let mut builder = Builder::new(extent);
        for layer in 0..extent.moe_layers {
            for expert in 0..extent.num_experts {
                let count = copies(layer * extent.num_experts + expert).min(draws.nodes());
                builder.push(draws.least(layer, expert, count))?;
            }
        }
        Ok(builder.finish(epoch, nodes))
    }

    /// A placement as it was written down: `counts` holders per expert, layer by layer, their indices into
    /// `nodes` one after another in `holders`. Checks everything; what comes from outside may be anything.
    pub fn from_parts(
        epoch: u64,
        extent: Extent,
        nodes: Vec<NodeId>,
        counts: &[u32],
        holders: &[u32],
    ) -> Result<Self, PlacementError> {
        extent.check()?;
        if nodes.len() > NODES_MAX {
            return Err(PlacementError::Nodes { found: nodes.len(), expected: NODES_MAX });
        }
        if let Some(pair) = nodes.windows(2).find(|pair| pair[0] >= pair[1]) {
            let node = pair[1].clone();
            let twice = pair[0] == pair[1];
            return Err(if twice { PlacementError::Duplicate { node } } else { PlacementError::Order { node } });
        }
        if counts.len() != extent.experts() {
            return Err(PlacementError::Counts { found: counts.len(), expected: extent.experts() });
        }
        let sum: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        if sum != holders.len() as u64 {
            return Err(PlacementError::Holders { found: holders.len(), expected: sum });
        }
        let mut builder = Builder::new(extent);
        // The last expert that each node was seen to hold, + 1.
        let mut last = vec![0; nodes.len()];
        let mut rest = holders;
        for (expert, &count) in counts.iter().enumerate() {
            let (own, others) = rest.split_at(count as usize);
            rest = others;
            for &holder in own {
                let Some(last) = last.get_mut(holder as usize) else {
                    let (experts, nodes) = (counts.len(), nodes.len());
                    return Err(PlacementError::Holder { expert, experts, holder, nodes });
                };
                if std::mem::replace(last, expert + 1) == expert + 1 {
                    return Err(PlacementError::Twice { expert, node: nodes[holder as usize].clone() });
                }
            }
            builder.push(own.iter().map(|&holder| holder as u16))?;
        }
        Ok(builder.finish(epoch, nodes))
    }
}

/// Puts a placement together, expert by expert.
pub(super) struct Builder {
    extent: Extent,
    starts: Vec<u32>,
    holders: Vec<u16>,
}

impl Builder {
    pub(super) fn new(extent: Extent) -> Self {
        Self { extent, starts: vec![0], holders: Vec::new() }
    }

    /// The next expert's holders: distinct indices of nodes.
    pub(super) fn push(&mut self, holders: impl Iterator<Item = u16>) -> Result<(), PlacementError> {
        self.holders.extend(holders);
        if self.holders.len() > HOLDERS_MAX {
            return Err(PlacementError::Copies { expected: HOLDERS_MAX });
        }
        self.starts.push(self.holders.len() as u32);
        Ok(())
    }

    /// The placement on `nodes`, which are ascending.
    pub(super) fn finish(self, epoch: u64, nodes: Vec<NodeId>) -> Placement {
        let Self { extent, starts, holders } = self;
        debug_assert_eq!(starts.len(), extent.experts() + 1, "an expert was left out");
        Placement { epoch, extent, nodes, starts, holders }
    }
}

/// Refuses what cannot be placed on. `candidates` are sorted by name.
fn check_candidates(candidates: &[&Candidate]) -> Result<(), PlacementError> {
    if candidates.len() > NODES_MAX {
        return Err(PlacementError::Nodes { found: candidates.len(), expected: NODES_MAX });
    }
    if let Some(c) = candidates.iter().find(|c| !(c.weight.is_finite() && c.weight >= 0.0)) {
        return Err(PlacementError::Weight { node: c.node.clone(), weight: c.weight });
    }
    match candidates.windows(2).find(|pair| pair[0].node == pair[1].node) {
        Some(pair) => Err(PlacementError::Duplicate { node: pair[0].node.clone() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ExpertId, ExpertKey, LayerId};

    fn candidates(weights: &[f64]) -> Vec<Candidate> {
        let named =
            |(i, &weight): (usize, &f64)| Candidate { node: format!("expert-node-{i}").as_str().into(), weight };
        weights.iter().enumerate().map(named).collect()
    }

    fn compute(candidates: &[Candidate], extent: (usize, usize, usize)) -> Placement {
        let extent = Extent { moe_layers: extent.0, num_experts: extent.1, replicas: extent.2 };
        Placement::compute(1, extent, candidates).unwrap()
    }

    #[test]
    fn placement_never_changes_between_versions() {
        // Broken: an upgrade would move the experts of every running cluster.
        let placement = compute(&candidates(&[1.0, 1.0, 2.0]), (2, 12, 2));
        let primaries: Vec<u16> = placement.keys().map(|key| placement.holder_indices(key)[0]).collect();
        assert_eq!(primaries, PINNED, "rewrite PINNED only with a decision about migration");
    }
    const PINNED: [u16; 24] = [0, 1, 2, 1, 2, 1, 2, 2, 1, 2, 1, 0, 2, 2, 2, 1, 2, 1, 0, 1, 2, 1, 2, 1];

    #[test]
    fn tables_are_taken_up_to_their_bounds() {
        // Broken: a large cluster could not be placed on, or a record from outside would fill the memory.
        let extent = Extent { moe_layers: 1, num_experts: 1, replicas: 1 };
        let weights = vec![1.0; NODES_MAX + 1];
        let many = Placement::compute(1, extent, &candidates(&weights[1..])).unwrap();
        assert_eq!(many.nodes().len(), NODES_MAX);
        let refused = Err(PlacementError::Nodes { found: NODES_MAX + 1, expected: NODES_MAX });
        assert_eq!(Placement::compute(1, extent, &candidates(&weights)), refused);
        let named = |count| (0..count).map(|i| format!("n{i:05}").into()).collect();
        assert!(Placement::from_parts(1, extent, named(NODES_MAX), &[0], &[]).is_ok());
        assert_eq!(Placement::from_parts(1, extent, named(NODES_MAX + 1), &[0], &[]), refused);
        let mut builder = Builder::new(extent);
        assert_eq!(builder.push(std::iter::repeat_n(0, HOLDERS_MAX)), Ok(()));
        assert_eq!(builder.push(std::iter::once(0)), Err(PlacementError::Copies { expected: HOLDERS_MAX }));
    }

    #[test]
    fn bad_input_is_named() {
        // Broken: a zero weight would divide by zero, a second node of one name would shadow the first.
        let extent = Extent { moe_layers: 1, num_experts: 2, replicas: 1 };
        let weight = Placement::compute(1, extent, &candidates(&[0.0]));
        assert!(matches!(weight, Err(PlacementError::Weight { .. })));
        for weight in [f64::NAN, f64::INFINITY, -1.0] {
            let leaving = Placement::draw(1, extent, &candidates(&[0.0, weight]), |_| 1);
            assert!(matches!(leaving, Err(PlacementError::Weight { .. })), "{weight}: {leaving:?}");
        }
        let twice = [candidates(&[1.0]), candidates(&[1.0])].concat();
        assert!(matches!(Placement::compute(1, extent, &twice), Err(PlacementError::Duplicate { .. })));
        let none = Extent { replicas: 0, ..extent };
        assert_eq!(Placement::compute(1, none, &[]), Err(PlacementError::Replicas));
        let huge = Extent { moe_layers: usize::MAX, ..extent };
        assert!(matches!(Placement::compute(1, huge, &[]), Err(PlacementError::Experts { .. })));
    }

    #[test]
    fn bad_parts_are_named() {
        // Broken: a placement from outside would bring a node down, or send rows to a node that does not exist.
        let extent = Extent { moe_layers: 1, num_experts: 2, replicas: 1 };
        let parts = |names: &[&str], counts: &[u32], holders: &[u32]| {
            Placement::from_parts(7, extent, names.iter().map(|&name| name.into()).collect(), counts, holders)
        };
        let good = parts(&["a", "b"], &[2, 1], &[1, 0, 1]).unwrap();
        let key = |expert| ExpertKey { layer: LayerId(0), expert: ExpertId(expert) };
        assert_eq!(
            (good.epoch(), good.holder_indices(key(0)), good.holder_indices(key(1))),
            (7, &[1, 0][..], &[1][..])
        );
        assert!(parts(&[], &[0, 0], &[]).is_ok(), "experts without holders can be written down");
        assert!(matches!(parts(&["b", "a"], &[0, 0], &[]), Err(PlacementError::Order { .. })));
        assert!(matches!(parts(&["a", "a"], &[0, 0], &[]), Err(PlacementError::Duplicate { .. })));
        assert!(matches!(parts(&["a"], &[1], &[0]), Err(PlacementError::Counts { found: 1, expected: 2 })));
        assert!(matches!(parts(&["a"], &[1, 1], &[0]), Err(PlacementError::Holders { found: 1, expected: 2 })));
        let wrap = parts(&["a"], &[u32::MAX, 2], &[0]);
        assert!(matches!(wrap, Err(PlacementError::Holders { found: 1, .. })));
        assert!(matches!(parts(&["a"], &[1, 1], &[0, 1]), Err(PlacementError::Holder { expert: 1, holder: 1, .. })));
        assert!(matches!(parts(&["a"], &[1, 1], &[0, 65_536]), Err(PlacementError::Holder { .. })));
        assert!(matches!(parts(&["a"], &[0, 2], &[0, 0]), Err(PlacementError::Twice { expert: 1, .. })));
    }

    proptest! {
        #[test]
        fn parts_make_the_same_placement(weights in prop::collection::vec(0.1f64..8.0, 0..9), replicas in 1usize..4) {
            // Broken: a placement would come back from etcd as another.
            let placement = compute(&candidates(&weights), (3, 17, replicas)).with_epoch(5);
            let counts: Vec<u32> = placement.counts().collect();
            let holders: Vec<u32> = placement.all_holders().iter().map(|&h| u32::from(h)).collect();
            let again = Placement::from_parts(5, placement.extent(), placement.nodes().to_vec(), &counts, &holders);
            prop_assert!(again.as_ref().unwrap().same_holders(&placement));
            prop_assert_eq!(again.unwrap(), placement);
        }

        #[test]
        fn holders_are_distinct_and_known(weights in prop::collection::vec(0.1f64..8.0, 0..12), replicas in 1usize..5) {
            // Broken: a failover would ask the dead node again, or an index would be out of range.
            let placement = compute(&candidates(&weights), (3, 17, replicas));
            for key in placement.keys() {
                let holders = placement.holder_indices(key);
                prop_assert_eq!(holders.len(), replicas.min(weights.len()));
                prop_assert_eq!(placement.primary(key), holders.first().map(|&node| &placement.nodes()[usize::from(node)]));
                let distinct: std::collections::BTreeSet<_> = holders.iter().collect();
                prop_assert_eq!(distinct.len(), holders.len());
                prop_assert!(holders.iter().all(|&node| usize::from(node) < weights.len()));
            }
            for node in placement.nodes() {
                let held: Vec<_> = placement.held_by(node).collect();
                let expected: Vec<_> = placement.keys().filter(|&key| placement.holders(key).any(|n| n == node)).collect();
                prop_assert_eq!(held, expected);
            }
        }

        #[test]
        fn a_leaving_node_moves_only_its_own(weights in prop::collection::vec(0.1f64..8.0, 2..12), gone in 0usize..12) {
            // Broken: the death of a node would make the others load experts that they need not have.
            let gone = gone % weights.len();
            let before = candidates(&weights);
            let mut after = before.clone();
            let left = after.remove(gone).node;
            after.reverse();
            let (before, after) = (compute(&before, (4, 32, 2)), compute(&after, (4, 32, 2)));
            for key in before.keys() {
                let stayed: Vec<_> = before.holders(key).filter(|&node| *node != left).collect();
                let now: Vec<_> = after.holders(key).collect();
                prop_assert_eq!(&now[..stayed.len()], &stayed[..]);
            }
        }

        #[test]
        fn shares_follow_weights(weights in prop::collection::vec(0.5f64..4.0, 2..10)) {
            // Broken: a big node would idle while a small one thrashes. Six standard deviations of a binomial.
            let placement = compute(&candidates(&weights), (24, 256, 1));
            let (total, sum) = ((24 * 256) as f64, weights.iter().sum::<f64>());
            let mut counts = vec![0.0; weights.len()];
            for &node in &placement.holders {
                counts[usize::from(node)] += 1.0;
            }
            for (node, weight) in placement.nodes().iter().zip(&candidates(&weights)) {
                prop_assert_eq!(node, &weight.node);
            }
            for (&count, &weight) in counts.iter().zip(&weights) {
                let p = weight / sum;
                prop_assert!((count - total * p).abs() <= 6.0 * (total * p * (1.0 - p)).sqrt(), "{count} of {}", total * p);
            }
        }
    }
}
