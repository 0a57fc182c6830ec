//! What a model computes in on a device. Known to every build, as [`crate::device_name`] is.

use std::{fmt, str::FromStr};

use thiserror::Error;

use crate::StoredDType;

/// What weights and activations are stored in on a device. Sums are float32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Products by tensor cores.
    Bf16,
    /// As the processor computes.
    F32,
}

/// Not a precision.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{found:?} is not a precision, expected bf16 or f32")]
pub struct PrecisionError {
    /// What it was.
    pub found: String,
}

impl Precision {
    /// What loses nothing of weights that are stored so. Q8_0 and Q4_0 are multiplied as they are beside bf16; of other blocks,
    /// whose weights are rounded to it on their way, it loses far less than making them did.
    pub fn of_weights(dtype: StoredDType) -> Self {
        match dtype {
            StoredDType::F16 | StoredDType::F32 => Self::F32,
            StoredDType::BF16 => Self::Bf16,
            StoredDType::Q8_0 | StoredDType::Q4_0 | StoredDType::Q4_1 | StoredDType::Q5_0 | StoredDType::Q5_1 => {
                Self::Bf16
            }
            StoredDType::Q4K | StoredDType::Q5K | StoredDType::Q6K | StoredDType::F8 => Self::Bf16,
        }
    }

    /// Bytes of one value.
    pub fn size(self) -> usize {
        self.stored().bytes(1)
    }

    /// Writes values as they are kept: bf16 is rounded to nearest, even. Panics unless `to` has their bytes.
    pub fn narrow(self, values: &[f32], to: &mut [u8]) {
        assert_eq!(to.len(), values.len() * self.size());
        match self {
            Self::Bf16 => to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, &value)| {
                // As `half` does it, but without branches: a row of them takes a tenth of the time.
                let bits = value.to_bits();
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                let nan = bits >> 16 | 0x40;
                *to = (if value.is_nan() { nan } else { rounded } as u16).to_le_bytes();
            }),
            Self::F32 => {
                to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_le_bytes());
            }
        }
    }

    /// The type that values have in memory.
    pub fn stored(self) -> StoredDType {
        match self {
            Self::Bf16 => StoredDType::BF16,
            Self::F32 => StoredDType::F32,
        }
    }
}

impl FromStr for Precision {
    type Err = PrecisionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "f32" => Ok(Self::F32),
            _ => Err(PrecisionError { found: text.to_owned() }),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model would be served in another precision than was asked for.
    #[test]
    fn precisions_are_read_as_written() {
        for precision in [Precision::Bf16, Precision::F32] {
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
        assert!("f16".parse::<Precision>().is_err());
    }

    /// Rows would be rounded otherwise than weights are.
    #[test]
    fn values_are_rounded_to_nearest_even() {
        let mut values = vec![0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, 3e38, f32::MAX, f32::INFINITY, f32::NAN, 1e-40];
        values.extend((0..100_000_u32).map(|n| f32::from_bits(n.wrapping_mul(2_654_435_761))));
        let mut found = vec![0; values.len() * 2];
        Precision::Bf16.narrow(&values, &mut found);
        for (&value, found) in values.iter().zip(found.as_chunks().0) {
            assert_eq!(u16::from_le_bytes(*found), half::bf16::from_f32(value).to_bits(), "{value:e}");
        }
    }
}
