//! Qwen3-MoE as transformers' Qwen3MoeForCausalLM: norms of each head of queries and keys, and experts in most blocks.

use super::{
    Family,
    causal::{Causal, Described},
    json::Json,
    sparse_blocks::sparse_blocks,
};
use crate::{
    ModelConfig, ModelError,
    names::TensorNames,
    spec::{QkNorm, RouterSpec},
};

pub(super) const FAMILY: Family = Family { architecture: "Qwen3MoeForCausalLM", config };

fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    let mut attention = fields.attention(10_000.0, Some(4))?;
    attention.qk_norm = QkNorm::Heads;
    attention.has_bias = fields.flag("attention_bias", false)?;
    attention.has_output_bias = attention.has_bias;
    let window = match fields.flag("use_sliding_window", false)? {
        true if !fields.object.contains_key("sliding_window") => Some(4096),
        true => fields.size_if_any("sliding_window", 1, 1 << 32)?,
        false => None,
    };
    let blocks = fields.blocks()?;
    Described {
        family: "qwen3_moe",
        fields,
        names: TensorNames::Causal { moe: "mlp", expert: ["gate_proj", "up_proj", "down_proj"] },
        num_experts: fields.experts(128)?,
        expert_d_ff: fields.size("moe_intermediate_size", None, 1, 1 << 20)?,
        head_dim: attention.head_dim,
        eos_token_id: None,
        rms_norm_eps: fields.number("rms_norm_eps", 1e-6, 0.0, 1.0)?,
        sparse: sparse_blocks(fields, blocks)?,
        causal: Causal {
            attention,
            windows: vec![window; blocks],
            router: RouterSpec {
                top_k: fields.size("num_experts_per_tok", Some(8), 1, 16_384)?,
                has_bias: false,
                is_normalised: fields.flag("norm_topk_prob", false)?,
            },
            shared: None,
            dense_d_ff: fields.size("intermediate_size", Some(6144), 1, 1 << 20)?,
        },
    }
    .config()
}
