//! Mixtral as transformers' MixtralForCausalLM: plain grouped-query attention, and a few large experts in every block.

use super::{
    Family,
    causal::{Causal, Described},
    json::Json,
};
use crate::{ModelConfig, ModelError, names::TensorNames, spec::RouterSpec};

pub(super) const FAMILY: Family = Family { architecture: "MixtralForCausalLM", config };

fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    let attention = fields.attention(1e6, Some(8))?;
    let blocks = fields.blocks()?;
    Described {
        family: "mixtral",
        fields,
        names: TensorNames::Causal { moe: "block_sparse_moe", expert: ["w1", "w3", "w2"] },
        num_experts: fields.experts(8)?,
        expert_d_ff: fields.size("intermediate_size", None, 1, 1 << 20)?,
        head_dim: attention.head_dim,
        eos_token_id: Some(2),
        rms_norm_eps: fields.number("rms_norm_eps", 1e-5, 0.0, 1.0)?,
        sparse: vec![true; blocks],
        causal: Causal {
            attention,
            windows: vec![fields.size_if_any("sliding_window", 1, 1 << 32)?; blocks],
            router: RouterSpec {
                top_k: fields.size("num_experts_per_tok", Some(2), 1, 16_384)?,
                has_bias: false,
                is_normalised: true,
            },
            shared: None,
            dense_d_ff: 0,
        },
    }
    .config()
}
