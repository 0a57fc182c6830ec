//! What decoder-only families have in common: how their config.json reads, and the blocks that it means. A family beside this
//! says what its fields are called, what they are if a file leaves them out, and what of this it has.

use std::path::Path;

use serde_json::{Map, Value};
use sida_routing::LayerId;

use crate::{
    GenerationConfig, ModelConfig, ModelError, ModelSpec, Stack,
    config::{QUANT_METHOD, QUANTIZATION},
    generation::Fields,
    names::TensorNames,
    spec::{
        Activation, AttentionSpec, BlockSpec, FeedForwardSpec, Keys, QkNorm, Rotary, RotaryScaling, RouterSpec,
        SharedSpec, StackSpec,
    },
};

/// What a decoder-only model computes, beside the sizes that every model has.
#[derive(Clone, Debug, PartialEq)]
pub struct Causal {
    /// Of every block, but for its window.
    pub(super) attention: AttentionSpec,
    /// Of each block: how many keys back a query sees.
    pub(super) windows: Vec<Option<usize>>,
    pub(crate) router: RouterSpec,
    pub(super) shared: Option<SharedSpec>,
    /// Width of blocks without experts.
    pub(super) dense_d_ff: usize,
}

/// What a family says of its config.
pub(super) struct Described<'a> {
    /// As `model_type` of config.json.
    pub(super) family: &'static str,
    pub(super) fields: &'a Json<'a>,
    pub(super) names: TensorNames,
    pub(super) num_experts: usize,
    pub(super) expert_d_ff: usize,
    pub(super) head_dim: usize,
    pub(super) rms_norm_eps: f64,
    /// What ends a text where the file does not say.
    pub(super) eos_token_id: Option<u32>,
    /// Which blocks have experts.
    pub(super) sparse: Vec<bool>,
    pub(super) causal: Causal,
}

impl Described<'_> {
    /// Checks what all families share, and makes a [`ModelConfig`] of it.
    pub(super) fn config(self) -> Result<ModelConfig, ModelError> {
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
                let expected = "nothing, or what `sida convert` writes: weights in f32, bf16, f16 or blocks";
                return Err(fields.refuse(QUANTIZATION, found.to_string(), expected));
            }
        }
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

/// The fields of a config.json, each checked as it is read.
pub(super) struct Json<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) path: &'a Path,
}

impl<'a> Json<'a> {
    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn refuse(&self, field: &'static str, found: String, expected: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.to_owned(), field, found, expected: expected.into() }
    }

