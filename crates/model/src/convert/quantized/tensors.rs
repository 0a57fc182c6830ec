//! The tensors of files that a matrix is made of, which may be missing, or others than are expected.

use std::path::Path;

use safetensors::Dtype;

use crate::{
    ModelError,
    convert::ConvertError,
    weight_files::{StoredTensor, WeightFiles},
};

/// Tensors of files.
#[derive(Clone, Copy)]
pub(super) struct Tensors<'a> {
    pub(super) files: &'a WeightFiles,
    /// For messages.
    pub(super) dir: &'a Path,
}

impl<'a> Tensors<'a> {
    pub(super) fn get(self, name: &str) -> Result<&'a StoredTensor, ModelError> {
        let missing = || ModelError::TensorMissing { dir: self.dir.to_owned(), tensor: name.to_owned() };
        self.files.get(name).ok_or_else(missing)
    }

    /// The bytes of one of this dtype and, if one is given, this shape.
    pub(super) fn expect(self, name: &str, dtype: Dtype, shape: Option<&[usize]>) -> Result<&'a [u8], ModelError> {
        let stored = self.get(name)?;
        if stored.dtype != dtype {
            let (expected, found) = (format!("{dtype:?}"), format!("{:?}", stored.dtype));
            return Err(ModelError::TensorDType { tensor: name.to_owned(), expected, found });
        }
        match shape {
            Some(shape) if shape != stored.shape => {
                let (expected, found) = (shape.to_owned(), stored.shape.clone());
                Err(ModelError::TensorShape { tensor: name.to_owned(), expected, found })
            }
            _ => Ok(self.files.bytes(stored)),
        }
    }

    /// Scales, of this shape. One of fewer dimensions has 1 in the last ones.
    pub(super) fn scales(self, name: &str, shape: [usize; 2]) -> Result<Vec<f32>, ModelError> {
        let stored = self.get(name)?;
        let dtype = stored.weights.filter(|dtype| !dtype.is_blocks()).ok_or_else(|| ModelError::TensorDType {
            tensor: name.to_owned(),
            expected: "F16, BF16 or F32".to_owned(),
            found: format!("{:?}", stored.dtype),
        })?;
        let mut found = stored.shape.clone();
        found.resize(found.len().max(2), 1);
        if found != shape {
            let (expected, found) = (shape.to_vec(), stored.shape.clone());
            return Err(ModelError::TensorShape { tensor: name.to_owned(), expected, found });
        }
        Ok(dtype.widen(self.files.bytes(stored)))
    }
}

pub(super) fn refused(tensor: String, found: String, expected: String) -> ConvertError {
    ConvertError::Packed { tensor, found, expected }
}
