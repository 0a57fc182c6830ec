//! Linear layers.

use sida_model::cpu::matmul::matmul;

use super::transpose;
use crate::file::matrix;

/// `x W^T + b`: x (n, inputs), W (b.len(), inputs) -> (n, b.len()). An empty b stands for none; then
/// `outputs` says how many.
pub(in super::super) fn linear(x: &[f32], weights: &[f32], bias: &[f32], outputs: usize) -> Vec<f32> {
    let inputs = weights.len() / outputs;
    let mut out = vec![0.0; x.len() / inputs * outputs];
    matmul(x, matrix(weights, outputs, inputs), &mut out);
    if !bias.is_empty() {
        out.chunks_exact_mut(outputs).for_each(|row| row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias));
    }
    out
}

/// The gradient of x, from that of the result (n, outputs).
pub(in super::super) fn linear_backward(
    x: &[f32],
    weights: &[f32],
    grad: &[f32],
    outputs: usize,
    grad_weights: &mut [f32],
    grad_bias: &mut [f32],
) -> Vec<f32> {
    let inputs = weights.len() / outputs;
    let n = x.len() / inputs;
    // grad W (outputs, inputs) = grad^T (outputs, n) @ x (n, inputs)
    let mut of_weights = vec![0.0; weights.len()];
    let x_by_column = transpose(x, n, inputs);
    matmul(&transpose(grad, n, outputs), matrix(&x_by_column, inputs, n), &mut of_weights);
    grad_weights.iter_mut().zip(&of_weights).for_each(|(sum, part)| *sum += part);
    if !grad_bias.is_empty() {
        let rows = grad.chunks_exact(outputs);
        rows.for_each(|row| grad_bias.iter_mut().zip(row).for_each(|(sum, part)| *sum += part));
    }
    // grad x (n, inputs) = grad (n, outputs) @ W (outputs, inputs)
    let mut grad_x = vec![0.0; x.len()];
    let by_column = transpose(weights, outputs, inputs);
    matmul(grad, matrix(&by_column, inputs, outputs), &mut grad_x);
    grad_x
}

/// Zeroes the gradient where ReLU's result is 0.
pub(in super::super) fn relu_backward(result: &[f32], grad: &mut [f32]) {
    grad.iter_mut().zip(result).filter(|&(_, &value)| value <= 0.0).for_each(|(grad, _)| *grad = 0.0);
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (x, weights, bias) = (values(19 * 5, 1), values(3 * 5, 2), values(3, 3));
        let loss = |x: &[f32], weights: &[f32], bias: &[f32]| distance(&linear(x, weights, bias, 3));
        let (mut grad_weights, mut grad_bias) = (vec![0.0; 15], vec![0.0; 3]);
        let grad = loss(&x, &weights, &bias).1;
        let grad_x = linear_backward(&x, &weights, &grad, 3, &mut grad_weights, &mut grad_bias);
        check(&x, &grad_x, |x| loss(x, &weights, &bias).0);
        check(&weights, &grad_weights, |weights| loss(&x, weights, &bias).0);
        check(&bias, &grad_bias, |bias| loss(&x, &weights, bias).0);
    }
}
