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
    /// What loses nothing of weights that are stored so.
    pub fn of_weights(dtype: StoredDType) -> Self {
        match dtype {
            StoredDType::BF16 => Self::Bf16,
            StoredDType::F16 | StoredDType::F32 => Self::F32,
        }
    }

    /// Bytes of one value.
    pub fn size(self) -> usize {
        self.stored().size()
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
}