    /// A whole number; `default` where the file leaves it out, an error if there is none.
    pub(super) fn size(
        &self,
        field: &'static str,
        default: Option<usize>,
        min: u64,
        max: u64,
    ) -> Result<usize, ModelError> {
        let expected = || format!("{min} to {max}");
        match (self.get(field), default) {
            (Some(value), _) => match value.as_u64().filter(|value| (min..=max).contains(value)) {
                Some(value) => Ok(value as usize),
                None => Err(self.refuse(field, value.to_string(), expected())),
            },
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.refuse(field, "nothing".to_owned(), expected())),
        }
    }

    /// A size that may be absent.
    pub(super) fn size_if_any(&self, field: &'static str, min: u64, max: u64) -> Result<Option<usize>, ModelError> {
        self.get(field).map(|_| self.size(field, None, min, max)).transpose()
    }

    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(field, value.to_string(), "true or false")),
        }
    }

    pub(super) fn number(&self, field: &'static str, default: f64, min: f64, max: f64) -> Result<f64, ModelError> {
        Ok(self.number_if_any(field, min, max)?.unwrap_or(default))
    }

    pub(super) fn number_if_any(&self, field: &'static str, min: f64, max: f64) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|value| (min..=max).contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refuse(field, value.to_string(), format!("{min} to {max}"))),
        }
    }

    /// Refuses any other text than this.
    pub(super) fn text(&self, field: &'static str, expected: &str) -> Result<(), ModelError> {
        match self.get(field) {
            Some(value) if value.as_str() != Some(expected) => {
                Err(self.refuse(field, value.to_string(), format!("{expected:?}")))
            }
            _ => Ok(()),
        }
    }

    /// A list of texts or numbers; none where the file leaves it out.
    pub(super) fn list(&self, field: &'static str) -> Result<Option<&'a [Value]>, ModelError> {
        let list = |value: &'a Value| match value.as_array() {
            Some(list) => Ok(&list[..]),
            None => Err(self.refuse(field, value.to_string(), "a list")),
        };
        self.get(field).map(list).transpose()
    }

    /// How many experts a layer has: files have one name for it or the other.
    pub(super) fn experts(&self, default: usize) -> Result<usize, ModelError> {
        let name = if self.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        self.size(name, Some(default), 1, 16_384)
    }

    /// How many blocks there are.
    pub(super) fn blocks(&self) -> Result<usize, ModelError> {
        self.size("num_hidden_layers", None, 1, 1024)
    }

    /// What all families here share of attention: heads, positions. `head_dim` is that of the file, or what follows from the
    /// sizes. `default_kv_heads`: as many as heads if none.
    pub(super) fn attention(
        &self,
        default_theta: f64,
        default_kv_heads: Option<usize>,
    ) -> Result<AttentionSpec, ModelError> {
        let heads = self.size("num_attention_heads", None, 1, 1024)?;
        let kv_heads = self.size("num_key_value_heads", Some(default_kv_heads.unwrap_or(heads)), 1, 1024)?;
        let hidden_size = self.size("hidden_size", None, 1, 65_536)?;
        let head_dim = match self.size_if_any("head_dim", 2, 4096)? {
            Some(head_dim) => head_dim,
            None => hidden_size / heads,
        };
        if head_dim < 2 || head_dim % 2 == 1 {
            return Err(self.refuse("head_dim", head_dim.to_string(), "an even number"));
        }
        Ok(AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            keys: Keys::Cache,
            scale: (head_dim as f64).powf(-0.5) as f32,
            has_bias: false,
            has_output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
            rotary: Some(self.rotary(default_theta)?),
            window: None,
        })
    }

    /// Rotary positions, as releases before transformers 5 write them (`rope_theta`, `rope_scaling`) or as later ones do
    /// (`rope_parameters`).
    fn rotary(&self, default_theta: f64) -> Result<Rotary, ModelError> {
        let nothing = Map::new();
        let object = |field: &'static str| match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => Err(self.refuse(field, other.to_string(), "an object")),
        };
        let scaling = match (object("rope_scaling")?, object("rope_parameters")?) {
            (Some(_), Some(_)) => {
                let expected = "one of rope_parameters and rope_scaling";
                return Err(self.refuse("rope_scaling", "beside rope_parameters".to_owned(), expected));
            }
            (scaling, parameters) => scaling.or(parameters).unwrap_or(&nothing),
        };
        let within = Json { object: scaling, path: self.path };
        let theta = match within.number_if_any("rope_theta", 1.000_001, 1e12)? {
            Some(theta) => theta,
            None => self.number("rope_theta", default_theta, 1.000_001, 1e12)?,
        };
        // No family here turns a part of a head.
        within.number("partial_rotary_factor", 1.0, 1.0, 1.0)?;
        self.number("partial_rotary_factor", 1.0, 1.0, 1.0)?;
        if scaling.values().any(Value::is_object) {
            return Err(self.refuse("rope_parameters", "parameters by layer".to_owned(), "the same for all layers"));
        }
        let trained = || match self.number_if_any("original_max_position_embeddings", 1.0, 1e9)? {
            Some(trained) => Ok(trained),
            None => match within.number_if_any("original_max_position_embeddings", 1.0, 1e9)? {
                Some(trained) => Ok(trained),
                None => match self.number_if_any("max_position_embeddings", 1.0, 1e9)? {
                    Some(trained) => Ok(trained),
                    None => Err(self.refuse("original_max_position_embeddings", "nothing".to_owned(), "a number")),
                },
            },
        };
        let kind = within.get("rope_type").or(within.get("type"));
        let positive = |field| match within.number_if_any(field, 1e-6, 1e9)? {
            Some(value) => Ok(value),
            None => Err(self.refuse(field, "nothing".to_owned(), "a number")),
        };
        let scaling = match kind.and_then(Value::as_str) {
            None if kind.is_none() => RotaryScaling::None,
            Some("default") => RotaryScaling::None,
            Some("linear") => RotaryScaling::Linear { factor: positive("factor")? },
            Some("llama3") => RotaryScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: positive("low_freq_factor")?,
                high_freq_factor: positive("high_freq_factor")?,
                trained: trained()?,
            },
            Some("yarn") => {
                let factor = positive("factor")?;
                let scaled = |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
                let (mscale, all) =
                    (within.number_if_any("mscale", 0.0, 1e6)?, within.number_if_any("mscale_all_dim", 0.0, 1e6)?);
                let attention_factor = match (within.number_if_any("attention_factor", 0.0, 1e6)?, mscale, all) {
                    (Some(factor), ..) => factor,
                    (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scaled(mscale) / scaled(all),
                    _ => scaled(1.0),
                };
                RotaryScaling::Yarn {
                    factor,
                    beta_fast: within.number("beta_fast", 32.0, 1e-6, 1e6)?,
                    beta_slow: within.number("beta_slow", 1.0, 1e-6, 1e6)?,
                    trained: trained()?,
                    attention_factor,
                    truncate: within.flag("truncate", true)?,
                }
            }
            _ => {
                let found = kind.map_or_else(String::new, Value::to_string);
                return Err(self.refuse("rope_type", found, "default, linear, llama3 or yarn"));
            }
        };
        Ok(Rotary { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
