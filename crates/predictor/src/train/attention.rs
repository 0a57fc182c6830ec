//! Sparsemax self-attention in training.

use candle_core::{D, Result, Tensor};

use crate::lstm::sparsemax::sparsemax;

/// outputs (sequences, steps, width): of each, the mean of those that it sees, weighted by the sparsemax of their
/// scaled products. A step sees the last `window` steps, itself among them; `None`: all of its sequence.
pub(super) fn attend(outputs: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let scale = (outputs.dim(2)? as f64).powf(-0.5);
    let scores = (outputs.matmul(&outputs.t()?)? * scale)?; // (sequences, steps, steps)
    let support = support(&scores, window)?;
    // Sparsemax is linear where its support stays the same: the scores of the support less what makes their sum 1.
    let surplus = ((&scores * &support)?.sum_keepdim(D::Minus1)? - 1.0)?;
    let threshold = (surplus / support.sum_keepdim(D::Minus1)?)?;
    (scores.broadcast_sub(&threshold)? * support)?.matmul(outputs)
}

/// 1 where an entry of scores (sequences, steps, steps) has weight, 0 elsewhere: a constant to the gradient. By the
/// kernel that serves.
fn support(scores: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let steps = scores.dim(2)?;
    let mut values: Vec<f32> = scores.flatten_all()?.to_vec1()?;
    for (row, scores) in values.chunks_exact_mut(steps).enumerate() {
        let step = row % steps;
        let seen = window.map_or(0..steps, |window| (step + 1).saturating_sub(window)..step + 1);
        sparsemax(&mut scores[seen.clone()]);
        for (at, value) in scores.iter_mut().enumerate() {
            *value = f32::from(seen.contains(&at) && *value > 0.0);
        }
    }
    Tensor::from_vec(values, scores.shape(), scores.device())
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradient_is_that_of_finite_differences() {
        for window in [None, Some(3)] {
            let outputs = values(&[2, 6, 4], 4);
            check(&[&outputs], || distance(&attend(&outputs, window).unwrap()));
        }
    }

    /// A net would be trained that looks ahead, or further back than its state reaches when it serves.
    #[test]
    fn attends_to_what_is_seen_by_sparsemax() {
        let outputs = values(&[1, 6, 4], 4);
        let rows: Vec<Vec<f32>> = outputs.squeeze(0).unwrap().to_vec2().unwrap();
        let attended: Vec<Vec<f32>> = attend(&outputs, Some(3)).unwrap().squeeze(0).unwrap().to_vec2().unwrap();
        for (step, attended) in attended.iter().enumerate() {
            let seen = &rows[step.saturating_sub(2)..=step];
            let product = |key: &Vec<f32>| key.iter().zip(&rows[step]).map(|(a, b)| a * b).sum::<f32>() * 0.5;
            let mut weights: Vec<f32> = seen.iter().map(product).collect();
            sparsemax(&mut weights);
            for (at, found) in attended.iter().enumerate() {
                let expected: f32 = weights.iter().zip(seen).map(|(weight, key)| weight * key[at]).sum();
                assert!((found - expected).abs() < 1e-5, "step {step}: {found}, not {expected}");
            }
        }
    }
}
