//! One expert: its shape, how its matrices lie in a slot, and its feed-forward. An expert-node runs this on
//! the slots of its slab, the reference on the checkpoint's own bytes.

use sida_kernels::{
    StoredDType,
    elementwise::{gate_rows, relu},
    matmul::{MatrixRef, matmul},
};

use crate::spec::Activation;

/// What an expert looks like in a slot. All of a model have the same widths; how they are stored may differ by layer, and
/// between the matrices that lead in and the one that leads out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// Width of its input and output.
    pub d_model: usize,
    /// Width between its matrices.
    pub d_ff: usize,
    /// How the matrices are stored that lead to what is between.
    pub dtype: StoredDType,
    /// How the last matrix is stored, which leads back.
    pub output_dtype: StoredDType,
    /// What is between its matrices.
    pub activation: Activation,
}

/// Room for what lies between an expert's matrices; kept from call to call.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    hidden: Vec<f32>,
}

impl ExpertShape {
    /// The same with all weights stored so.
    pub fn in_dtype(self, dtype: StoredDType) -> Self {
        Self { dtype, output_dtype: dtype, ..self }
    }

    /// How all of its weights are stored, if that is one way.
    pub fn one_dtype(&self) -> Option<StoredDType> {
        (self.dtype == self.output_dtype).then_some(self.dtype)
    }

    /// Bytes of one of the matrices that lead in. All matrices hold `d_model * d_ff` values.
    pub fn matrix_bytes(&self) -> usize {
        self.dtype.bytes(self.d_model * self.d_ff)
    }

    /// Bytes of the matrices that lead in: where the last one begins.
    pub fn input_bytes(&self) -> usize {
        (self.activation.matrices() - 1) * self.matrix_bytes()
    }

    /// Bytes of one expert as stored: its matrices one after another, input side first.
    pub fn bytes(&self) -> usize {
        self.input_bytes() + self.output_dtype.bytes(self.d_model * self.d_ff)
    }

    /// All its weights as float32, from bytes that begin with them.
    pub fn widen(&self, weights: &[u8]) -> Vec<f32> {
        let (inputs, output) = weights[..self.bytes()].split_at(self.input_bytes());
        let mut values = self.dtype.widen(inputs);
        self.output_dtype.widen_into(output, &mut values);
        values
    }

    /// Multiplications for one row.
    pub fn macs_per_row(&self) -> usize {
        self.activation.matrices() * self.d_model * self.d_ff
    }

    /// The expert's output for x (n, d_model), into `out` (n, d_model), before the router's factor.
    ///
    /// `weights` begin with the expert's [`ExpertShape::bytes`]: a slot may have room for a larger one. Panics when a length does
    /// not fit: shapes are checked where experts are loaded and calls are accepted.
    pub fn forward(&self, weights: &[u8], x: &[f32], out: &mut [f32], scratch: &mut ExpertScratch) {
        let rows = x.len() / self.d_model;
        // All that lead to what is between come first, and are multiplied as one.
        let width = (self.activation.matrices() - 1) * self.d_ff;
        let (inputs, output) = weights[..self.bytes()].split_at(self.input_bytes());
        let hidden = &mut scratch.hidden;
        hidden.resize(rows * width, 0.0);
        let inputs = MatrixRef { bytes: inputs, dtype: self.dtype, rows: width, cols: self.d_model };
        matmul(x, inputs, hidden); // h = relu(x Wi^T), or silu(x Wg^T) * (x Wu^T)
        match self.activation {
            Activation::Relu => relu(hidden),
            Activation::GatedSilu => gate_rows(hidden, self.d_ff),
        }
        let output = MatrixRef { bytes: output, dtype: self.output_dtype, rows: self.d_model, cols: self.d_ff };
        matmul(hidden, output, out); // out = h Wo^T
    }
}

#[cfg(test)]
mod tests {
    use sida_kernels::{arbitrary, lanes::dot};

    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 11.0 - 1.0).collect()
    }

    fn shape(d_model: usize, d_ff: usize, activation: Activation) -> ExpertShape {
        ExpertShape { d_model, d_ff, dtype: StoredDType::F32, output_dtype: StoredDType::F32, activation }
    }

    /// Matrices that are stored differently would be read as each other, or what is behind them in a larger slot with them.
    #[test]
    fn matrices_may_be_stored_differently() {
        let (d, ff) = (256, 512);
        let shape = ExpertShape {
            dtype: StoredDType::Q4K,
            output_dtype: StoredDType::Q6K,
            ..shape(d, ff, Activation::GatedSilu)
        };
        let inputs = arbitrary::blocks(StoredDType::Q4K, 2 * d * ff, 1);
        let output = arbitrary::blocks(StoredDType::Q6K, d * ff, 2);
        let slot = [&inputs[..], &output[..], &[7; 100]].concat();
        assert_eq!(shape.bytes(), slot.len() - 100);
        let (wide, x) = (shape.widen(&slot), values(3 * d, 1));
        assert_eq!(wide, [StoredDType::Q4K.widen(&inputs), StoredDType::Q6K.widen(&output)].concat());
        let [found, expected] =
            [(shape, slot), (shape.in_dtype(StoredDType::F32), bytes(&wide))].map(|(shape, weights)| {
                let mut out = vec![0.0; x.len()];
                shape.forward(&weights, &x, &mut out, &mut ExpertScratch::default());
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
        assert!(found == expected);
    }

    /// An expert would compute another function than its family's feed-forward.
    #[test]
    fn follows_its_equation() {
        let (d, ff) = (6, 10);
        let x = values(2 * d, 1);
        let [a, b] = [values(ff * d, 2), values(d * ff, 3)];
        let product = |w: &[f32], x: &[f32]| -> Vec<f32> { w.chunks(x.len()).map(|row| dot(x, row)).collect() };
        let shape = shape(d, ff, Activation::Relu);
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
        let shape = shape(d, ff, Activation::GatedSilu);
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
