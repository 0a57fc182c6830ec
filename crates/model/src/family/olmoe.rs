//! OLMoE as transformers' OlmoeForCausalLM: norms of whole rows of queries and keys, perhaps limits, and experts in every
//! block.

use super::{
    Family,
    causal::{Causal, Described},
    json::Json,
};
use crate::{
    ModelConfig, ModelError,
    names::TensorNames,
    spec::{QkNorm, RouterSpec},
};

pub(super) const FAMILY: Family = Family { architecture: "OlmoeForCausalLM", config };

fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    let mut attention = fields.attention(10_000.0, None)?;
    attention.qk_norm = QkNorm::Rows;
    attention.has_bias = fields.flag("attention_bias", false)?;
    attention.has_output_bias = attention.has_bias;
    attention.clip = fields.number_if_any("clip_qkv", 0.0, 1e9)?.map(|clip| clip as f32);
    if let Some(window) = fields.size_if_any("sliding_window", 0, 1 << 32)? {
        return Err(fields.refuse("sliding_window", window.to_string(), "nothing"));
    }
    let blocks = fields.blocks()?;
    Described {
        family: "olmoe",
        fields,
        names: TensorNames::Causal { moe: "mlp", expert: ["gate_proj", "up_proj", "down_proj"] },
        num_experts: fields.experts(64)?,
        expert_d_ff: fields.size("intermediate_size", None, 1, 1 << 20)?,
        head_dim: attention.head_dim,
        eos_token_id: Some(50_279),
        rms_norm_eps: fields.number("rms_norm_eps", 1e-5, 0.0, 1.0)?,
        sparse: vec![true; blocks],
        causal: Causal {
            attention,
            windows: vec![None; blocks],
            router: RouterSpec {
                top_k: fields.size("num_experts_per_tok", Some(8), 1, 16_384)?,
                has_bias: false,
                is_normalised: fields.flag("norm_topk_prob", false)?,
            },
            shared: None,
            dense_d_ff: 0,
        },
    }
    .config()
}
