//! Sparsemax self-attention of sequences of one length.

use std::ops::Range;

use sida_model::cpu::matmul::matmul;

use super::transpose;
use crate::{file::matrix, lstm::sparsemax::sparsemax};

/// Over outputs (sequences x steps, width), sequence by sequence: the mean of those that each one sees,
/// weighted by the sparsemax of their scaled products.
#[derive(Clone, Copy)]
pub(in super::super) struct Attention {
    pub(in super::super) steps: usize,
    pub(in super::super) width: usize,
    /// How many steps a step sees, itself the last; `None`: all of its sequence.
    pub(in super::super) window: Option<usize>,
}

impl Attention {
    fn seen(&self, step: usize) -> Range<usize> {
        match self.window {
            Some(window) => (step + 1).saturating_sub(window)..step + 1,
            None => 0..self.steps,
        }
    }

    /// Weights (steps, steps) of one sequence, 0 where a step is not seen.
    fn weights(&self, outputs: &[f32]) -> Vec<f32> {
        let scale = (self.width as f32).powf(-0.5);
        let mut scores = vec![0.0; self.steps * self.steps];
        matmul(outputs, matrix(outputs, self.steps, self.width), &mut scores); // (steps, width) @ outputs^T -> (steps, steps)
        for (step, row) in scores.chunks_exact_mut(self.steps).enumerate() {
            let seen = self.seen(step);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            row[seen.clone()].iter_mut().for_each(|score| *score *= scale);
            sparsemax(&mut row[seen]);
        }
        scores
    }

    pub(in super::super) fn forward(&self, outputs: &[f32]) -> Vec<f32> {
        let (steps, width) = (self.steps, self.width);
        let mut attended = vec![0.0; outputs.len()];
        for (outputs, attended) in outputs.chunks_exact(steps * width).zip(attended.chunks_exact_mut(steps * width)) {
            let by_column = transpose(outputs, steps, width);
            // (steps, steps) @ outputs -> (steps, width)
            matmul(&self.weights(outputs), matrix(&by_column, width, steps), attended);
        }
        attended
    }

    /// With A the weights, O the outputs, G the gradient of A O: `A^T G + s (D + D^T) O`, where s is the scale
    /// of the scores and D the gradient of the scores, `G O^T` less its mean over each row's support.
    pub(in super::super) fn backward(&self, outputs: &[f32], grad: &[f32]) -> Vec<f32> {
        let (steps, width) = (self.steps, self.width);
        let (size, scale) = (steps * width, (width as f32).powf(-0.5));
        let mut grad_outputs = vec![0.0; outputs.len()];
        let (mut scores, mut through_scores) = (vec![0.0; steps * steps], vec![0.0; size]);
        for ((outputs, grad), sum) in
            outputs.chunks_exact(size).zip(grad.chunks_exact(size)).zip(grad_outputs.chunks_exact_mut(size))
        {
            let weights = self.weights(outputs);
            let grad_by_column = transpose(grad, steps, width);
            matmul(&transpose(&weights, steps, steps), matrix(&grad_by_column, width, steps), sum);
            matmul(grad, matrix(outputs, steps, width), &mut scores);
            scores.chunks_exact_mut(steps).zip(weights.chunks_exact(steps)).for_each(|(g, w)| sparsemax_backward(g, w));
            let both: Vec<f32> = scores.iter().zip(transpose(&scores, steps, steps)).map(|(a, b)| a + b).collect();
            let by_column = transpose(outputs, steps, width);
            matmul(&both, matrix(&by_column, width, steps), &mut through_scores);
            sum.iter_mut().zip(&through_scores).for_each(|(sum, part)| *sum += scale * part);
        }
        grad_outputs
    }
}

/// Turns the gradient of sparsemax's result into that of its scores: within the support it loses its mean,
/// outside it is 0.
fn sparsemax_backward(grad: &mut [f32], weights: &[f32]) {
    let (mut sum, mut support) = (0.0, 0.0f32);
    for (grad, _) in grad.iter().zip(weights).filter(|&(_, &weight)| weight > 0.0) {
        sum += grad;
        support += 1.0;
    }
    let mean = sum / support.max(1.0);
    for (grad, &weight) in grad.iter_mut().zip(weights) {
        *grad = if weight > 0.0 { *grad - mean } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradient_is_that_of_finite_differences() {
        for window in [None, Some(3)] {
            let attention = Attention { steps: 6, width: 4, window };
            let outputs = values(2 * 6 * 4, 4);
            let loss = |outputs: &[f32]| distance(&attention.forward(outputs));
            check(&outputs, &attention.backward(&outputs, &loss(&outputs).1), |outputs| loss(outputs).0);
        }
    }
}
