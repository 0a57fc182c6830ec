//! Switch Transformers (Fedus et al., 2021) as transformers' SwitchTransformersForConditionalGeneration:
//! T5 with a mixture of ReLU experts, top-1, in some of its blocks.

use std::path::Path;

use serde::Deserialize;
use sida_routing::LayerId;

use super::{Family, json::Json};
use crate::{
    GenerationConfig, ModelConfig, ModelError, ModelSpec, Stack,
    generation::Fields,
    names::TensorNames,
    spec::{Activation, AttentionSpec, BlockSpec, FeedForwardSpec, Keys, QkNorm, RelativeBias, RouterSpec, StackSpec},
};

pub(super) const FAMILY: Family = Family { architecture: "SwitchTransformersForConditionalGeneration", config };

/// The fields of config.json that change what the model computes, with the defaults of transformers'
/// SwitchTransformersConfig where a file may leave them out. Shapes have none: a guess would only fail later.
#[derive(Deserialize)]
pub(super) struct SwitchJson {
    vocab_size: u64,
    d_model: u64,
    d_kv: u64,
    d_ff: u64,
    num_layers: u64,
    num_decoder_layers: Option<u64>,
    num_heads: u64,
    num_experts: u64,
    #[serde(default = "three")]
    num_sparse_encoder_layers: u64,
    #[serde(default = "three")]
    num_sparse_decoder_layers: u64,
    encoder_sparse_step: Option<u64>,
    decoder_sparse_step: Option<u64>,
    #[serde(default = "sixty_four")]
    expert_capacity: u64,
    #[serde(default)]
    router_bias: bool,
    router_dtype: Option<String>,
    router_type: Option<String>,
    #[serde(default = "thirty_two")]
    relative_attention_num_buckets: u64,
    #[serde(default = "one_hundred_twenty_eight")]
    relative_attention_max_distance: u64,
    #[serde(default = "epsilon")]
    layer_norm_epsilon: f64,
    dense_act_fn: Option<String>,
    feed_forward_proj: Option<String>,
    #[serde(default)]
    is_gated_act: bool,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
}

fn three() -> u64 {
    3
}
fn sixty_four() -> u64 {
    64
}
fn thirty_two() -> u64 {
    32
}
fn one_hundred_twenty_eight() -> u64 {
    128
}
fn epsilon() -> f64 {
    1e-6
}
fn yes() -> bool {
    true
}

/// Checks every field and makes a [`ModelConfig`] of them.
fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    let &Json { object, path } = fields;
    let invalid = |source| ModelError::Json { path: path.to_owned(), source };
    let json = SwitchJson::deserialize(object).map_err(invalid)?;
    let check = Check { path };
    check.activation(&json)?;
    check.text("router_dtype", json.router_dtype.as_deref(), "float32")?;
    check.text("router_type", json.router_type.as_deref(), "tokens_masked")?;
    let vocab_size = check.within("vocab_size", json.vocab_size, 2, 4_000_000)?;
    let tokens = Fields { json: object, path, vocab_size };
    let encoder_layers = check.within("num_layers", json.num_layers, 1, 1024)?;
    let decoder_layers =
        check.within("num_decoder_layers", json.num_decoder_layers.unwrap_or(json.num_layers), 1, 1024)?;
    let buckets = check.within("relative_attention_num_buckets", json.relative_attention_num_buckets, 4, 4096)?;
    let pad_token_id = tokens.token("pad_token_id")?.unwrap_or(0);
    let eos_token_ids = Some(tokens.tokens("eos_token_id")?).filter(|ids| !ids.is_empty()).unwrap_or_else(|| vec![1]);
    Ok(ModelConfig {
        family: "switch_transformers",
        top_k: 1,
        router_bias: json.router_bias,
        vocab_size,
        d_model: check.within("d_model", json.d_model, 1, 65_536)?,
        d_kv: check.within("d_kv", json.d_kv, 1, 4096)?,
        d_ff: check.within("d_ff", json.d_ff, 1, 1 << 20)?,
        num_heads: check.within("num_heads", json.num_heads, 1, 1024)?,
        encoder_layers,
        decoder_layers,
        num_experts: check.within("num_experts", json.num_experts, 1, 16_384)?,
        expert_capacity: check.within("expert_capacity", json.expert_capacity, 0, 1 << 32)?,
        relative_attention_num_buckets: buckets,
        // Half of a causal stack's buckets count single steps; the logarithmic rest must begin beyond them.
        relative_attention_max_distance: check.within(
            "relative_attention_max_distance",
            json.relative_attention_max_distance,
            buckets as u64 / 2 + 1,
            1 << 16,
        )?,
        layer_norm_epsilon: check.epsilon(json.layer_norm_epsilon)?,
        positions_max: None, // Its position bias goes on for ever.
        tie_word_embeddings: json.tie_word_embeddings,
        pad_token_id,
        generation: GenerationConfig::plain(pad_token_id, eos_token_ids.clone()),
        eos_token_ids,
        encoder_sparse: sparse(encoder_layers, json.encoder_sparse_step, json.num_sparse_encoder_layers),
        decoder_sparse: sparse(decoder_layers, json.decoder_sparse_step, json.num_sparse_decoder_layers),
        activation: Activation::Relu,
        names: TensorNames::Switch,
        causal: None,
    })
}

