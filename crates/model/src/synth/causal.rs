//! What a decoder-only model consists of, whatever its family: the tensors follow from its config.json, block by block as the
//! model is read. Called by [`super::synth`].

use std::path::Path;

use serde_json::{Value, json};
use sida_routing::{ExpertId, ExpertKey};

use super::{SynthError, shape::Weight};
use crate::{
    ModelConfig, Stack,
    config::CONFIG,
    family::Family,
    names::{Attention, LM_HEAD},
    spec::{BlockSpec, FeedForwardSpec, QkNorm},
};

/// The published shapes.
pub(super) const PUBLISHED: [&str; 4] = ["olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b", "qwen2-57b-a14b"];

/// The shape of a decoder-only model, by its config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalShape {
    json: Value,
    config: ModelConfig,
}

impl CausalShape {
    /// Of the content of a config.json. Its tokens 0 and 1 pad and end a text, as those of the tokenizer do that is written with
    /// it.
    pub fn of_config(json: Value) -> Result<Self, SynthError> {
        Self::of_config_with_families(json, &[])
    }

    /// [`CausalShape::of_config`], which knows the caller's `own` families beside those that are built in.
    pub fn of_config_with_families(mut json: Value, own: &[Family]) -> Result<Self, SynthError> {
        for (field, value) in
            [("pad_token_id", json!(0)), ("eos_token_id", json!(1)), ("torch_dtype", json!("bfloat16"))]
        {
            json[field] = value;
        }
        let config = ModelConfig::parse_with_families(json.to_string().as_bytes(), Path::new(CONFIG), own)?;
        match config.has_encoder() {
            false => Ok(Self { json, config }),
            true => Err(SynthError::Shape { found: config.family.to_owned() }),
        }
    }

    /// One of [`PUBLISHED`]: the config.json of allenai/OLMoE-1B-7B-0924, Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1 and
    /// Qwen/Qwen2-57B-A14B.
    pub(super) fn published(name: &str) -> Option<Result<Self, SynthError>> {
        let json = match name {
            "olmoe-1b-7b" => json!({
                "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048,
                "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
                "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false, "rope_theta": 10000.0,
                "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": false,
            }),
            "qwen3-30b-a3b" => json!({
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151_936,
                "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                "num_experts_per_tok": 8, "norm_topk_prob": true, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 40960, "tie_word_embeddings": false,
            }),
            "mixtral-8x7b" => json!({
                "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
                "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 32768, "tie_word_embeddings": false,
            }),
            "qwen2-57b-a14b" => json!({
                "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 151_936,
                "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false,
                "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
                "tie_word_embeddings": false,
            }),
            _ => return None,
        };
        Some(Self::of_config(json))
    }

    /// The same with so many blocks, all as the published ones are: what of a large shape fits a small machine.
    pub(super) fn with_blocks(mut self, blocks: usize) -> Result<Self, SynthError> {
        let max = self.config.decoder_layers;
        if !(1..=max).contains(&blocks) {
            return Err(SynthError::Blocks { found: blocks, max });
        }
        self.json["num_hidden_layers"] = json!(blocks);
        Self::of_config(self.json)
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    pub(super) fn json(&self) -> Value {
        self.json.clone()
    }

    /// Every tensor, in the order of the forward pass: norms are ones, everything else keeps the variance of what it is
    /// multiplied by.
    pub(super) fn weights(&self) -> Vec<Weight> {
        let Self { config, .. } = self;
        let (spec, names) = (config.spec(), config.names);
        let [embedding, ..] = names.tied();
        let mut weights = vec![Weight::normal(embedding, [config.vocab_size, config.d_model], 1.0)];
        for (index, block) in spec.decoder.blocks.iter().enumerate() {
            self.block(index, block, &mut weights);
        }
        weights.push(Weight::ones(names.final_norm(Stack::Decoder), config.d_model));
        if !config.tie_word_embeddings {
            weights.push(matrix(LM_HEAD.to_owned(), config.vocab_size, config.d_model));
        }
        weights
    }

    fn block(&self, index: usize, block: &BlockSpec, weights: &mut Vec<Weight>) {
        let (stack, which) = (Stack::Decoder, Attention::SelfAttention);
        let ModelConfig { d_model, num_experts, names, .. } = self.config;
        let BlockSpec { attention, feed_forward, .. } = block;
        weights.push(Weight::ones(names.attention_norm(stack, index, which), d_model));
        for (of, width) in [('q', attention.inner()), ('k', attention.kv_inner()), ('v', attention.kv_inner())] {
            weights.push(matrix(names.projection(stack, index, which, of), width, d_model));
            if attention.has_bias {
                weights.push(Weight::bias(names.projection_bias(stack, index, which, of), width));
            }
            let normed = match attention.qk_norm {
                QkNorm::None => 0,
                QkNorm::Heads => attention.head_dim,
                QkNorm::Rows => width,
            };
            if of != 'v' && normed > 0 {
                weights.push(Weight::ones(names.qk_norm(index, of), normed));
            }
        }
        weights.push(matrix(names.projection(stack, index, which, 'o'), d_model, attention.inner()));
        if attention.has_output_bias {
            weights.push(Weight::bias(names.projection_bias(stack, index, which, 'o'), d_model));
        }
        weights.push(Weight::ones(names.feed_forward_norm(stack, index), d_model));
        match *feed_forward {
            FeedForwardSpec::Dense { d_ff, .. } => gated(names.dense(stack, index), d_ff, d_model, weights),
            FeedForwardSpec::Moe { layer, shared, .. } => {
                weights.push(matrix(names.router(stack, index), num_experts, d_model));
                if let Some(shared) = shared {
                    gated(names.shared(index), shared.d_ff, d_model, weights);
                    if shared.is_gated {
                        weights.push(matrix(names.shared_gate(index), 1, d_model));
                    }
                }
                for expert in (0..num_experts as u16).map(ExpertId) {
                    let parts = names.expert(&self.config, ExpertKey { layer, expert });
                    weights.extend(parts.into_iter().map(|part| matrix(part.tensor, part.shape[0], part.shape[1])));
                }
            }
        }
    }
}

/// Gate, up and down.
fn gated(names: Vec<String>, d_ff: usize, d_model: usize, weights: &mut Vec<Weight>) {
    let shapes = [(d_ff, d_model), (d_ff, d_model), (d_model, d_ff)];
    weights.extend(names.into_iter().zip(shapes).map(|(name, (outputs, inputs))| matrix(name, outputs, inputs)));
}

/// A matrix whose products have the variance of what is multiplied.
fn matrix(name: String, outputs: usize, inputs: usize) -> Weight {
    Weight::normal(name, [outputs, inputs], (inputs as f64).powf(-0.5))
}
