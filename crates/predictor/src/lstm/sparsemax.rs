//! Sparsemax (Martins and Astudillo, 2016): like softmax, but unlikely entries become exactly 0.

/// Projects `scores` onto the probability simplex, in place. Empty stays empty.
///
/// Finds the threshold without sorting (Michelot, 1986): take all entries for the support, drop those below
/// the threshold it implies, until none is dropped. Sums run in index order, so the result depends on the
/// scores alone.
pub(crate) fn sparsemax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // No entry of the support is further than 1 below the largest.
    let mut threshold = max - 1.0;
    loop {
        let (mut sum, mut support) = (0.0f32, 0usize);
        for &score in scores.iter().filter(|&&score| score > threshold) {
            sum += score - max;
            support += 1;
        }
        let next = max + (sum - 1.0) / support as f32;
        // Rounding may let it fall back; what it rises by shrinks the support, so this ends.
        if support == 0 || next <= threshold {
            break;
        }
        threshold = next;
    }
    for score in scores {
        *score = (*score - threshold).max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By sorting, as in the paper.
    fn oracle(scores: &[f32]) -> Vec<f32> {
        let mut sorted: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let (mut sum, mut threshold) = (0.0, 0.0);
        for (n, score) in sorted.iter().enumerate() {
            sum += score;
            if 1.0 + (n + 1) as f64 * score > sum {
                threshold = (sum - 1.0) / (n + 1) as f64;
            }
        }
        scores.iter().map(|&score| (f64::from(score) - threshold).max(0.0) as f32).collect()
    }

    proptest! {
        /// Attention would not be a distribution, or not the one that was trained.
        #[test]
        fn is_the_projection(mut scores in proptest::collection::vec(-20.0f32..20.0, 1..80)) {
            let expected = oracle(&scores);
            sparsemax(&mut scores);
            for (found, expected) in scores.iter().zip(&expected) {
                prop_assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
            prop_assert!((scores.iter().sum::<f32>() - 1.0).abs() < 1e-4);
        }
    }

    /// Equal scores, a single score or none would fail.
    #[test]
    fn handles_the_smallest_inputs() {
        let mut equal = [3.0; 4];
        sparsemax(&mut equal);
        assert_eq!(equal, [0.25; 4]);
        let mut one = [-7.0];
        sparsemax(&mut one);
        assert_eq!(one, [1.0]);
        sparsemax(&mut []);
    }
}
