//! The recurrence of an LSTM layer in training: one operation with a gradient of its own, on the kernels that
//! serve. Made of tensor operations, a step is some sixty of them forth and back, and training takes four times as
//! long (docs/decisions/0014).

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use sida_kernels::{
    lanes::{Kernel, Lanes, run},
    matmul::matmul,
};

use crate::{file::matrix, lstm::activation};

/// The hidden state (directions, steps, sequences, side) after each step, all starting from zeros. gates
/// (directions, steps, sequences, 4 side) are the sums from the input with bias, in the order i, f, g, o; weights
/// (directions, 4 side, side) are those of the hidden state.
pub(super) fn recur(gates: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (_, _, sequences, _) = gates.dims4()?;
    let scan = Scan { sequences, side: weights.dim(2)? };
    gates.contiguous()?.apply_op2(&weights.contiguous()?, Recurrence { scan, passed: OnceLock::new() })
}

struct Recurrence {
    scan: Scan,
    /// Of each direction, what the pass forward left.
    passed: OnceLock<Vec<Passed>>,
}

impl CustomOp2 for Recurrence {
    fn name(&self) -> &'static str {
        "lstm-recurrence"
    }

    fn cpu_fwd(
        &self,
        gates: &CpuStorage,
        of_gates: &Layout,
        weights: &CpuStorage,
        of_weights: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gates, weights) = (values_of(gates, of_gates)?, values_of(weights, of_weights)?);
        let (directions, steps, sequences, _) = of_gates.shape().dims4()?;
        let sides = gates.chunks_exact(gates.len() / directions).zip(weights.chunks_exact(weights.len() / directions));
        let (hidden, passed): (Vec<_>, Vec<_>) =
            sides.map(|(gates, weights)| self.scan.forward(gates, weights)).unzip();
        if self.passed.set(passed).is_err() {
            bail!("an operation passes forward once");
        }
        Ok((CpuStorage::F32(hidden.concat()), (directions, steps, sequences, self.scan.side).into()))
    }

    fn bwd(
        &self,
        gates: &Tensor,
        weights: &Tensor,
        hidden: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(passed) = self.passed.get() else { bail!("a pass backward without one forward") };
        let (of_weights, of_hidden) = (weights.flatten(1, 2)?.to_vec2()?, grad.flatten_from(1)?.to_vec2()?);
        let sides = passed.iter().zip(&of_weights).zip(&of_hidden);
        let of_gates: Vec<Vec<f32>> =
            sides.map(|((passed, weights), grad)| self.scan.backward(passed, weights, grad)).collect();
        let of_gates = Tensor::from_vec(of_gates.concat(), gates.shape(), gates.device())?;
        // The state that each step started from: zeros, then that after the step before.
        let before = hidden.detach().pad_with_zeros(1, 1, 0)?.narrow(1, 0, hidden.dim(1)?)?;
        // (directions, 4 side, rows) @ (directions, rows, side)
        let of_weights = of_gates.flatten(1, 2)?.t()?.matmul(&before.flatten(1, 2)?)?;
        Ok((Some(of_gates), Some(of_weights)))
    }
}

/// One direction; rows are step by step, then by sequence.
struct Scan {
    sequences: usize,
    side: usize,
}

/// What a pass forward leaves for the pass backward.
struct Passed {
    /// (rows, 4 side): i, f, g, o after activation.
    gates: Vec<f32>,
    /// (rows, side)
    cells: Vec<f32>,
}

impl Scan {
    /// gates (rows, 4 side), weights (4 side, side) -> hidden (rows, side).
    fn forward(&self, gates: &[f32], weights: &[f32]) -> (Vec<f32>, Passed) {
        let (side, step_size) = (self.side, self.sequences * self.side);
        let mut passed = Passed { gates: gates.to_vec(), cells: Vec::with_capacity(gates.len() / 4) };
        let mut hidden = Vec::with_capacity(gates.len() / 4);
        let (mut state, mut cell) = (vec![0.0; step_size], vec![0.0; step_size]);
        let mut recurrent = vec![0.0; 4 * step_size];
        for gates in passed.gates.chunks_exact_mut(4 * step_size) {
            matmul(&state, matrix(weights, 4 * side, side), &mut recurrent);
            gates.iter_mut().zip(&recurrent).for_each(|(gate, recurrent)| *gate += recurrent);
            for (sequence, gates) in gates.chunks_exact_mut(4 * side).enumerate() {
                let own = sequence * side..(sequence + 1) * side;
                activation::step(gates, &mut cell[own.clone()], &mut state[own]);
            }
            hidden.extend_from_slice(&state);
            passed.cells.extend_from_slice(&cell);
        }
        (hidden, passed)
    }

