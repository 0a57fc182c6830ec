//! The draws that say which nodes an expert belongs to. Called by `table` and `target`.
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
//! nothing else, removing a node leaves every other pair in place. More holders of an expert are the next
//! nodes of the same order, so they move nothing either.
//!
//! Cost: one hash per pair, O(experts * nodes). The logarithm is taken only of the few pairs that could win:
//! `-ln(u) >= 1 - u`, and `1 - u` is the hash itself, so that one multiplication tells that a pair cannot.

use super::Candidate;

/// The nodes to draw among.
pub(super) struct Draws {
    /// (seed, 1 / weight, index of the node), by ascending index.
    nodes: Vec<(u64, f64, u16)>,
    /// (draw, index of the node), least first: the best so far of one expert.
    best: Vec<(f64, u16)>,
}

impl Draws {
    /// `candidates` are sorted by name, and their place is their index. Those of weight 0 draw nothing.
    pub(super) fn new(candidates: &[&Candidate]) -> Self {
        let drawing = candidates.iter().enumerate().filter(|(_, c)| c.weight > 0.0);
        let nodes = drawing.map(|(i, c)| (hash_name(c.node.as_str()), c.weight.recip(), i as u16)).collect();
        Self { nodes, best: Vec::new() }
    }

    /// How many nodes draw.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The `count` nodes with the least draws for an expert, least first. Equal draws go to the lesser name.
    pub(super) fn least(&mut self, layer: usize, expert: usize, count: usize) -> impl Iterator<Item = u16> {
        let expert = mix(((layer as u64) << 32) + expert as u64);
        let best = &mut self.best;
        best.clear();
        // The greatest draw that still wins; anything while there are fewer than `count`.
        let mut bound = f64::INFINITY;
        for &(seed, inverse_weight, node) in if count == 0 { &[] } else { &self.nodes[..] } {
            let hash = mix(seed ^ expert);
            // Short of the bound of 1 - u by far more than the rounding of both sides, so that no pair is
            // lost that the logarithm would have let win.
            if one_minus_u(hash) * inverse_weight * 0.999_999_999 > bound {
                continue;
            }
            let draw = negative_ln(hash) * inverse_weight;
            if best.len() < count || draw < bound {
                best.truncate(count - 1);
                let at = best.partition_point(|&(other, _)| other <= draw);
                best.insert(at, (draw, node));
                if best.len() == count {
                    bound = best[count - 1].0;
                }
            }
        }
        best.iter().map(|&(_, node)| node)
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

/// `1 - u` for the u of [`negative_ln`]; exact.
fn one_minus_u(hash: u64) -> f64 {
    (!hash >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
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
    let m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) + (mantissa_exponent << 52));
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

    #[test]
    fn the_logarithm_is_one() {
        // Broken: weights would not mean shares.
        for i in 0..100_000u64 {
            let hash = mix(i);
            let u = ((hash >> 11) + 1) as f64 / (1u64 << 53) as f64;
            assert!((negative_ln(hash) + u.ln()).abs() <= 1e-12 * u.ln().abs().max(1.0), "{u}");
            assert_eq!(one_minus_u(hash), 1.0 - u);
        }
        assert_eq!(negative_ln(u64::MAX), 0.0);
        assert!((negative_ln(0) - 53.0 * std::f64::consts::LN_2).abs() < 1e-9);
    }

    #[test]
    fn equal_draws_go_to_the_lesser_name() {
        // Broken: coordinators that list the nodes in another order would disagree on who holds an expert.
        let mut draws = Draws { nodes: (0..4).map(|node| (7, 1.0, node)).collect(), best: Vec::new() };
        for count in 0..6 {
            assert_eq!(draws.least(1, 2, count).collect::<Vec<_>>(), (0..count.min(4) as u16).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_least_weight_is_a_share_too() {
        // Broken: a node whose weight has no finite inverse would leave experts without a holder.
        let candidate = Candidate { node: "tiny".into(), weight: f64::MIN_POSITIVE / 1e10 };
        let mut draws = Draws::new(&[&candidate]);
        assert!((0..100).all(|expert| draws.least(0, expert, 1).eq([0])));
    }

    /// The same answer the long way: every pair's logarithm, then a sort.
    fn least_by_sorting(nodes: &[(u64, f64, u16)], layer: usize, expert: usize, count: usize) -> Vec<u16> {
        let expert = mix((layer as u64) << 32 | expert as u64);
        let mut draws: Vec<(f64, u16)> =
            nodes.iter().map(|&(seed, inverse, node)| (negative_ln(mix(seed ^ expert)) * inverse, node)).collect();
        draws.sort_by(|a, b| a.partial_cmp(b).unwrap());
        draws.into_iter().take(count).map(|(_, node)| node).collect()
    }

    proptest! {
        #[test]
        fn the_short_cut_changes_nothing(weights in prop::collection::vec(1e-6f64..1e6, 0..40), count in 0usize..6) {
            // Broken: experts of a running cluster would move, or two versions would disagree.
            let candidates: Vec<Candidate> =
                weights.iter().enumerate().map(|(i, &weight)| Candidate { node: format!("n{i:02}").into(), weight }).collect();
            let mut draws = Draws::new(&candidates.iter().collect::<Vec<_>>());
            for expert in 0..200 {
                let expected = least_by_sorting(&draws.nodes, 3, expert, count);
                prop_assert_eq!(draws.least(3, expert, count).collect::<Vec<_>>(), expected);
            }
        }
    }
}
