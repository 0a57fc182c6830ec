//! One direction of an LSTM layer over all steps.

use sida_model::cpu::{
    lanes::{Kernel, Lanes, run},
    matmul::matmul,
};

use super::transpose;
use crate::{file::matrix, lstm::activation};

/// Over sequences of equal length, all starting from zeros; rows are step by step, then by sequence.
#[derive(Clone, Copy)]
pub(in super::super) struct LstmScan {
    pub(in super::super) sequences: usize,
    pub(in super::super) width: usize,
    pub(in super::super) reverse: bool,
}

/// What a pass forward leaves.
pub(in super::super) struct Scanned {
    /// (rows, width): the result.
    pub(in super::super) hidden: Vec<f32>,
    /// (rows, 4 width): i, f, g, o after activation.
    gates: Vec<f32>,
    /// (rows, width)
    cells: Vec<f32>,
}

impl LstmScan {
    /// gates (rows, 4 width): sums from the input with bias; weights (4 width, width): of the hidden state.
    pub(in super::super) fn forward(&self, mut gates: Vec<f32>, weights: &[f32]) -> Scanned {
        let (width, step_size) = (self.width, self.sequences * self.width);
        let (mut hidden, mut cells) = (vec![0.0; gates.len() / 4], vec![0.0; gates.len() / 4]);
        let (mut state, mut cell) = (vec![0.0; step_size], vec![0.0; step_size]);
        let mut recurrent = vec![0.0; 4 * step_size];
        for step in self.steps(hidden.len()) {
            let first = step * step_size;
            let gates = &mut gates[4 * first..][..4 * step_size];
            matmul(&state, matrix(weights, 4 * width, width), &mut recurrent);
            gates.iter_mut().zip(&recurrent).for_each(|(gate, recurrent)| *gate += recurrent);
            for (sequence, gates) in gates.chunks_exact_mut(4 * width).enumerate() {
                let own = sequence * width..(sequence + 1) * width;
                activation::step(gates, &mut cell[own.clone()], &mut state[own]);
            }
            hidden[first..][..step_size].copy_from_slice(&state);
            cells[first..][..step_size].copy_from_slice(&cell);
        }
        Scanned { hidden, gates, cells }
    }

    /// The gradient of the sums from the input (rows, 4 width), from that of the result (rows, width).
    pub(in super::super) fn backward(
        &self,
        scanned: &Scanned,
        weights: &[f32],
        grad: &[f32],
        grad_weights: &mut [f32],
    ) -> Vec<f32> {
        let (width, step_size) = (self.width, self.sequences * self.width);
        let by_column = transpose(weights, 4 * width, width);
        let mut grad_gates = vec![0.0; scanned.gates.len()];
        let (mut grad_hidden, mut grad_cell) = (vec![0.0; step_size], vec![0.0; step_size]);
        // The hidden state and the cells that each step started from.
        let (mut hidden_before, no_cells) = (vec![0.0; grad.len()], vec![0.0; step_size]);
        let steps: Vec<usize> = self.steps(grad.len()).collect();
        for (n, &step) in steps.iter().enumerate().rev() {
            let first = step * step_size;
            let mut cells_before = &no_cells[..];
            if let Some(before) = n.checked_sub(1).map(|n| steps[n] * step_size) {
                cells_before = &scanned.cells[before..][..step_size];
                hidden_before[first..][..step_size].copy_from_slice(&scanned.hidden[before..][..step_size]);
            }
            grad_hidden.iter_mut().zip(&grad[first..]).for_each(|(sum, grad)| *sum += grad);
            let grad_gates = &mut grad_gates[4 * first..][..4 * step_size];
            run(CellsBackward {
                width,
                gates: &scanned.gates[4 * first..][..4 * step_size],
                cells_before,
                cells: &scanned.cells[first..][..step_size],
                grad_hidden: &grad_hidden,
                grad_cell: &mut grad_cell,
                grad_gates,
            });
            matmul(grad_gates, matrix(&by_column, width, 4 * width), &mut grad_hidden);
        }
        // grad W (4 width, width) = grad_gates^T (4 width, rows) @ hidden_before (rows, width)
        let rows = grad.len() / width;
        let mut of_weights = vec![0.0; weights.len()];
        let hidden_before = transpose(&hidden_before, rows, width);
        matmul(&transpose(&grad_gates, rows, 4 * width), matrix(&hidden_before, width, rows), &mut of_weights);
        grad_weights.iter_mut().zip(&of_weights).for_each(|(sum, part)| *sum += part);
        grad_gates
    }

    /// The steps in the order they are run.
    fn steps(&self, values: usize) -> Box<dyn Iterator<Item = usize>> {
        let steps = 0..values / (self.sequences * self.width);
        if self.reverse { Box::new(steps.rev()) } else { Box::new(steps) }
    }
}

/// One step backwards for all sequences. `grad_cell` comes from the step after and goes to the step before.
struct CellsBackward<'a> {
    width: usize,
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
        let width = self.width;
        for (sequence, (gates, grad_gates)) in
            self.gates.chunks_exact(4 * width).zip(self.grad_gates.chunks_exact_mut(4 * width)).enumerate()
        {
            let own = sequence * width..(sequence + 1) * width;
            let (before, cells) = (&self.cells_before[own.clone()], &self.cells[own.clone()]);
            let (grad_hidden, grad_cell) = (&self.grad_hidden[own.clone()], &mut self.grad_cell[own]);
            let (i, f) = (&gates[..width], &gates[width..2 * width]);
            let (g, o) = (&gates[2 * width..3 * width], &gates[3 * width..4 * width]);
            let (grad_i, rest) = grad_gates.split_at_mut(width);
            let (grad_f, rest) = rest.split_at_mut(width);
            let (grad_g, grad_o) = rest.split_at_mut(width);
            let grad_o = &mut grad_o[..width];
            for at in 0..width {
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

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for reverse in [false, true] {
            let scan = LstmScan { sequences: 3, width: 3, reverse };
            let (gates, weights) = (values(15 * 12, 1), values(12 * 3, 2));
            let loss = |gates: &[f32], weights: &[f32]| distance(&scan.forward(gates.to_vec(), weights).hidden);
            let mut grad_weights = vec![0.0; weights.len()];
            let scanned = scan.forward(gates.clone(), &weights);
            let grad_gates = scan.backward(&scanned, &weights, &loss(&gates, &weights).1, &mut grad_weights);
            check(&gates, &grad_gates, |gates| loss(gates, &weights).0);
            check(&weights, &grad_weights, |weights| loss(&gates, weights).0);
        }
    }
}
