//! Which experts a token goes to: the trained router of a block, its choice, and the capacity that some
//! versions of transformers enforce.

use sida_routing::{ExpertId, Routes};

use crate::{Spans, backbone::Router, cpu::norm::softmax, cpu_operations::add_to, loader::Host};

impl Router<Host> {
    /// `softmax(x W^T + b)`: x (n, d_model) -> (n, experts), row-major, in float32, over whatever `probabilities` held.
    /// Source: transformers, SwitchTransformersTop1Router.
    pub(crate) fn probabilities(&self, x: &[f32], probabilities: &mut Vec<f32>) {
        self.classifier.product(x, probabilities);
        let experts = self.classifier.matrix().rows;
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
        for _ in 0..top_k {
            let taken = &routes.experts[first..];
            let best = most_probable(row, |expert| taken.contains(&Some(expert)));
            routes.experts.push(Some(best));
            routes.weights.push(row[usize::from(best.0)]);
        }
        if is_normalised {
            normalise(&mut routes.weights[first..]);
        }
    }
    routes
}

/// The weights of a row's experts, divided by their sum.
pub fn normalise(weights: &mut [f32]) {
    let sum: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

fn most_probable(row: &[f32], is_taken: impl Fn(ExpertId) -> bool) -> ExpertId {
    let mut best: Option<(usize, f32)> = None;
    for (expert, &probability) in row.iter().enumerate() {
        let better = best.is_none_or(|(_, most)| probability > most);
        if better && !is_taken(ExpertId(expert as u16)) {
            best = Some((expert, probability));
        }
    }
    ExpertId(best.map_or(0, |(expert, _)| expert) as u16)
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
