//! Which experts a token goes to: the trained router of a block, its choice, and the capacity that some
//! versions of transformers enforce.

use sida_kernels::{elementwise::add_to, norm::softmax};
use sida_routing::{ExpertId, Routes};

use crate::{Spans, backbone::Router, loader::Host};

impl Router<Host> {
    /// `softmax(x W^T + b)`: x (n, d_model) -> (n, experts), row-major, in float32, over whatever `probabilities` held.
    /// Source: transformers, SwitchTransformersTop1Router.
    pub(crate) fn probabilities(&self, x: &[f32], probabilities: &mut Vec<f32>) {
        self.classifier.product(x, probabilities);
        let experts = self.classifier.outputs();
        if let Some(bias) = &self.bias {
            probabilities.chunks_exact_mut(experts).for_each(|row| add_to(row, bias));
        }
        softmax(probabilities, experts);
    }
}

/// The experts of each token by its probabilities (n, num_experts): the most probable, most probable first,
/// the lower id where two are equal. A row of NaN goes to the first experts. `is_normalised`: their weights add up to 1.
pub fn routes(top_k: usize, is_normalised: bool, probabilities: &[f32], num_experts: usize) -> Routes {
    let tokens = probabilities.len() / num_experts.max(1);
    let top_k = top_k.min(num_experts);
    let mut routes =
        Routes { top_k, experts: Vec::with_capacity(tokens * top_k), weights: Vec::with_capacity(tokens * top_k) };
    for row in probabilities.chunks_exact(num_experts.max(1)) {
        let first = routes.experts.len();
        routes.experts.resize(first + top_k, None);
        routes.weights.resize(first + top_k, 0.0);
        choose_among(row, |_| true, &mut routes.experts[first..], &mut routes.weights[first..]);
        if is_normalised {
            normalise(&mut routes.weights[first..]);
        }
    }
    routes
}

/// Chooses the experts of one token by its `probabilities`, as [`routes`] does, but among those that `permits`
/// allows. Where those are fewer than are to be chosen, the most probable of the others come behind them.
/// The weights are the probabilities of the chosen, over all experts.
pub fn choose_among(
    probabilities: &[f32],
    permits: impl Fn(ExpertId) -> bool,
    experts: &mut [Option<ExpertId>],
    weights: &mut [f32],
) {
    for (at, weight) in weights.iter_mut().enumerate() {
        let (taken, free) = experts.split_at_mut(at);
        let is_free = |expert| !taken.contains(&Some(expert));
        let best = most_probable(probabilities, |expert| is_free(expert) && permits(expert))
            .or_else(|| most_probable(probabilities, is_free));
        free[0] = best;
        *weight = best.map_or(0.0, |best| probabilities[usize::from(best.0)]);
    }
}

