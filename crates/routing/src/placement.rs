//! Which expert-nodes should hold which expert. Read by coordinators (whom to hint and to call, and whom to
//! ask next when a call fails); computed wherever the members change.
//!
//! The problem: every coordinator must come to the same answer from the same members without asking anyone,
//! a node must get experts in proportion to its weight, and when a node leaves only its experts may move,
//! since each move is a load from disk. Counting (`expert % nodes`) moves nearly everything; a hash ring
//! needs many virtual nodes to be fair.
//!
//! The answer is weighted rendezvous hashing (Thaler and Ravishankar 1998; weights by Schindelhauer and
//! Schomaker 2005): each (expert, node) pair draws `-ln(u) / weight` with u in (0, 1] from a hash of the
//! pair, and the experts' holders are the nodes with the least draws, in that order. A draw is exponential
//! with rate `weight`, so a node wins in proportion to its weight; and since a pair's draw depends on
//! nothing else, removing a node leaves every other pair in place.
//!
//! Cost: one hash and one logarithm per pair, O(experts * nodes).

use thiserror::Error;

use crate::{ExpertId, ExpertKey, LayerId, NodeId};

/// The most nodes that can be placed on: far above what one coordinator can talk to.
pub const NODES_MAX: usize = 4096;
/// The most experts of a model, over all layers: bounds the table to a few MiB whatever a config claims.
pub const EXPERTS_MAX: usize = 1 << 20;

/// A node that can hold experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its name. Only the name and the weight decide what it holds, never its place in a list.
    pub node: NodeId,
    /// Its share, relative to the others.
    pub weight: f64,
}

/// The extent of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// MoE layers of the model.
    pub moe_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Holders per expert, the primary included; fewer where there are fewer nodes.
    pub replicas: usize,
}

/// Why a placement cannot be computed.
#[derive(Clone, Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum PlacementError {
    #[error("node {node} has weight {weight}, expected a positive finite number")]
    Weight { node: NodeId, weight: f64 },
    #[error("two expert-nodes are called {node}")]
    Duplicate { node: NodeId },
    #[error("{found} expert-nodes, at most {expected} can be placed on")]
    Nodes { found: usize, expected: usize },
    #[error("{moe_layers} layers x {num_experts} experts are more than {expected}")]
    Experts { moe_layers: usize, num_experts: usize, expected: usize },
    #[error("replicas is 0, expected at least 1 holder per expert")]
    Replicas,
}

/// Expert -> ordered holders.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    epoch: u64,
    extent: Extent,
    nodes: Vec<NodeId>,
    /// Holders per expert that there are nodes for.
    per_expert: usize,
    /// (moe_layers, num_experts, per_expert), indices into `nodes`, primary first.
    /// Invariant: the holders of an expert are distinct.
    holders: Vec<u16>,
}

impl Placement {
    /// Computes who holds what. The same candidates in any order give the same holders.
    pub fn compute(epoch: u64, extent: Extent, candidates: &[Candidate]) -> Result<Self, PlacementError> {
        let mut candidates: Vec<&Candidate> = candidates.iter().collect();
        candidates.sort_by(|a, b| a.node.cmp(&b.node));
        check(&extent, &candidates)?;
        let draws: Vec<(u64, f64)> =
            candidates.iter().map(|c| (hash_name(c.node.as_str()), c.weight.recip())).collect();
        let per_expert = extent.replicas.min(candidates.len());
        let mut holders = Vec::with_capacity(extent.moe_layers * extent.num_experts * per_expert);
        let mut best = Vec::with_capacity(per_expert + 1);
        for layer in 0..extent.moe_layers as u64 {
            for expert in 0..extent.num_experts as u64 {
                least_draws(mix(layer << 32 | expert), &draws, per_expert, &mut best);
                holders.extend(best.iter().map(|&(_, node)| node));
            }
        }
        Ok(Self { epoch, extent, nodes: candidates.iter().map(|c| c.node.clone()).collect(), per_expert, holders })
    }

    /// Which version of the placement this is; a later one is greater.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What it was computed for.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The nodes placed on, by ascending name.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// Who holds `key`, primary first, as indices into [`Placement::nodes`]. Empty when there are no nodes or
    /// the model has no such expert.
    pub fn holder_indices(&self, key: ExpertKey) -> &[u16] {
        let (layer, expert) = (usize::from(key.layer.0), usize::from(key.expert.0));
        if layer >= self.extent.moe_layers || expert >= self.extent.num_experts {
            return &[];
        }
        let start = (layer * self.extent.num_experts + expert) * self.per_expert;
        &self.holders[start..start + self.per_expert]
    }

    /// Who holds `key`, primary first.
    pub fn holders(&self, key: ExpertKey) -> impl Iterator<Item = &NodeId> {
        self.holder_indices(key).iter().map(|&node| &self.nodes[usize::from(node)])
    }

    /// Who should compute `key`.
    pub fn primary(&self, key: ExpertKey) -> Option<&NodeId> {
        self.holders(key).next()
    }

    /// The experts whose primary is `node`, ascending.
    pub fn experts_of<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = ExpertKey> + 'a {
        self.keys().filter(move |&key| self.primary(key) == Some(node))
    }

    /// Every expert of the model, ascending.
    fn keys(&self) -> impl Iterator<Item = ExpertKey> + use<> {
        let experts = self.extent.num_experts as u16;
        (0..self.extent.moe_layers as u16).flat_map(move |layer| {
            (0..experts).map(move |expert| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) })
        })
    }
}

