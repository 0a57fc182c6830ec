//! A matrix in FP8: that its scales fit it, and the blocks that it becomes. Its numbers stay as they are, and a scale is repeated
//! for each block of the rows and columns that share it.

use std::io::{self, Write};

use safetensors::Dtype;
use sida_kernels::float8::{F8_BLOCK, is_nan, number};

use super::tensors::{Tensors, refused};
use crate::{StoredDType, convert::ConvertError, shards::TensorSpec};

/// A matrix whose scales were checked. Its numbers are when they are written.
#[derive(Debug)]
pub(super) struct Float8 {
    /// What its tensors' names begin with.
    name: String,
    /// What its scales are called.
    scale: String,
    /// Rows and columns that share a scale, at most all. Invariant: columns are whole blocks, of which a row is whole ones.
    square: [usize; 2],
    outputs: usize,
    inputs: usize,
}

impl Float8 {
    /// Refuses one whose tensors do not fit each other, or with a scale that is no number. `usual`: what scales are called where
    /// there are none. `squares`: which rows and columns may share a scale.
    pub(super) fn open(
        name: &str,
        usual: &str,
        squares: &[[usize; 2]],
        tensors: Tensors<'_>,
    ) -> Result<Self, ConvertError> {
        let weight = format!("{name}.weight");
        tensors.expect(&weight, Dtype::F8_E4M3, None)?;
        let &[outputs, inputs] = &tensors.get(&weight)?.shape[..] else {
            return Err(refused(
                weight.clone(),
                format!("{:?}", tensors.get(&weight)?.shape),
                "two dimensions".to_owned(),
            ));
        };
        if outputs == 0 || inputs == 0 || !inputs.is_multiple_of(F8_BLOCK) {
            let expected = format!("rows of whole blocks of {F8_BLOCK} values");
            return Err(refused(weight, format!("{outputs} rows of {inputs} values"), expected));
        }
        let scale = ["weight_scale_inv", "weight_scale"].map(|part| format!("{name}.{part}"));
        let [inverse, plain] = scale;
        let scale = match [&inverse, &plain].map(|scale| tensors.files.get(scale).is_some()) {
            [true, true] => {
                return Err(refused(plain, format!("another one beside {inverse}"), "one of the two".to_owned()));
            }
            [_, true] => plain,
            [true, _] => inverse,
            [false, false] => format!("{name}.{usual}"),
        };
        let zeros = format!("{name}.weight_zero_point");
        if tensors.files.get(&zeros).is_some_and(|stored| tensors.files.bytes(stored).iter().any(|&byte| byte != 0)) {
            return Err(refused(zeros, "zeros".to_owned(), "none: numbers in FP8 are symmetric".to_owned()));
        }
        let of = |&square: &[usize; 2]| Self { name: name.to_owned(), scale: scale.clone(), square, outputs, inputs };
        let chosen = squares.iter().map(of).find(|matrix| matrix.scales(tensors).is_ok());
        let matrix = chosen.unwrap_or_else(|| of(&squares[0]));
        let scales = matrix.scales(tensors)?;
        let largest = number(0x7e);
        match scales.into_iter().find(|scale| !(scale * largest).is_finite()) {
            Some(found) => {
                let expected = format!("scales of which {largest} times are numbers of float32");
                Err(refused(matrix.scale, format!("{found}"), expected))
            }
            None => Ok(matrix),
        }
    }

    /// The tensor that it becomes.
    pub(super) fn spec(&self) -> TensorSpec {
        let Self { name, outputs, inputs, .. } = self;
        TensorSpec { name: format!("{name}.weight"), dtype: StoredDType::F8, shape: vec![*outputs, *inputs] }
    }

    /// What a bias of it is called.
    pub(super) fn bias(&self) -> String {
        format!("{}.bias", self.name)
    }

    /// Writes its blocks, row by row. Refuses numbers that are none.
    pub(super) fn write(&self, tensors: Tensors<'_>, out: &mut dyn Write) -> io::Result<()> {
        let scales = self.scales(tensors).map_err(io::Error::other)?;
        let spec = self.spec();
        let stored = tensors.files.get(&spec.name).expect("it was opened");
        let [rows, columns] = self.square;
        let mut blocks = Vec::with_capacity(spec.dtype.bytes(self.inputs));
        for (row, numbers) in tensors.files.bytes(stored).chunks_exact(self.inputs).enumerate() {
            if let Some(column) = numbers.iter().position(|&code| is_nan(code)) {
                let found = format!("{:#04x} in row {row}, column {column}, which is no number", numbers[column]);
                return Err(io::Error::other(refused(spec.name, found, "numbers".to_owned())));
            }
            let scales = &scales[row / rows * self.inputs.div_ceil(columns)..];
            blocks.clear();
            for (at, block) in numbers.chunks_exact(F8_BLOCK).enumerate() {
                blocks.extend(scales[at * F8_BLOCK / columns].to_le_bytes());
                blocks.extend(block);
            }
            out.write_all(&blocks)?;
        }
        tensors.files.release(stored);
        Ok(())
    }

    fn scales(&self, tensors: Tensors<'_>) -> Result<Vec<f32>, crate::ModelError> {
        let [rows, columns] = self.square;
        tensors.scales(&self.scale, [self.outputs.div_ceil(rows), self.inputs.div_ceil(columns)])
    }
}
