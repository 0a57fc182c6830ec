//! Qwen2-MoE as transformers' Qwen2MoeForCausalLM: a shared expert beside those that are chosen, and biases in attention.

use serde_json::Value;

use super::{
    Family,
    causal::{Causal, Described},
    json::Json,
    sparse_blocks::sparse_blocks,
};
use crate::{
    ModelConfig, ModelError,
    names::TensorNames,
    spec::{RouterSpec, SharedSpec},
};

pub(super) const FAMILY: Family = Family { architecture: "Qwen2MoeForCausalLM", config };

fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    let mut attention = fields.attention(10_000.0, Some(16))?;
    attention.has_bias = fields.flag("qkv_bias", true)?;
    let blocks = fields.blocks()?;
    Described {
        family: "qwen2_moe",
        fields,
        names: TensorNames::Causal { moe: "mlp", expert: ["gate_proj", "up_proj", "down_proj"] },
        num_experts: fields.experts(60)?,
        expert_d_ff: fields.size("moe_intermediate_size", Some(1408), 1, 1 << 20)?,
        head_dim: attention.head_dim,
        eos_token_id: None,
        rms_norm_eps: fields.number("rms_norm_eps", 1e-6, 0.0, 1.0)?,
        sparse: sparse_blocks(fields, blocks)?,
        causal: Causal {
            attention,
            windows: windows(fields, blocks)?,
            router: RouterSpec {
                top_k: fields.size("num_experts_per_tok", Some(4), 1, 16_384)?,
                has_bias: false,
                is_normalised: fields.flag("norm_topk_prob", false)?,
            },
            shared: Some(SharedSpec {
                d_ff: fields.size("shared_expert_intermediate_size", Some(5632), 1, 1 << 20)?,
                is_gated: true,
            }),
            dense_d_ff: fields.size("intermediate_size", Some(5632), 1, 1 << 20)?,
        },
    }
    .config()
}

/// Which blocks see only so many keys back: those that `layer_types` names, else every other one below `max_window_layers`.
fn windows(fields: &Json<'_>, blocks: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let is_used = fields.flag("use_sliding_window", false)?;
    let width = fields.size("sliding_window", Some(4096), 0, 1 << 32)?;
    let below = fields.size("max_window_layers", Some(28), 0, 1 << 20)?;
    let slides: Vec<bool> = match fields.list("layer_types")? {
        None => (0..blocks).map(|block| is_used && block % 2 == 0 && block < below).collect(),
        Some(types) => {
            let slides = |kind: &Value| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(fields.refuse("layer_types", kind.to_string(), "full_attention or sliding_attention")),
            };
            types.iter().map(slides).collect::<Result<_, _>>()?
        }
    };
    if slides.len() != blocks {
        let found = format!("{} entries", slides.len());
        return Err(fields.refuse("layer_types", found, format!("one for each of {blocks} blocks")));
    }
    if slides.contains(&true) && (!is_used || width == 0) {
        return Err(fields.refuse("sliding_window", width.to_string(), "use_sliding_window and a width of at least 1"));
    }
    Ok(slides.into_iter().map(|slides| slides.then_some(width)).collect())
}
