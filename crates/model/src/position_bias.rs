//! T5's relative position bias: what a head adds to a score for the distance between key and query. Kept by
//! the first block of a stack and shared by all of them.

use crate::{Checkpoint, ModelError, Stack, cpu::lanes::LANES, names, spec::RelativeBias};

/// A stack's bias for every distance.
#[derive(Debug)]
pub struct PositionBias {
    /// (heads, 2 * reach + 1): the bias of key - query from -reach to reach. Beyond, all distances share a
    /// bucket, so the ends hold for everything farther away.
    by_distance: Vec<f32>,
    reach: usize,
}

impl PositionBias {
    /// Reads a stack's bias.
    pub fn load(checkpoint: &Checkpoint, stack: Stack, spec: RelativeBias) -> Result<Self, ModelError> {
        let RelativeBias { buckets, max_distance: reach, is_bidirectional } = spec;
        let heads = checkpoint.config().num_heads;
        let table = checkpoint.tensor_of_shape(&names::position_bias(stack), &[buckets, heads])?;
        let table = table.dtype.widen(table.bytes); // (buckets, heads)
        let bucket_of: Vec<usize> = (-(reach as i64)..=reach as i64)
            .map(|distance| bucket(distance, is_bidirectional, buckets, reach))
            .collect();
        let by_distance = (0..heads)
            .flat_map(|head| bucket_of.iter().map(move |bucket| (bucket, head)))
            .map(|(b, h)| table[b * heads + h]);
        Ok(Self { by_distance: by_distance.collect(), reach })
    }

    /// (heads, 2 * max_distance + 1): the bias of key - query, as the device's kernels take it.
    #[cfg(feature = "cuda")]
    pub(crate) fn by_distance(&self) -> &[f32] {
        &self.by_distance
    }

    /// Adds one head's bias to the scores of one query, which is at `position`, with keys 0, 1, 2, ...
    #[inline(always)]
    pub(crate) fn add_to(&self, head: usize, position: usize, scores: &mut [f32]) {
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

/// The bucket of a distance (key - query): small distances have their own, larger ones share
/// logarithmically wider ones up to `max_distance`. A causal stack has no keys ahead.
/// Source: transformers, SwitchTransformersAttention._relative_position_bucket, whose arithmetic is float32.
fn bucket(distance: i64, bidirectional: bool, buckets: usize, max_distance: usize) -> usize {
    let (buckets, first, steps) = if bidirectional {
        (buckets / 2, if distance > 0 { buckets / 2 } else { 0 }, distance.unsigned_abs() as usize)
    } else {
        (buckets, 0, (-distance).max(0) as usize)
    };
    let exact = buckets / 2;
    if steps < exact {
        return first + steps;
    }
    // The logarithm is taken in float64 and rounded, so that it does not depend on the C library.
    let log = |x: f32| f64::from(x).ln() as f32;
    let share = log(steps as f32 / exact as f32) / ((max_distance as f64 / exact as f64).ln() as f32);
    first + (exact + (share * (buckets - exact) as f32) as usize).min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every attention score of the model would be biased by the wrong entry.
    #[test]
    fn buckets_are_those_of_t5() {
        let encoder: Vec<usize> = [0, -1, 1, -7, -8, -15, -16, 16, -31, -32, -64, -127, -128, 128, 9000]
            .iter()
            .map(|&distance| bucket(distance, true, 32, 128))
            .collect();
        assert_eq!(encoder, [0, 1, 17, 7, 8, 9, 10, 26, 11, 12, 14, 15, 15, 31, 31]);
        let decoder: Vec<usize> = [0, 1, -1, -15, -16, -20, -32, -64, -127, -128, -5000]
            .iter()
            .map(|&distance| bucket(distance, false, 32, 128))
            .collect();
        assert_eq!(decoder, [0, 0, 1, 15, 16, 17, 21, 26, 31, 31, 31]);
    }

    /// A key far from its query would get the bias of another distance.
    #[test]
    fn adds_the_bias_of_each_distance() {
        let reach = 3;
        let by_distance: Vec<f32> =
            (0..2).flat_map(|head| (0..7).map(move |d| (head * 100 + d) as f32 - 3.0)).collect();
        let bias = PositionBias { by_distance, reach };
        for position in 0..12 {
            for keys in 0..14 {
                let mut scores = vec![0.0; keys];
                bias.add_to(1, position, &mut scores);
                let expected: Vec<f32> =
                    (0..keys as i64).map(|key| 100.0 + (key - position as i64).clamp(-3, 3) as f32).collect();
                assert_eq!(scores, expected, "position {position}");
            }
        }
    }
}
