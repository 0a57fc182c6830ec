//! A weight matrix of the backbone in the host's memory: `y = x W^T`, without bias. Keeps the checkpoint's dtypes.

use sida_kernels::{
    StoredDType,
    matmul::{MatrixRef, products_into},
};

/// W, row-major (outputs, inputs), in one or more parts, one below the other.
#[derive(Debug)]
pub struct Linear {
    parts: Vec<Part>,
    inputs: usize,
}

/// Rows of W that are stored alike.
#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    dtype: StoredDType,
    outputs: usize,
}

impl Linear {
    /// A matrix of this width that has no rows yet.
    pub fn new(inputs: usize) -> Self {
        Self { parts: Vec::new(), inputs }
    }

    /// Takes the bytes of more rows. Panics when they do not fit: the checkpoint checked the shape.
    pub fn push(&mut self, bytes: Vec<u8>, dtype: StoredDType, outputs: usize) {
        assert_eq!(bytes.len(), dtype.bytes(outputs * self.inputs), "W is ({outputs}, {}) {dtype:?}", self.inputs);
        self.parts.push(Part { bytes, dtype, outputs });
    }

    /// The parts of W as they lie.
    pub fn parts(&self) -> impl Iterator<Item = MatrixRef<'_>> + Clone {
        let cols = self.inputs;
        self.parts.iter().map(move |Part { bytes, dtype, outputs }| MatrixRef {
            bytes,
            dtype: *dtype,
            rows: *outputs,
            cols,
        })
    }

    /// How many rows W has.
    pub fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.outputs).sum()
    }

    /// How many columns W has.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// x (n, inputs) -> y (n, outputs), over whatever `y` held.
    pub fn product(&self, x: &[f32], y: &mut Vec<f32>) {
        products_into(x, self.parts(), y);
    }

    /// Some of W's rows, widened, into `out` (rows.len(), inputs). Panics where there is no such row.
    pub fn gather(&self, rows: &[u32], out: &mut [f32]) {
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(self.inputs)) {
            let (mut row, mut parts) = (row as usize, self.parts.iter());
            let part = loop {
                let part = parts.next().expect("a row of W");
                if row < part.outputs {
                    break part;
                }
                row -= part.outputs;
            };
            let row_bytes = part.dtype.bytes(self.inputs);
            part.dtype.widen_over(&part.bytes[row * row_bytes..][..row_bytes], out);
        }
    }
}

#[cfg(test)]
mod tests {
    use sida_kernels::arbitrary;

    use super::*;

    #[test]
    fn parts_that_are_stored_differently_are_one_matrix() {
        // Would break: projections of a model whose matrices have formats of their own would be taken for each other.
        let (inputs, outputs) = (256, [40, 7, 3]);
        let dtypes = [StoredDType::Q4K, StoredDType::Q6K, StoredDType::Q8_0];
        let (mut mixed, mut wide) = (Linear::new(inputs), Linear::new(inputs));
        let mut values = Vec::new();
        for (dtype, outputs) in dtypes.into_iter().zip(outputs) {
            let bytes = arbitrary::blocks(dtype, outputs * inputs, outputs);
            values.extend(dtype.widen(&bytes));
            mixed.push(bytes, dtype, outputs);
        }
        wide.push(values.iter().flat_map(|value| value.to_le_bytes()).collect(), StoredDType::F32, 50);
        for rows in [1, 3, 20] {
            let x: Vec<f32> = (0..rows * inputs).map(|i| ((i * 31) % 23) as f32 / 11.0 - 1.0).collect();
            let [mut found, mut expected] = [vec![9.0; 3], vec![]];
            mixed.product(&x, &mut found);
            wide.product(&x, &mut expected);
            assert!(found == expected, "{rows} rows");
        }
        let rows = [49, 0, 39, 40, 46, 47];
        let [mut found, mut expected] = [(); 2].map(|()| vec![0.0; rows.len() * inputs]);
        mixed.gather(&rows, &mut found);
        wide.gather(&rows, &mut expected);
        assert!(found == expected && found[..inputs] == values[49 * inputs..]);
    }
}
