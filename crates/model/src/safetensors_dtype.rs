//! What safetensors calls the dtypes of weights.

use safetensors::Dtype;
use sida_kernels::StoredDType;

/// The dtype of weights that are stored so; `None` for one that holds no weights of ours (integers, FP8), or that does not say
/// alone what it holds (bytes).
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
        StoredDType::Q8_0 | StoredDType::Q4_0 | StoredDType::Q4K | StoredDType::Q6K => Dtype::U8,
    }
}