/// An encoder, and a decoder that attends to it.
pub(super) fn spec(config: &ModelConfig) -> ModelSpec {
    let attention = |keys| AttentionSpec {
        heads: config.num_heads,
        kv_heads: config.num_heads,
        head_dim: config.d_kv,
        keys,
        scale: 1.0,
        has_bias: false,
        has_output_bias: false,
        qk_norm: QkNorm::None,
        clip: None,
        rotary: None,
        window: None,
    };
    let stack = |stack: Stack| {
        let (keys, cross) = match stack {
            Stack::Encoder => (Keys::Rows, None),
            Stack::Decoder => (Keys::Cache, Some(attention(Keys::Input))),
        };
        let mut layers = config.moe_layers(stack).map(LayerId);
        let blocks = config.sparse(stack).iter().map(|is_sparse| {
            let layer = if *is_sparse { layers.next() } else { None };
            let dense = FeedForwardSpec::Dense { d_ff: config.d_ff, activation: Activation::Relu };
            let feed_forward = layer.map_or(dense, |layer| FeedForwardSpec::Moe {
                layer,
                experts: config.num_experts,
                router: RouterSpec { top_k: config.top_k, has_bias: config.router_bias, is_normalised: false },
                shared: None,
            });
            BlockSpec { attention: attention(keys), cross, feed_forward }
        });
        let positions = RelativeBias {
            buckets: config.relative_attention_num_buckets,
            max_distance: config.relative_attention_max_distance,
            is_bidirectional: stack == Stack::Encoder,
        };
        StackSpec { positions: Some(positions), blocks: blocks.collect() }
    };
    // A head that is the embedding was not made for this: its input is scaled down.
    let head_scale = if config.tie_word_embeddings { (config.d_model as f64).powf(-0.5) as f32 } else { 1.0 };
    ModelSpec {
        vocab_size: config.vocab_size,
        d_model: config.d_model,
        norm_epsilon: config.layer_norm_epsilon as f32,
        head_scale,
        encoder: stack(Stack::Encoder),
        decoder: stack(Stack::Decoder),
    }
}

/// Which of `layers` blocks are sparse, as transformers' SwitchTransformersStack decides it: a stored step
/// wins over the one derived from the number of sparse layers, and without sparse layers the derived step is
/// `layers`, which still makes block 1 sparse.
fn sparse(layers: usize, step: Option<u64>, num_sparse: u64) -> Vec<bool> {
    let layers = layers as u64;
    let step = step.unwrap_or_else(|| layers.checked_div(num_sparse).unwrap_or(layers));
    (0..layers).map(|block| step == 1 || (step > 0 && block % step == 1)).collect()
}

/// Checks fields of one file.
struct Check<'a> {
    path: &'a Path,
}

