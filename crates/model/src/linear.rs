//! A weight matrix of the backbone in the host's memory: `y = x W^T`, without bias. Keeps the checkpoint's dtype.

use crate::{
    cpu::matmul::{MatrixRef, product_into},
    dtype::StoredDType,
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
        assert_eq!(bytes.len(), dtype.bytes(outputs * inputs), "W is ({outputs}, {inputs}) {dtype:?}");
        Self { bytes, dtype, outputs, inputs }
    }

    /// W as it lies.
    pub fn matrix(&self) -> MatrixRef<'_> {
        MatrixRef { bytes: &self.bytes, dtype: self.dtype, rows: self.outputs, cols: self.inputs }
    }

    /// x (n, inputs) -> y (n, outputs), over whatever `y` held.
    pub fn product(&self, x: &[f32], y: &mut Vec<f32>) {
        product_into(x, self.matrix(), y);
    }

    /// Some of W's rows, widened, into `out` (rows.len(), inputs). Panics where there is no such row.
    pub fn gather(&self, rows: &[u32], out: &mut [f32]) {
        let row_bytes = self.dtype.bytes(self.inputs);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(self.inputs)) {
            self.dtype.widen_over(&self.bytes[row as usize * row_bytes..][..row_bytes], out);
        }
    }
}
