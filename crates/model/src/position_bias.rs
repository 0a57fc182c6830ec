//! Reads T5's relative position bias: what a head adds to a score for the distance between key and query. Kept by
//! the first block of a stack and shared by all of them.

use sida_kernels::position_bias::PositionBias;

use crate::{Checkpoint, ModelError, Stack, names, spec::RelativeBias};

/// Reads a stack's bias.
pub fn load(checkpoint: &Checkpoint, stack: Stack, spec: RelativeBias) -> Result<PositionBias, ModelError> {
    let RelativeBias { buckets, max_distance: reach, is_bidirectional } = spec;
    let heads = checkpoint.config().num_heads;
    let table = checkpoint.tensor_of_shape(&names::position_bias(stack), &[buckets, heads])?;
    let table = table.dtype.widen(table.bytes); // (buckets, heads)
    let bucket_of: Vec<usize> =
        (-(reach as i64)..=reach as i64).map(|distance| bucket(distance, is_bidirectional, buckets, reach)).collect();
    let by_distance = (0..heads)
        .flat_map(|head| bucket_of.iter().map(move |bucket| (bucket, head)))
        .map(|(b, h)| table[b * heads + h]);
    Ok(PositionBias::new(by_distance.collect(), reach))
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
}
