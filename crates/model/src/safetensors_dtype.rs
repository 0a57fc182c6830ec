//! What safetensors calls the dtypes of weights.

use safetensors::Dtype;
use sida_kernels::StoredDType;

/// The dtype of weights that are stored so; `None` for one that holds no weights of ours (integers), or that does not say alone
/// what it holds (bytes, or FP8, whose scales are elsewhere).
pub(crate) fn stored(dtype: Dtype) -> Option<StoredDType> {
    match dtype {
        Dtype::F32 => Some(StoredDType::F32),
        Dtype::BF16 => Some(StoredDType::BF16),
        Dtype::F16 => Some(StoredDType::F16),
        _ => None,
    }
}

/// What safetensors calls a dtype of weights. Blocks are bytes there.
pub(crate) fn in_safetensors(dtype: StoredDType) -> Dtype {
    match dtype {
        StoredDType::F32 => Dtype::F32,
        StoredDType::BF16 => Dtype::BF16,
        StoredDType::F16 => Dtype::F16,
        StoredDType::Q8_0 | StoredDType::Q4_0 | StoredDType::Q4_1 | StoredDType::Q5_0 | StoredDType::Q5_1 => Dtype::U8,
        StoredDType::Q4K | StoredDType::Q5K | StoredDType::Q6K | StoredDType::F8 => Dtype::U8,
    }
}
