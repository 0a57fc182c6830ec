//! T5's relative position bias: what a head adds to a score for the distance between key and query.

use crate::lanes::LANES;

/// A stack's bias for every distance.
#[derive(Debug)]
pub struct PositionBias {
    /// (heads, 2 * reach + 1): the bias of key - query from -reach to reach. Beyond, all distances share a
    /// bucket, so the ends hold for everything farther away.
    by_distance: Vec<f32>,
    reach: usize,
}

impl PositionBias {
    /// Of biases (heads, 2 * reach + 1), of key - query from -reach to reach. Panics unless these are whole rows.
    pub fn new(by_distance: Vec<f32>, reach: usize) -> Self {
        assert!(by_distance.len().is_multiple_of(2 * reach + 1), "a bias for each distance of each head");
        Self { by_distance, reach }
    }

    /// (heads, 2 * max_distance + 1): the bias of key - query, as another device's kernels take it.
    pub fn by_distance(&self) -> &[f32] {
        &self.by_distance
    }

    /// Adds one head's bias to the scores of one query, which is at `position`, with keys 0, 1, 2, ...
    #[inline(always)]
    pub fn add_to(&self, head: usize, position: usize, scores: &mut [f32]) {
        let width = 2 * self.reach + 1;
        let bias = &self.by_distance[head * width..][..width];
        let near = position.saturating_sub(self.reach).min(scores.len());
        let far = (position + self.reach + 1).min(scores.len());
        let (before, rest) = scores.split_at_mut(near);
        let (within, beyond) = rest.split_at_mut(far - near);
        let first = (near + self.reach).saturating_sub(position);
        before.iter_mut().for_each(|score| *score += bias[0]);
        let (whole, rest) = within.as_chunks_mut::<LANES>();
        let (whole_bias, rest_bias) = bias[first..first + far - near].as_chunks::<LANES>();
        for (scores, bias) in whole.iter_mut().zip(whole_bias) {
            scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        }
        rest.iter_mut().zip(rest_bias).for_each(|(score, bias)| *score += bias);
        beyond.iter_mut().for_each(|score| *score += bias[width - 1]);
    }
}