/// Refuses what cannot be placed. `candidates` are sorted by name.
fn check(extent: &Extent, candidates: &[&Candidate]) -> Result<(), PlacementError> {
    let &Extent { moe_layers, num_experts, replicas } = extent;
    if replicas == 0 {
        return Err(PlacementError::Replicas);
    }
    if candidates.len() > NODES_MAX {
        return Err(PlacementError::Nodes { found: candidates.len(), expected: NODES_MAX });
    }
    let ids = usize::from(u16::MAX) + 1;
    let fits = moe_layers <= ids && num_experts <= ids;
    if !fits || moe_layers * num_experts > EXPERTS_MAX {
        return Err(PlacementError::Experts { moe_layers, num_experts, expected: EXPERTS_MAX });
    }
    if let Some(c) = candidates.iter().find(|c| !(c.weight.is_finite() && c.weight > 0.0)) {
        return Err(PlacementError::Weight { node: c.node.clone(), weight: c.weight });
    }
    match candidates.windows(2).find(|pair| pair[0].node == pair[1].node) {
        Some(pair) => Err(PlacementError::Duplicate { node: pair[0].node.clone() }),
        None => Ok(()),
    }
}

/// The `count` nodes with the least draws for one expert, least first, into `best`. Equal draws go to the
/// lesser name.
fn least_draws(expert: u64, nodes: &[(u64, f64)], count: usize, best: &mut Vec<(f64, u16)>) {
    best.clear();
    for (node, &(seed, inverse_weight)) in nodes.iter().enumerate() {
        let draw = negative_ln(mix(seed ^ expert)) * inverse_weight;
        if best.len() < count || draw < best[best.len() - 1].0 {
            let at = best.partition_point(|&(other, _)| other <= draw);
            best.insert(at, (draw, node as u16));
            best.truncate(count);
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input moves every bit of the
/// output.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// FNV-1a of a name, then mixed. Stable for ever: a change of it would move every expert of a running cluster.
fn hash_name(name: &str) -> u64 {
    mix(name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)))
}

/// `-ln(u)` for u = (top 53 bits of `hash` + 1) / 2^53, in (0, 1].
///
/// Not `f64::ln`: its last bit depends on the machine's maths library, and nodes of different machines must
/// draw alike. Here are only +, * and /, which IEEE 754 rounds alike everywhere: u = m * 2^e with m in
/// [1/sqrt(2), sqrt(2)), and ln m = 2 atanh((m - 1) / (m + 1)) by its series, good to 1e-13.
fn negative_ln(hash: u64) -> f64 {
    let bits = (((hash >> 11) + 1) as f64).to_bits();
    let above_sqrt2 = (bits & 0x000f_ffff_ffff_ffff) >= 0x0006_a09e_667f_3bcd;
    let exponent = (bits >> 52) as i64 - 1023 + i64::from(above_sqrt2) - 53;
    let mantissa_exponent = 1023 - u64::from(above_sqrt2);
    let m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (mantissa_exponent << 52));
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    let mut series = 1.0 / 15.0;
    for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * s2 + 1.0 / odd;
    }
    -(exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    fn the_logarithm_is_one() {
        // Broken: weights would not mean shares.
        for i in 0..100_000u64 {
            let hash = mix(i);
            let u = ((hash >> 11) + 1) as f64 / (1u64 << 53) as f64;
            assert!((negative_ln(hash) + u.ln()).abs() <= 1e-12 * u.ln().abs().max(1.0), "{u}");
        }
        assert_eq!(negative_ln(u64::MAX), 0.0);
        assert!((negative_ln(0) - 53.0 * std::f64::consts::LN_2).abs() < 1e-9);
    }

    #[test]
    fn placement_never_changes_between_versions() {
        // Broken: an upgrade would move the experts of every running cluster.
        let placement = compute(&candidates(&[1.0, 1.0, 2.0]), (1, 12, 2));
        let primaries: Vec<u16> = placement.keys().map(|key| placement.holder_indices(key)[0]).collect();
        assert_eq!(primaries, PINNED, "rewrite PINNED only with a decision about migration");
    }
    const PINNED: [u16; 12] = [0, 1, 2, 1, 2, 1, 2, 2, 1, 2, 1, 0];

    #[test]
    fn bad_input_is_named() {
        // Broken: a zero weight would divide by zero, a second node of one name would shadow the first.
        let extent = Extent { moe_layers: 1, num_experts: 2, replicas: 1 };
        let weight = Placement::compute(1, extent, &candidates(&[0.0]));
        assert!(matches!(weight, Err(PlacementError::Weight { .. })));
        let twice = [candidates(&[1.0]), candidates(&[1.0])].concat();
        assert!(matches!(Placement::compute(1, extent, &twice), Err(PlacementError::Duplicate { .. })));
        let none = Extent { replicas: 0, ..extent };
        assert_eq!(Placement::compute(1, none, &[]), Err(PlacementError::Replicas));
        let huge = Extent { moe_layers: usize::MAX, ..extent };
        assert!(matches!(Placement::compute(1, huge, &[]), Err(PlacementError::Experts { .. })));
    }

    proptest! {
        #[test]
        fn holders_are_distinct_and_known(weights in prop::collection::vec(0.1f64..8.0, 0..12), replicas in 1usize..5) {
            // Broken: a failover would ask the dead node again, or an index would be out of range.
            let placement = compute(&candidates(&weights), (3, 17, replicas));
            for key in placement.keys() {
                let holders = placement.holder_indices(key);
                prop_assert_eq!(holders.len(), replicas.min(weights.len()));
                let distinct: std::collections::BTreeSet<_> = holders.iter().collect();
                prop_assert_eq!(distinct.len(), holders.len());
                prop_assert!(holders.iter().all(|&node| usize::from(node) < weights.len()));
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
