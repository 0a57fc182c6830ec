//! What a net's confidence is worth. A net is trained to find the expert, and to be surer of it than the router is: so
//! the probability that it gives an expert is not the one that the router would give, which `hash` scales the expert's
//! output by. Nor is it how often the router chooses the expert, by which it is decided what is worth planning. Measured on
//! held-out text, a line from the net's probability to each of them mends that, in each MoE layer.

use serde::{Deserialize, Serialize};
use sida_routing::LayerId;

/// Points of a line, at most.
pub const POINTS_MAX: usize = 32;
/// Entries that a point is the mean of, at least.
const ENTRIES_MIN: usize = 64;
/// Tokens that a layer is calibrated with, at least: two points of one entry a token, and as many to measure those with.
pub(crate) const TOKENS_MIN: usize = 4 * ENTRIES_MIN;

/// From a net's probability of an expert to what was found of the expert, in one MoE layer: the router's probability of it, or
/// whether the router chose it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Which layer.
    pub layer: LayerId,
    /// Points (the net's probability, the mean of what was found there), both rising. Between them the line is straight, and
    /// outside it is level. Without points the net's probability is taken as it is.
    points: Vec<(f32, f32)>,
}

/// Some of the entries, next to each other in order of the net's probability.
#[derive(Clone, Copy)]
struct Bin {
    entries: f64,
    predicted: f64,
    found: f64,
}

impl Calibration {
    /// Of a layer of whose entries nothing is known.
    pub(crate) fn none(layer: LayerId) -> Self {
        Self { layer, points: Vec::new() }
    }

    /// Learnt from pairs of the net's probability of an expert and what was found of it. Each point is of about the same sum of
    /// probabilities: most entries are of experts that are hardly ever chosen.
    pub(crate) fn fit(layer: LayerId, mut pairs: Vec<(f32, f32)>) -> Self {
        pairs.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let bin = |pairs: &[(f32, f32)]| {
            let mean = |of: fn(&(f32, f32)) -> f32| {
                pairs.iter().map(|pair| f64::from(of(pair))).sum::<f64>() / pairs.len() as f64
            };
            Bin { entries: pairs.len() as f64, predicted: mean(|pair| pair.0), found: mean(|pair| pair.1) }
        };
        // A bin below the one before it is made one with it, until all rise (pool adjacent violators).
        let mut bins: Vec<Bin> = Vec::new();
        for mut next in cut(&pairs).map(bin) {
            while let Some(last) = bins.pop_if(|last| last.found >= next.found || last.predicted >= next.predicted) {
                next = last.with(next);
            }
            bins.push(next);
        }
        Self { layer, points: bins.into_iter().map(|bin| (bin.predicted as f32, bin.found as f32)).collect() }
    }

    /// What the net's probability is worth.
    pub(crate) fn at(&self, predicted: f32) -> f32 {
        let after = self.points.partition_point(|point| point.0 <= predicted);
        match (after.checked_sub(1).map(|before| self.points[before]), self.points.get(after)) {
            (None, None) => predicted,
            (Some(end), None) | (None, Some(&end)) => end.1,
            (Some((x0, y0)), Some(&(x1, y1))) => y0 + (y1 - y0) * (predicted - x0) / (x1 - x0),
        }
    }

    /// Why the points cannot be ones that were learnt, if so.
    pub(crate) fn fault(&self) -> Option<String> {
        let layer = self.layer;
        let is_probability = |value: f32| (0.0..=1.0).contains(&value);
        if self.points.len() > POINTS_MAX {
            return Some(format!("layer {layer} has {} points, at most {POINTS_MAX} are allowed", self.points.len()));
        }
        if let Some(point) = self.points.iter().find(|point| !is_probability(point.0) || !is_probability(point.1)) {
            return Some(format!("layer {layer} has a point {point:?}, expected probabilities"));
        }
        let rises = self.points.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
        (!rises).then(|| format!("the points of layer {layer} do not rise"))
    }
}

