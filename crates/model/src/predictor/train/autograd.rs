//! The two operations of the net that candle has no gradient for: an LSTM over all steps at once, and
//! sparsemax. An LSTM of single tensor operations would issue a dozen small ones per step, and the gradient
//! of each slice of its input would be a tensor of the whole input's size. Here both directions of time are
//! plain loops over the kernels that inference uses, so training sees what serving will compute.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::super::{
    file::Matrix,
    lstm::{activation, sparsemax::sparsemax},
};
use crate::{cpu::matmul::matmul, tensor_rows::rows};

/// One direction of an LSTM layer over `sequences` sequences of equal length, all starting from zeros.
/// Arguments: sums from the input with bias (steps x sequences, 4 width), step by step; hidden weights
/// (4 width, width). Result: hidden states (steps x sequences, width).
pub(super) struct LstmScan {
    pub(super) sequences: usize,
    pub(super) reverse: bool,
    /// What the gradient needs, left by the forward pass.
    pub(super) trace: Mutex<Option<Trace>>,
}

/// Activations of one forward pass, row by row like the result.
pub(super) struct Trace {
    /// (rows, 4 width): i, f, g, o after activation.
    gates: Vec<f32>,
    /// (rows, width)
    cells: Vec<f32>,
}

impl LstmScan {
    /// The steps in the order they are run.
    fn steps(&self, rows: usize) -> Vec<usize> {
        let steps = 0..rows / self.sequences;
        if self.reverse { steps.rev().collect() } else { steps.collect() }
    }

    /// Runs all steps; gates (rows, 4 width) are sums from the input and become activations.
    fn forward(&self, mut gates: Vec<f32>, weights: &Matrix) -> (Vec<f32>, Trace) {
        let (width, batch) = (weights.cols, self.sequences);
        let rows = gates.len() / (4 * width);
        let (mut hidden, mut cells) = (vec![0.0; rows * width], vec![0.0; rows * width]);
        let (mut state, mut cell) = (vec![0.0; batch * width], vec![0.0; batch * width]);
        let mut recurrent = vec![0.0; batch * 4 * width];
        for step in self.steps(rows) {
            let (first, rows) = (step * batch * width, batch * width);
            let gates = &mut gates[4 * first..][..4 * rows];
            matmul(&state, weights.by_ref(), &mut recurrent);
            gates.iter_mut().zip(&recurrent).for_each(|(gate, recurrent)| *gate += recurrent);
            for (sequence, gates) in gates.chunks_exact_mut(4 * width).enumerate() {
                let own = sequence * width..(sequence + 1) * width;
                activation::step(gates, &mut cell[own.clone()], &mut state[own]);
            }
            hidden[first..][..rows].copy_from_slice(&state);
            cells[first..][..rows].copy_from_slice(&cell);
        }
        (hidden, Trace { gates, cells })
    }

    /// Gradients of both arguments from that of the result.
    fn backward(&self, trace: &Trace, hidden: &[f32], weights: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (batch, width) = (self.sequences, width(weights));
        let rows = grad.len() / width;
        let transposed = Matrix::new(&transpose(weights, 4 * width, width), width, 4 * width);
        let mut grad_gates = vec![0.0; rows * 4 * width];
        let (mut grad_hidden, mut grad_cell) = (vec![0.0; batch * width], vec![0.0; batch * width]);
        // The state that each step started from.
        let mut before = vec![0.0; rows * width];
        let steps = self.steps(rows);
        for (n, &step) in steps.iter().enumerate().rev() {
            let first = step * batch * width;
            let previous = n.checked_sub(1).map(|n| steps[n] * batch * width);
            let zeros = vec![0.0; batch * width];
            let cells_before = previous.map_or(&zeros[..], |previous| &trace.cells[previous..][..batch * width]);
            if let Some(previous) = previous {
                before[first..][..batch * width].copy_from_slice(&hidden[previous..][..batch * width]);
            }
            grad_hidden.iter_mut().zip(&grad[first..]).for_each(|(sum, grad)| *sum += grad);
            let grad_gates = &mut grad_gates[4 * first..][..4 * batch * width];
            for sequence in 0..batch {
                let own = sequence * width..(sequence + 1) * width;
                cell_backward(
                    &trace.gates[4 * (first + own.start)..][..4 * width],
                    (&cells_before[own.clone()], &trace.cells[first + own.start..][..width]),
                    &grad_hidden[own.clone()],
                    &mut grad_cell[own.clone()],
                    &mut grad_gates[4 * own.start..][..4 * width],
                );
            }
            matmul(grad_gates, transposed.by_ref(), &mut grad_hidden);
        }
        // grad W (4 width, width) = grad_gates^T (4 width, rows) @ before (rows, width)
        let mut grad_weights = vec![0.0; weights.len()];
        let before = Matrix::new(&transpose(&before, rows, width), width, rows);
        matmul(&transpose(&grad_gates, rows, 4 * width), before.by_ref(), &mut grad_weights);
        (grad_gates, grad_weights)
    }
}

/// Of an LSTM with these hidden weights (4 width, width).
fn width(weights: &[f32]) -> usize {
    (weights.len() / 4).isqrt()
}

