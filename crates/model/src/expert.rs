//! One expert: its shape, how its matrices lie in a slot, and its feed-forward. An expert-node runs this on
//! the slots of its slab, the reference on the checkpoint's own bytes.

use crate::{
    cpu::matmul::{MatrixRef, matmul},
    cpu_operations::{gate_rows, relu},
    dtype::StoredDType,
    spec::Activation,
};

/// The shape all experts of a model share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// Width of its input and output.
    pub d_model: usize,
    /// Width between its matrices.
    pub d_ff: usize,
    /// How its weights are stored.
    pub dtype: StoredDType,
    /// What is between its matrices.
    pub activation: Activation,
}

/// Room for what lies between an expert's matrices; kept from call to call.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    hidden: Vec<f32>,
}

impl ExpertShape {
    /// Bytes of one matrix as stored. All of them hold `d_model * d_ff` values.
    pub fn matrix_bytes(&self) -> usize {
        self.dtype.bytes(self.d_model * self.d_ff)
    }

    /// Bytes of one expert as stored: its matrices one after another, input side first.
    pub fn bytes(&self) -> usize {
        self.activation.matrices() * self.matrix_bytes()
    }

    /// Multiplications for one row.
    pub fn macs_per_row(&self) -> usize {
        self.activation.matrices() * self.d_model * self.d_ff
    }

    /// The expert's output for x (n, d_model), into `out` (n, d_model), before the router's factor.
    ///
    /// `weights` are the expert's [`ExpertShape::bytes`]. Panics when a length does not fit: shapes are
    /// checked where experts are loaded and calls are accepted.
    pub fn forward(&self, weights: &[u8], x: &[f32], out: &mut [f32], scratch: &mut ExpertScratch) {
        let rows = x.len() / self.d_model;
        // All that lead to what is between come first, and are multiplied as one.
        let width = (self.activation.matrices() - 1) * self.d_ff;
        let (inputs, output) = weights.split_at(weights.len() - self.matrix_bytes());
        let matrix = |bytes, rows, cols| MatrixRef { bytes, dtype: self.dtype, rows, cols };
        let hidden = &mut scratch.hidden;
        hidden.resize(rows * width, 0.0);
        matmul(x, matrix(inputs, width, self.d_model), hidden); // h = relu(x Wi^T), or silu(x Wg^T) * (x Wu^T)
        match self.activation {
            Activation::Relu => relu(hidden),
            Activation::GatedSilu => gate_rows(hidden, self.d_ff),
        }
        matmul(hidden, matrix(output, self.d_model, self.d_ff), out); // out = h Wo^T
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::dot;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 11.0 - 1.0).collect()
    }

    /// An expert would compute another function than its family's feed-forward.
    #[test]
    fn follows_its_equation() {
        let (d, ff) = (6, 10);
        let x = values(2 * d, 1);
        let [a, b] = [values(ff * d, 2), values(d * ff, 3)];
        let product = |w: &[f32], x: &[f32]| -> Vec<f32> { w.chunks(x.len()).map(|row| dot(x, row)).collect() };
        let shape = ExpertShape { d_model: d, d_ff: ff, dtype: StoredDType::F32, activation: Activation::Relu };
        let weights = bytes(&[&a[..], &b[..]].concat());
        assert_eq!(weights.len(), shape.bytes());
        let mut out = vec![0.0; 2 * d];
        shape.forward(&weights, &x, &mut out, &mut ExpertScratch::default());
        for (x, out) in x.chunks(d).zip(out.chunks(d)) {
            let hidden: Vec<f32> = product(&a, x).into_iter().map(|h| h.max(0.0)).collect();
            for (found, expected) in out.iter().zip(product(&b, &hidden)) {
                assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{found} for {expected}");
            }
        }
    }

    /// The same of a gated expert.
    #[test]
    fn follows_its_gated_equation() {
        let (d, ff) = (5, 4);
        let x = values(3 * d, 1);
        let [gate, up, down] = [values(ff * d, 2), values(ff * d, 3), values(d * ff, 4)];
        let product = |w: &[f32], x: &[f32]| -> Vec<f32> { w.chunks(x.len()).map(|row| dot(x, row)).collect() };
        let shape = ExpertShape { d_model: d, d_ff: ff, dtype: StoredDType::F32, activation: Activation::GatedSilu };
        let weights = bytes(&[&gate[..], &up[..], &down[..]].concat());
        assert_eq!(weights.len(), shape.bytes());
        let mut out = vec![0.0; 3 * d];
        shape.forward(&weights, &x, &mut out, &mut ExpertScratch::default());
        for (x, out) in x.chunks(d).zip(out.chunks(d)) {
            let silu = |x: f32| x / (1.0 + (-x).exp());
            let gates = product(&gate, x).into_iter().map(silu);
            let hidden: Vec<f32> = gates.zip(product(&up, x)).map(|(gate, up)| gate * up).collect();
            for (found, expected) in out.iter().zip(product(&down, &hidden)) {
                assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{found} for {expected}");
            }
        }
    }
}
