//! A linear layer of the backbone, without bias: `y = x W^T`. Weights keep the checkpoint's dtype.

use candle_core::{Result, Tensor};

use crate::{
    cpu::matmul::{MatrixRef, product},
    dtype::StoredDType,
    tensor_rows::{from_rows, rows},
};

/// W, row-major (outputs, inputs).
#[derive(Debug)]
pub struct Linear {
    bytes: Vec<u8>,
    dtype: StoredDType,
    outputs: usize,
    inputs: usize,
}

impl Linear {
    /// Takes the bytes of W (outputs, inputs). Panics when they do not fit: the checkpoint checked the shape.
    pub fn new(bytes: Vec<u8>, dtype: StoredDType, outputs: usize, inputs: usize) -> Self {
        assert_eq!(bytes.len(), outputs * inputs * dtype.size(), "W is ({outputs}, {inputs}) {dtype:?}");
        Self { bytes, dtype, outputs, inputs }
    }

    /// Width of y.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// W as it lies.
    pub fn matrix(&self) -> MatrixRef<'_> {
        MatrixRef { bytes: &self.bytes, dtype: self.dtype, rows: self.outputs, cols: self.inputs }
    }

    /// x (n, inputs) -> y (n, outputs), float32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        from_rows(rows(x, |x| self.product(x))?, self.outputs)
    }

    /// As [`Linear::forward`], of plain rows.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        product(x, self.matrix())
    }
}