/// One sequence's step backwards. `grad_cell` comes from the step after and goes to the step before.
fn cell_backward(
    gates: &[f32],
    (before, after): (&[f32], &[f32]),
    grad_hidden: &[f32],
    grad_cell: &mut [f32],
    grad_gates: &mut [f32],
) {
    let width = before.len();
    for at in 0..width {
        let [i, f, g, o] = std::array::from_fn(|gate| gates[gate * width + at]);
        let tanh = activation::tanh(after[at]);
        let through_cell = grad_cell[at] + grad_hidden[at] * o * (1.0 - tanh * tanh);
        grad_gates[at] = through_cell * g * i * (1.0 - i);
        grad_gates[width + at] = through_cell * before[at] * f * (1.0 - f);
        grad_gates[2 * width + at] = through_cell * i * (1.0 - g * g);
        grad_gates[3 * width + at] = grad_hidden[at] * tanh * o * (1.0 - o);
        grad_cell[at] = through_cell * f;
    }
}

/// (rows, cols) -> (cols, rows)
fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(cols).enumerate() {
        for (col, &value) in values.iter().enumerate() {
            out[col * rows + row] = value;
        }
    }
    out
}

/// A contiguous argument's values.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("float32 expected") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("contiguous values expected"),
    }
}

impl CustomOp2 for LstmScan {
    fn name(&self) -> &'static str {
        "lstm-scan"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gates, weights) = (values(s1, l1)?, values(s2, l2)?);
        let width = width(weights);
        let weights = Matrix::new(weights, 4 * width, width);
        let (hidden, trace) = self.forward(gates.to_vec(), &weights);
        *self.trace.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(trace);
        let shape = Shape::from((hidden.len() / width, width));
        Ok((CpuStorage::F32(hidden), shape))
    }

    fn bwd(
        &self,
        gates: &Tensor,
        weights: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let trace = self.trace.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let Some(trace) = trace else { bail!("the forward pass left no trace") };
        let weight_values = weights.flatten_all()?.to_vec1::<f32>()?;
        let grad = grad.contiguous()?;
        let (grad_gates, grad_weights) =
            rows(result, |hidden| rows(&grad, |grad| self.backward(&trace, hidden, &weight_values, grad)))??;
        let to_tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((to_tensor(grad_gates, gates)?, to_tensor(grad_weights, weights)?))
    }
}

/// Sparsemax of each row of the last dimension.
pub(super) struct SparsemaxRows;

impl CustomOp1 for SparsemaxRows {
    fn name(&self) -> &'static str {
        "sparsemax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = values(storage, layout)?.to_vec();
        let width = layout.dims().last().copied().unwrap_or(1).max(1);
        out.chunks_exact_mut(width).for_each(sparsemax);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    /// Within the support the gradient loses its mean; outside it is 0.
    fn bwd(&self, _scores: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = result.dims().last().copied().unwrap_or(1).max(1);
        let result_values = result.flatten_all()?.to_vec1::<f32>()?;
        let mut grads = grad.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        for (grads, weights) in grads.chunks_exact_mut(width).zip(result_values.chunks_exact(width)) {
            let (mut sum, mut support) = (0.0, 0.0f32);
            for (grad, _) in grads.iter().zip(weights).filter(|&(_, &weight)| weight > 0.0) {
                sum += grad;
                support += 1.0;
            }
            let mean = sum / support.max(1.0);
            for (grad, &weight) in grads.iter_mut().zip(weights) {
                *grad = if weight > 0.0 { *grad - mean } else { 0.0 };
            }
        }
        Tensor::from_vec(grads, result.shape(), result.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn var(values: usize, shape: (usize, usize), seed: usize) -> Var {
        let value = |i: usize| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0;
        Var::from_vec((0..values).map(value).collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
    }

    /// Compares the gradient of `loss` with finite differences in a few places of `var`.
    fn check(var: &Var, loss: &dyn Fn() -> Tensor) {
        let grads = loss().backward().unwrap();
        let grad = grads.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let start = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for at in (0..start.len()).step_by(start.len() / 7) {
            let shifted = |by: f32| {
                let mut values = start.clone();
                values[at] += by;
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                let value = loss().to_scalar::<f32>().unwrap();
                var.set(&Tensor::from_vec(start.clone(), var.shape(), &Device::Cpu).unwrap()).unwrap();
                value
            };
            let expected = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
            assert!((grad[at] - expected).abs() < 2e-3, "at {at}: {} instead of {expected}", grad[at]);
        }
    }

    /// Training would go in some other direction than down.
    #[test]
    fn lstm_gradients_are_those_of_finite_differences() {
        for reverse in [false, true] {
            let (gates, weights) = (var(15 * 12, (15, 12), 1), var(12 * 3, (12, 3), 2));
            let target = var(15 * 3, (15, 3), 3);
            let loss = || {
                let scan = LstmScan { sequences: 3, reverse, trace: Mutex::new(None) };
                let hidden = gates.as_tensor().apply_op2(weights.as_tensor(), scan).unwrap();
                (hidden - target.as_tensor()).unwrap().sqr().unwrap().mean_all().unwrap()
            };
            check(&gates, &loss);
            check(&weights, &loss);
        }
    }

    /// As above.
    #[test]
    fn sparsemax_gradients_are_those_of_finite_differences() {
        let (scores, target) = (var(28, (4, 7), 4), var(28, (4, 7), 5));
        let loss = || {
            let weights = scores.as_tensor().apply_op1(SparsemaxRows).unwrap();
            (weights - target.as_tensor()).unwrap().sqr().unwrap().mean_all().unwrap()
        };
        check(&scores, &loss);
    }
}