/// What is sorted, cut into [`POINTS_MAX`] parts at most, of about the same sum of probabilities, and none but the last of a few
/// entries.
fn cut(pairs: &[(f32, f32)]) -> impl Iterator<Item = &[(f32, f32)]> {
    let sum_min = pairs.iter().map(|pair| f64::from(pair.0)).sum::<f64>() / POINTS_MAX as f64;
    let mut rest = pairs;
    std::iter::from_fn(move || {
        let mut sum = 0.0;
        let is_end = |(at, pair): (usize, &(f32, f32))| {
            sum += f64::from(pair.0);
            sum >= sum_min && at + 1 >= ENTRIES_MIN
        };
        let end = rest.iter().enumerate().position(is_end).map_or(rest.len(), |at| at + 1);
        let part;
        (part, rest) = rest.split_at(end);
        (!part.is_empty()).then_some(part)
    })
}

impl Bin {
    fn with(self, other: Self) -> Self {
        let entries = self.entries + other.entries;
        let mean = |of: fn(&Self) -> f64| (of(&self) * self.entries + of(&other) * other.entries) / entries;
        Self { entries, predicted: mean(|bin| bin.predicted), found: mean(|bin| bin.found) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYER: LayerId = LayerId(3);

    #[test]
    fn the_routers_probability_is_found_again() {
        // Would break: `hash` scales the outputs of experts by what the net believes, and its answers stray.
        let routed = |predicted: f32| 0.1 + predicted * predicted / 2.0;
        let pairs = (0..10_000).map(|i| i as f32 / 10_000.0).map(|predicted| (predicted, routed(predicted))).collect();
        let calibration = Calibration::fit(LAYER, pairs);
        assert!(calibration.fault().is_none() && calibration.points.len() == POINTS_MAX);
        for predicted in [0.05, 0.3, 0.5, 0.77, 0.95] {
            assert!((calibration.at(predicted) - routed(predicted)).abs() < 0.01, "{predicted}");
        }
        assert_eq!(Calibration::none(LAYER).at(0.25), 0.25);
        assert_eq!(Calibration::fit(LAYER, Vec::new()).at(0.25), 0.25);
        assert_eq!(Calibration::fit(LAYER, vec![(0.5, 0.2), (0.7, 0.4)]).at(0.01), 0.3, "too few for a second point");
    }

    #[test]
    fn points_that_were_not_learnt_are_refused() {
        // Would break: a damaged file scales outputs by what is no probability.
        let calibration = |points: &[(f32, f32)]| Calibration { layer: LAYER, points: points.to_vec() };
        assert!(calibration(&[(0.1, 0.1), (0.2, 0.1)]).fault().is_none());
        for points in [&[(0.1, f32::NAN)][..], &[(0.1, 1.5)], &[(0.2, 0.1), (0.1, 0.2)], &[(0.1, 0.2), (0.2, 0.1)]] {
            assert!(calibration(points).fault().is_some(), "{points:?}");
        }
        assert!(calibration(&[(0.5, 0.5); 33]).fault().is_some());
    }

    proptest! {
        #[test]
        fn what_is_learnt_is_a_rising_line_of_probabilities(
            pairs in prop::collection::vec((0f32..=1.0, 0f32..=1.0), 0..2000),
            asked in prop::collection::vec(0f32..=1.0, 2..20),
        ) {
            // Would break: the order of a token's experts changes, or an alpha is no probability.
            let calibration = Calibration::fit(LAYER, pairs);
            prop_assert_eq!(calibration.fault(), None);
            let mut asked = asked;
            asked.sort_by(f32::total_cmp);
            let alphas: Vec<f32> = asked.iter().map(|&predicted| calibration.at(predicted)).collect();
            prop_assert!(alphas.is_sorted() && alphas.iter().all(|alpha| (0.0..=1.0).contains(alpha)), "{:?}", alphas);
        }
    }
}
