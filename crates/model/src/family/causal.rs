//! What decoder-only families have in common: how their config.json reads, and the blocks that it means. A family beside this
//! says what its fields are called, what they are if a file leaves them out, and what of this it has.

use sida_routing::LayerId;

use super::json::Json;
use crate::{
    GenerationConfig, ModelConfig, ModelError, ModelSpec, Stack,
    config::{QUANT_METHOD, QUANTIZATION},
    generation::Fields,
    names::TensorNames,
    spec::{
        Activation, AttentionSpec, BlockSpec, FeedForwardSpec, QkNorm, Rotary, RotaryScaling, RouterSpec, SharedSpec,
        StackSpec,
    },
};

/// What a decoder-only model computes, beside the sizes that every model has.
#[derive(Clone, Debug, PartialEq)]
pub struct Causal {
    /// Of every block, but for its window.
    pub attention: AttentionSpec,
    /// Of each block: how many keys back a query sees; `None`: all.
    pub windows: Vec<Option<usize>>,
    /// How blocks with experts choose.
    pub router: RouterSpec,
    /// The expert of such blocks that all rows go to.
    pub shared: Option<SharedSpec>,
    /// Width of blocks without experts.
    pub dense_d_ff: usize,
}

/// What a decoder-only family says of a config.
#[derive(Debug)]
pub struct Described<'a> {
    /// What the family is called, as `model_type` of config.json.
    pub family: &'static str,
    /// The config.
    pub fields: &'a Json<'a>,
    /// What its tensors are called.
    pub names: TensorNames,
    /// Experts of each block that has some.
    pub num_experts: usize,
    /// Width of an expert.
    pub expert_d_ff: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// What ends a text where the file does not say.
    pub eos_token_id: Option<u32>,
    /// Which blocks have experts, one entry each.
    pub sparse: Vec<bool>,
    /// What the blocks compute.
    pub causal: Causal,
}

impl Described<'_> {
    /// Checks what all families share, and makes a [`ModelConfig`] of it. Panics unless there is a window for each block: that is
    /// the family's mistake, and no config's.
    pub fn config(self) -> Result<ModelConfig, ModelError> {
        let Self {
            family,
            fields,
            names,
            num_experts,
            expert_d_ff,
            head_dim,
            rms_norm_eps,
            eos_token_id,
            sparse,
            causal,
        } = self;
        if fields.get("hidden_act").is_some_and(|act| act.as_str() != Some("swish")) {
            fields.text("hidden_act", "silu")?; // Which has two names.
        }
        if let Some(config) = fields.get(QUANTIZATION) {
            let found = config.get("quant_method").unwrap_or(config);
            if found != QUANT_METHOD {
                let expected = "nothing, or what `sida convert` writes (weights in f32, bf16, f16 or blocks), which it also makes \
                                of \"gptq\", \"awq\", \"fp8\" and \"compressed-tensors\"";
                return Err(fields.refuse(QUANTIZATION, found.to_string(), expected));
            }
        }
        assert_eq!(causal.windows.len(), sparse.len(), "a window for each block of {family}");
        let heads = causal.attention.heads;
        if causal.router.top_k > num_experts {
            let found = causal.router.top_k.to_string();
            return Err(fields.refuse("num_experts_per_tok", found, format!("at most {num_experts} experts")));
        }
        if !heads.is_multiple_of(causal.attention.kv_heads) {
            let found = causal.attention.kv_heads.to_string();
            return Err(fields.refuse("num_key_value_heads", found, format!("a divisor of {heads} heads")));
        }
        let vocab_size = fields.size("vocab_size", None, 2, 4_000_000)?;
        let tokens = Fields { json: fields.object, path: fields.path, vocab_size };
        let ends = match (tokens.tokens("eos_token_id")?, eos_token_id.filter(|&id| (id as usize) < vocab_size)) {
            (ends, Some(default)) if ends.is_empty() => vec![default],
            (ends, None) if ends.is_empty() => {
                return Err(fields.refuse("eos_token_id", "nothing".to_owned(), "a token that ends a text"));
            }
            (ends, _) => ends,
        };
        let pad = tokens.token("pad_token_id")?.unwrap_or(ends[0]);
        Ok(ModelConfig {
            family,
            top_k: causal.router.top_k,
            router_bias: causal.router.has_bias,
            vocab_size,
            d_model: fields.size("hidden_size", None, 1, 65_536)?,
            d_kv: head_dim,
            d_ff: expert_d_ff,
            num_heads: heads,
            encoder_layers: 0,
            decoder_layers: sparse.len(),
            num_experts,
            expert_capacity: 0,
            relative_attention_num_buckets: 0,
            relative_attention_max_distance: 0,
            layer_norm_epsilon: rms_norm_eps,
            positions_max: fields.positions(causal.attention.rotary)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            pad_token_id: pad,
            generation: GenerationConfig::plain(ends[0], ends.clone()),
            eos_token_ids: ends,
            encoder_sparse: Vec::new(),
            decoder_sparse: sparse,
            activation: Activation::GatedSilu,
            names,
            causal: Some(Box::new(causal)),
        })
    }
}