/// The weights of a row's experts, divided by their sum.
pub fn normalise(weights: &mut [f32]) {
    let sum: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// The most probable expert that `may_be` chosen, the lowest of equal ones. `None`: no expert may be.
fn most_probable(row: &[f32], may_be: impl Fn(ExpertId) -> bool) -> Option<ExpertId> {
    let mut best: Option<(ExpertId, f32)> = None;
    for (expert, &probability) in row.iter().enumerate() {
        let expert = ExpertId(expert as u16);
        if best.is_none_or(|(_, most)| probability > most) && may_be(expert) {
            best = Some((expert, probability));
        }
    }
    best.map(|(expert, _)| expert)
}

/// Drops what is beyond an expert's capacity: the first `capacity` tokens of each sequence that chose an expert
/// keep it, later ones get nothing from this layer.
/// Source: transformers 4.x and 5.23, SwitchTransformersTop1Router (release 5.17 drops nothing).
pub fn enforce_capacity(routes: &mut Routes, spans: &Spans, capacity: usize) {
    let experts_max = routes.experts.iter().flatten().map(|expert| usize::from(expert.0) + 1).max().unwrap_or(0);
    for span in spans.ranges() {
        let mut taken = vec![0_usize; experts_max];
        for route in &mut routes.experts[span.start * routes.top_k..span.end * routes.top_k] {
            if let Some(expert) = *route {
                let taken = &mut taken[usize::from(expert.0)];
                *taken += 1;
                if *taken > capacity {
                    *route = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use proptest::prelude::*;

    use super::*;

    fn ids(routes: &Routes) -> Vec<Option<u16>> {
        routes.experts.iter().map(|expert| expert.map(|e| e.0)).collect()
    }

    /// Tokens would go to other experts than the router chose, or a NaN would end the process.
    #[test]
    fn takes_the_most_probable() {
        let probabilities = [0.1, 0.6, 0.3, 0.4, 0.2, 0.4];
        let top1 = routes(1, false, &probabilities, 3);
        assert_eq!((ids(&top1), top1.weights), (vec![Some(1), Some(0)], vec![0.6, 0.4]));
        let top2 = routes(2, false, &probabilities, 3);
        assert_eq!(ids(&top2), [Some(1), Some(2), Some(0), Some(2)]);
        assert_eq!(top2.weights, [0.6, 0.3, 0.4, 0.4]);
        assert_eq!(routes(2, true, &[0.5, 0.25, 0.25], 3).weights, [0.5 / 0.75, 0.25 / 0.75]);
        let nan = routes(2, false, &[f32::NAN; 3], 3);
        assert_eq!(ids(&nan), [Some(0), Some(1)]);
    }

    fn chosen(probabilities: &[f32], permitted: &[u16], top_k: usize) -> (Vec<u16>, Vec<f32>) {
        let (mut experts, mut weights) = (vec![None; top_k], vec![0.0; top_k]);
        choose_among(probabilities, |expert| permitted.contains(&expert.0), &mut experts, &mut weights);
        (experts.into_iter().map(|expert| expert.expect("one is chosen").0).collect(), weights)
    }

    #[test]
    fn the_best_of_those_that_are_permitted() {
        // Would break: a guided token goes to an expert that nobody planned, or is scaled as if there were no others.
        let row = [0.1, 0.4, 0.2, 0.3];
        assert_eq!(chosen(&row, &[0, 2, 3], 1), (vec![3], vec![0.3]));
        assert_eq!(chosen(&row, &[0], 1), (vec![0], vec![0.1]));
        assert_eq!(chosen(&row, &[0, 2, 3], 2), (vec![3, 2], vec![0.3, 0.2]));
        // Would break: of two equal ones another is taken than the router takes.
        assert_eq!(chosen(&[0.1, 0.3, 0.3, 0.3], &[2, 3], 1), (vec![2], vec![0.3]));
        // Would break: a token gets fewer experts than the model gives it, because a plan is too short.
        assert_eq!(chosen(&row, &[0], 3), (vec![0, 1, 3], vec![0.1, 0.4, 0.3]));
        assert_eq!(chosen(&row, &[], 1), (vec![1], vec![0.4]));
        // Would break: what is not a number leaves the permitted ones.
        assert_eq!(chosen(&[f32::NAN; 4], &[2, 3], 1).0, [2]);
    }

    proptest! {
        #[test]
        fn never_an_expert_outside(
            row in prop::collection::vec((0..6_u8).prop_map(|tenths| f32::from(tenths) / 10.0), 1..9),
            mask in any::<u8>(),
            top_k in 1_usize..4,
        ) {
            // Would break: an expert outside is chosen while one inside is free, one is chosen twice, or a better one
            // inside is passed over. Probabilities of few values make many equal.
            let all: Vec<u16> = (0..row.len() as u16).collect();
            let permitted: Vec<u16> = all.iter().copied().filter(|expert| mask >> expert & 1 == 1).collect();
            let top_k = top_k.min(row.len());
            let (experts, weights) = chosen(&row, &permitted, top_k);
            let mut expected = all.clone();
            let outside_then_unlikely = |expert: &u16| (!permitted.contains(expert), Reverse(tenths(row[usize::from(*expert)])));
            expected.sort_by_key(outside_then_unlikely);
            expected.truncate(top_k);
            prop_assert_eq!(&experts, &expected);
            let probabilities: Vec<f32> = experts.iter().map(|&expert| row[usize::from(expert)]).collect();
            prop_assert_eq!(weights, probabilities);
            // All permitted: the router's own choice.
            let own = routes(top_k, false, &row, row.len());
            let (experts, weights) = chosen(&row, &all, top_k);
            prop_assert_eq!(experts.into_iter().map(Some).collect::<Vec<_>>(), ids(&own));
            prop_assert_eq!(weights, own.weights);
        }
    }

    fn tenths(probability: f32) -> u8 {
        (probability * 10.0).round() as u8
    }

    /// Tokens would be dropped for what other sequences chose, or the wrong ones would be.
    #[test]
    fn capacity_counts_within_a_sequence() {
        let mut routes =
            Routes { top_k: 1, experts: [3, 3, 0, 3, 3].map(|e| Some(ExpertId(e))).to_vec(), weights: vec![1.0; 5] };
        enforce_capacity(&mut routes, &Spans::new([4, 1]), 2);
        assert_eq!(ids(&routes), [Some(3), Some(3), Some(0), None, Some(3)]);
        enforce_capacity(&mut routes, &Spans::new([4, 1]), 0);
        assert_eq!(ids(&routes), [None; 5]);
    }
}