impl Check<'_> {
    fn refuse(&self, field: &'static str, found: String, expected: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.to_owned(), field, found, expected: expected.into() }
    }

    fn within(&self, field: &'static str, value: u64, min: u64, max: u64) -> Result<usize, ModelError> {
        match usize::try_from(value) {
            Ok(size) if (min..=max).contains(&value) => Ok(size),
            _ => Err(self.refuse(field, value.to_string(), format!("{min} to {max}"))),
        }
    }

    fn epsilon(&self, value: f64) -> Result<f64, ModelError> {
        if (0.0..1.0).contains(&value) {
            Ok(value)
        } else {
            Err(self.refuse("layer_norm_epsilon", value.to_string(), "at least 0 and below 1"))
        }
    }

    fn text(&self, field: &'static str, found: Option<&str>, expected: &str) -> Result<(), ModelError> {
        match found {
            Some(found) if found != expected => Err(self.refuse(field, format!("{found:?}"), format!("{expected:?}"))),
            _ => Ok(()),
        }
    }

    /// Older files say `feed_forward_proj`, newer ones `dense_act_fn`; all must mean the ungated ReLU.
    fn activation(&self, json: &SwitchJson) -> Result<(), ModelError> {
        self.text("feed_forward_proj", json.feed_forward_proj.as_deref(), "relu")?;
        self.text("dense_act_fn", json.dense_act_fn.as_deref(), "relu")?;
        if json.is_gated_act {
            return Err(self.refuse("is_gated_act", "true".into(), "false: gated feed-forwards are not supported"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": [FAMILY.architecture], "vocab_size": 8192, "d_model": 128, "d_kv": 32, "d_ff": 512,
            "num_layers": 6, "num_heads": 4, "num_experts": 8,
        })
    }

    fn with(field: &str, value: Value) -> Result<ModelConfig, ModelError> {
        let mut json = base();
        json[field] = value;
        parse(&json)
    }

    fn parse(json: &Value) -> Result<ModelConfig, ModelError> {
        ModelConfig::parse(json.to_string().as_bytes(), Path::new("config.json"))
    }

    /// A config that leaves fields out would be read with other defaults than transformers'.
    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse(&base()).unwrap();
        assert_eq!(config.encoder_sparse, [false, true, false, true, false, true]);
        assert_eq!(config.decoder_layers, 6);
        assert_eq!((config.expert_capacity, config.eos_token_ids), (64, vec![1]));
        assert_eq!(config.generation, GenerationConfig::plain(0, vec![1]));
        let padded = with("pad_token_id", json!(5)).unwrap();
        assert_eq!(padded.generation.decoder_start_token_id, 5, "a decoder starts from padding");
        assert_eq!(with("eos_token_id", json!([9, 2, 9])).unwrap().generation.eos_token_ids, [2, 9]);
        assert!(config.tie_word_embeddings && !config.router_bias);
    }

    /// The wrong blocks would look for experts.
    #[test]
    fn sparse_blocks_follow_the_step() {
        assert_eq!(sparse(4, Some(1), 0), [true; 4]);
        assert_eq!(sparse(4, Some(0), 3), [false; 4]);
        assert_eq!(sparse(5, Some(3), 9), [false, true, false, false, true]);
        assert_eq!(sparse(4, None, 0), [false, true, false, false]);
        assert_eq!(sparse(2, None, 3), [false, false]);
    }

    /// A model we compute wrongly, or a number that overflows later, would be accepted.
    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (field, value) in [
            ("is_gated_act", json!(true)),
            ("feed_forward_proj", json!("gated-gelu")),
            ("dense_act_fn", json!("gelu")),
            ("router_dtype", json!("bfloat16")),
            ("vocab_size", json!(0)),
            ("d_model", json!(u64::MAX)),
            ("num_heads", json!(0)),
            ("num_experts", json!(1u64 << 40)),
            ("num_decoder_layers", json!(0)),
            ("relative_attention_num_buckets", json!(3)),
            ("relative_attention_max_distance", json!(16)),
            // Every distance up to it takes a number for each head.
            ("relative_attention_max_distance", json!((1 << 16) + 1)),
            ("layer_norm_epsilon", json!(-1.0)),
            ("eos_token_id", json!(8192)),
            ("eos_token_id", json!([1, -1])),
            ("eos_token_id", json!("</s>")),
            ("pad_token_id", json!(1.5)),
            ("decoder_start_token_id", json!(8192)),
            ("suppress_tokens", json!([1, 8192])),
        ] {
            match with(field, value) {
                Err(ModelError::Config { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        assert!(matches!(with("architectures", json!(["LlamaForCausalLM"])), Err(ModelError::Architecture { .. })));
        assert!(matches!(with("architectures", json!(null)), Err(ModelError::Json { .. })));
        assert!(matches!(with("d_model", json!("wide")), Err(ModelError::Json { .. })));
        assert!(matches!(with("d_model", json!(-5)), Err(ModelError::Json { .. })));
    }
}