impl Causal {
    /// What it is, field by field in words of its own: part of the model's digest, which no renaming of ours must change.
    pub(crate) fn canonical(&self) -> String {
        let Self { attention, windows, router, shared, dense_d_ff } = self;
        let bits = |value: f64| format!("{:016x}", value.to_bits());
        let rotary = attention.rotary.map_or_else(String::new, |Rotary { theta, scaling }| {
            let scaling = match scaling {
                RotaryScaling::None => "none".to_owned(),
                RotaryScaling::Linear { factor } => format!("linear {}", bits(factor)),
                RotaryScaling::Yarn { factor, beta_fast, beta_slow, trained, attention_factor, truncate } => {
                    let numbers = [factor, beta_fast, beta_slow, trained, attention_factor].map(bits).join(" ");
                    format!("yarn {numbers} {truncate}")
                }
                RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, trained } => {
                    format!("llama3 {}", [factor, low_freq_factor, high_freq_factor, trained].map(bits).join(" "))
                }
            };
            format!("{} {scaling}", bits(theta))
        });
        let qk_norm = match attention.qk_norm {
            QkNorm::None => "none",
            QkNorm::Heads => "heads",
            QkNorm::Rows => "rows",
        };
        let clip = attention.clip.map_or_else(|| "none".to_owned(), |clip| bits(clip.into()));
        let windows: Vec<String> = windows.iter().map(|window| window.unwrap_or(0).to_string()).collect();
        let shared =
            shared.map_or_else(|| "none".to_owned(), |SharedSpec { d_ff, is_gated }| format!("{d_ff} {is_gated}"));
        format!(
            "kv_heads {}; biases {} {}; qk_norm {qk_norm}; clip {clip}; rotary {rotary}; windows {}; normalised {}; shared \
             {shared}; dense {dense_d_ff}",
            attention.kv_heads,
            attention.has_bias,
            attention.has_output_bias,
            windows.join(","),
            router.is_normalised,
        )
    }

    /// A decoder, and no encoder.
    pub(super) fn spec(&self, config: &ModelConfig) -> ModelSpec {
        let mut layers = config.moe_layers(Stack::Decoder).map(LayerId);
        let blocks = config.decoder_sparse.iter().zip(&self.windows).map(|(is_sparse, &window)| {
            let layer = if *is_sparse { layers.next() } else { None };
            let dense = FeedForwardSpec::Dense { d_ff: self.dense_d_ff, activation: Activation::GatedSilu };
            let feed_forward = layer.map_or(dense, |layer| FeedForwardSpec::Moe {
                layer,
                experts: config.num_experts,
                router: self.router,
                shared: self.shared,
            });
            BlockSpec { attention: AttentionSpec { window, ..self.attention }, cross: None, feed_forward }
        });
        ModelSpec {
            vocab_size: config.vocab_size,
            d_model: config.d_model,
            norm_epsilon: config.layer_norm_epsilon as f32,
            head_scale: 1.0,
            decoder: StackSpec { positions: None, blocks: blocks.collect() },
            encoder: StackSpec { positions: None, blocks: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "moe_intermediate_size": 12, "num_experts": 6,
            "num_experts_per_tok": 3, "eos_token_id": [3, 96],
        })
    }

    fn with(field: &str, value: Value) -> Result<ModelConfig, ModelError> {
        let mut json = base();
        json[field] = value;
        ModelConfig::parse(json.to_string().as_bytes(), Path::new("config.json"))
    }

    /// Answers would end where those of transformers do not, which counts the prompt in these lengths.
    #[test]
    fn lengths_that_count_the_prompt_are_not_followed() {
        let mut json = base();
        (json["max_length"], json["min_length"], json["forced_bos_token_id"]) = (json!(30), json!(9), json!(5));
        let config = ModelConfig::parse(json.to_string().as_bytes(), Path::new("config.json")).unwrap();
        let generation = config.generation;
        assert_eq!((generation.tokens_max, generation.tokens_min, generation.forced_bos_token_id), (None, 0, None));
        assert_eq!(generation.ignored, ["min_length is 9", "max_length is 30", "forced_bos_token_id is 5"]);
    }

    /// A file would be read as another model: fields have two spellings each, of releases before transformers 5 and since.
    #[test]
    fn both_spellings_are_read() {
        let config = with("mlp_only_layers", json!([1])).unwrap();
        assert_eq!(
            (config.decoder_sparse.clone(), config.top_k, config.has_encoder()),
            (vec![true, false, true, true], 3, false)
        );
        assert_eq!((config.eos_token_ids.clone(), config.inner_dim()), (vec![3, 96], 40));
        let attention = config.spec().decoder.blocks[0].attention;
        assert_eq!((attention.kv_inner(), attention.scale), (20, 10_f32.powf(-0.5)));
        let theta = |config: ModelConfig| config.spec().decoder.blocks[0].attention.rotary.unwrap().theta;
        assert_eq!(theta(with("rope_theta", json!(5e5)).unwrap()), 5e5);
        assert_eq!(theta(with("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5})).unwrap()), 5e5);
        let old = with("rope_scaling", json!({"type": "linear", "factor": 2})).unwrap();
        let rotary = old.spec().decoder.blocks[0].attention.rotary.unwrap();
        assert_eq!((rotary.theta, rotary.scaling), (10_000.0, RotaryScaling::Linear { factor: 2.0 }));
        assert_ne!(
            with("rope_theta", json!(5e5)).unwrap().canonical(),
            with("rope_theta", json!(6e5)).unwrap().canonical()
        );
    }

    /// Prompts would be refused that the model was made for, or be answered where it knows no position.
    #[test]
    fn positions_follow_from_the_scaling() {
        let scaled = |rope: Value| {
            let mut json = base();
            (json["max_position_embeddings"], json["rope_scaling"]) = (json!(4096), rope);
            ModelConfig::parse(json.to_string().as_bytes(), Path::new("config.json")).unwrap().positions_max
        };
        let yarn = |factor: f64, trained: u64| {
            scaled(json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": trained}))
        };
        assert_eq!(scaled(json!(null)), Some(4096));
        assert_eq!(scaled(json!({"type": "linear", "factor": 2.5})), Some(10_240));
        // Files have the number before it is scaled, or behind.
        assert_eq!((yarn(4.0, 4096), yarn(4.0, 1024)), (Some(16_384), Some(4096)));
        assert_eq!(with("num_experts", json!(6)).unwrap().positions_max, None);
        let canonical = |positions: u64| with("max_position_embeddings", json!(positions)).unwrap().canonical();
        assert_eq!(canonical(64), canonical(128), "it is the same model");
    }

    /// A model that is computed wrongly would be accepted.
    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (field, value, named) in [
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2}), "rope_type"),
            ("rope_parameters", json!({"rope_type": "longrope"}), "rope_type"),
            ("rope_parameters", json!({"rope_type": "yarn", "factor": 4}), "original_max_position_embeddings"),
            ("rope_parameters", json!({"full_attention": {"rope_theta": 1e4}}), "rope_parameters"),
            ("rope_parameters", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            ("eos_token_id", json!(null), "eos_token_id"),
            ("quantization_config", json!({"quant_method": "fp8"}), "quantization_config"),
            ("rope_parameters", json!([1]), "rope_parameters"),
            ("rope_theta", json!(-1), "rope_theta"),
            ("num_experts_per_tok", json!(7), "num_experts_per_tok"),
            ("num_key_value_heads", json!(3), "num_key_value_heads"),
            ("head_dim", json!(9), "head_dim"),
            ("mlp_only_layers", json!([4]), "mlp_only_layers"),
            ("mlp_only_layers", json!(0), "mlp_only_layers"),
            ("norm_topk_prob", json!("yes"), "norm_topk_prob"),
            ("hidden_size", json!(null), "hidden_size"),
            ("num_hidden_layers", json!(5000), "num_hidden_layers"),
            ("eos_token_id", json!(97), "eos_token_id"),
        ] {
            match with(field, value.clone()) {
                Err(ModelError::Config { field, .. }) => assert_eq!(field, named, "{value}"),
                other => panic!("{field} = {value}: {other:?}"),
            }
        }
    }
}
