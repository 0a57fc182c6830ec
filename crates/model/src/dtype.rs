//! How a weight is stored on disk and in an expert's slot. Computation is in float32 whatever this says.

use std::fmt;

use safetensors::Dtype;

/// A dtype that checkpoints of the supported families store weights in; little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredDType {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754 binary16.
    F16,
}

impl StoredDType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    /// The stored dtype of a safetensors dtype; `None` for one that holds no weights of ours (integers, FP8).
    pub fn from_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::BF16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// The way back.
    pub fn to_safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::BF16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Appends `bytes`, values of this dtype, to `values` as float32. Every value is exact.
    /// Ignores an incomplete value at the end: lengths are checked where tensors are read.
    pub fn widen_into(self, bytes: &[u8], values: &mut Vec<f32>) {
        match self {
            Self::F32 => values.extend(bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value))),
            Self::BF16 => {
                // The upper half of a float32. As `half` does it but for signalling NaNs, and without its branch, so that a
                // row takes a tenth of the time.
                let widen = |&value: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16);
                values.extend(bytes.as_chunks().0.iter().map(widen))
            }
            Self::F16 => {
                values.extend(bytes.as_chunks().0.iter().map(|&value| half::f16::from_le_bytes(value).to_f32()))
            }
        }
    }

    /// As many values as `out` has room for, over what it holds. Panics unless `bytes` has exactly as many.
    pub fn widen_over(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "{self} values of another number");
        match self {
            Self::F32 => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &value)| *out = f32::from_le_bytes(value))
            }
            Self::BF16 => {
                let widen = |value: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16);
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &value)| *out = widen(value))
            }
            Self::F16 => {
                let widen = |value| half::f16::from_le_bytes(value).to_f32();
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &value)| *out = widen(value))
            }
        }
    }

    /// [`StoredDType::widen_into`] a new vector.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = Vec::with_capacity(bytes.len() / self.size());
        self.widen_into(bytes, &mut values);
        values
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
        })
    }
}
