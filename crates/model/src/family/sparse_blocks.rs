//! Which blocks of the Qwen families have experts.

use super::json::Json;
use crate::ModelError;

/// Every `decoder_sparse_step`-th, but for those that `mlp_only_layers` names.
pub(super) fn sparse_blocks(fields: &Json<'_>, blocks: usize) -> Result<Vec<bool>, ModelError> {
    let step = fields.size("decoder_sparse_step", Some(1), 1, 1 << 20)?;
    let dense = fields.list("mlp_only_layers")?.unwrap_or_default();
    if let Some(other) = dense.iter().find(|block| block.as_u64().is_none_or(|block| block >= blocks as u64)) {
        return Err(fields.refuse("mlp_only_layers", other.to_string(), format!("blocks below {blocks}")));
    }
    Ok((0..blocks)
        .map(|block| (block + 1) % step == 0 && !dense.iter().any(|of| of.as_u64() == Some(block as u64)))
        .collect())
}