    /// The gradient of the sums from the input (rows, 4 side), from that of the hidden states (rows, side).
    fn backward(&self, passed: &Passed, weights: &[f32], grad: &[f32]) -> Vec<f32> {
        let (side, step_size) = (self.side, self.sequences * self.side);
        let by_column: Vec<f32> = (0..side).flat_map(|col| weights[col..].iter().step_by(side)).copied().collect(); // (side, 4 side)
        let mut grad_gates = vec![0.0; passed.gates.len()];
        let (mut grad_hidden, mut grad_cell) = (vec![0.0; step_size], vec![0.0; step_size]);
        let before_first = vec![0.0; step_size];
        for first in (0..grad.len()).step_by(step_size).rev() {
            grad_hidden.iter_mut().zip(&grad[first..]).for_each(|(sum, grad)| *sum += grad);
            let grad_gates = &mut grad_gates[4 * first..][..4 * step_size];
            run(CellsBackward {
                side,
                gates: &passed.gates[4 * first..][..4 * step_size],
                cells_before: first.checked_sub(step_size).map_or(&before_first, |before| &passed.cells[before..first]),
                cells: &passed.cells[first..][..step_size],
                grad_hidden: &grad_hidden,
                grad_cell: &mut grad_cell,
                grad_gates,
            });
            matmul(grad_gates, matrix(&by_column, side, 4 * side), &mut grad_hidden);
        }
        grad_gates
    }
}

/// One step backwards for all sequences. `grad_cell` comes from the step after and goes to the step before.
struct CellsBackward<'a> {
    side: usize,
    gates: &'a [f32],
    cells_before: &'a [f32],
    cells: &'a [f32],
    grad_hidden: &'a [f32],
    grad_cell: &'a mut [f32],
    grad_gates: &'a mut [f32],
}

impl Kernel for CellsBackward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let side = self.side;
        for (sequence, (gates, grad_gates)) in
            self.gates.chunks_exact(4 * side).zip(self.grad_gates.chunks_exact_mut(4 * side)).enumerate()
        {
            let own = sequence * side..(sequence + 1) * side;
            let (before, cells) = (&self.cells_before[own.clone()], &self.cells[own.clone()]);
            let (grad_hidden, grad_cell) = (&self.grad_hidden[own.clone()], &mut self.grad_cell[own]);
            let (i, f) = (&gates[..side], &gates[side..2 * side]);
            let (g, o) = (&gates[2 * side..3 * side], &gates[3 * side..4 * side]);
            let (grad_i, rest) = grad_gates.split_at_mut(side);
            let (grad_f, rest) = rest.split_at_mut(side);
            let (grad_g, grad_o) = rest.split_at_mut(side);
            let grad_o = &mut grad_o[..side];
            for at in 0..side {
                let tanh = activation::tanh(cells[at]);
                let through_cell = grad_cell[at] + grad_hidden[at] * o[at] * (1.0 - tanh * tanh);
                grad_i[at] = through_cell * g[at] * i[at] * (1.0 - i[at]);
                grad_f[at] = through_cell * before[at] * f[at] * (1.0 - f[at]);
                grad_g[at] = through_cell * i[at] * (1.0 - g[at] * g[at]);
                grad_o[at] = grad_hidden[at] * tanh * o[at] * (1.0 - o[at]);
                grad_cell[at] = through_cell * f[at];
            }
        }
    }
}

/// The values of a contiguous float32 tensor.
pub(super) fn values_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => bail!("expected contiguous float32 values, found strides {:?}", layout.stride()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::IndexOp;
    use candle_nn::ops::sigmoid;

    use super::{
        super::finite_differences::{check, distance, values},
        *,
    };

    /// The same of tensor operations, whose gradient candle finds.
    fn by_operations(gates: &Tensor, weights: &Tensor) -> Tensor {
        let side = weights.dim(2).unwrap();
        let mut cell = gates.i((.., 0, .., ..side)).unwrap().zeros_like().unwrap();
        let mut hidden = cell.clone();
        let mut outputs = Vec::new();
        for step in 0..gates.dim(1).unwrap() {
            let recurrent = hidden.matmul(&weights.t().unwrap()).unwrap();
            let sums = (gates.i((.., step)).unwrap() + recurrent).unwrap();
            let gate = |n: usize| sums.narrow(2, n * side, side).unwrap();
            let [i, f, o] = [0, 1, 3].map(|n| sigmoid(&gate(n)).unwrap());
            cell = ((f * &cell).unwrap() + (i * gate(2).tanh().unwrap()).unwrap()).unwrap();
            hidden = (o * cell.tanh().unwrap()).unwrap();
            outputs.push(hidden.clone());
        }
        Tensor::stack(&outputs, 1).unwrap()
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Training would go in some other direction than down.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for directions in [1, 2] {
            let (gates, weights) = (values(&[directions, 5, 3, 12], 1), values(&[directions, 12, 3], 2));
            check(&[&gates, &weights], || distance(&recur(&gates, &weights).unwrap()));
        }
    }

    /// A gradient that is written by hand would differ from the automatic one, in any place of any weight.
    #[test]
    fn agrees_with_automatic_gradients() {
        let (gates, weights) = (values(&[2, 9, 5, 64], 1), values(&[2, 64, 16], 2));
        let (found, expected) = (recur(&gates, &weights).unwrap(), by_operations(&gates, &weights));
        let (of_found, of_expected) = (distance(&found).backward().unwrap(), distance(&expected).backward().unwrap());
        let gradients = [&gates, &weights].map(|var| (of_found.get(var).unwrap(), of_expected.get(var).unwrap()));
        for (found, expected) in gradients.into_iter().chain([(&found, &expected)]) {
            for (found, expected) in flat(found).iter().zip(flat(expected)) {
                assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{found}, not {expected}");
            }
        }
    }
}
