//! What a GGUF file says of a model, as the config.json that transformers has for its family.

use serde_json::{Map, Value, json};

use super::{files::Files, metadata::Metadata};
use crate::convert::ConvertError;

/// A family of models, by what GGUF calls it.
pub(super) struct Family {
    /// `general.architecture`, which all its keys begin with.
    name: &'static str,
    /// What transformers calls its class and its kind of config.
    class: &'static str,
    model_type: &'static str,
    /// What its config calls the number of experts and the width of one.
    experts: &'static str,
    expert_width: &'static str,
    /// Whether the weights of a row's experts are divided by their sum where a file does not say.
    normalises: bool,
    /// Whether the rows of queries and keys are in an order of their own (see `tensors`).
    pub(super) turns_rows: bool,
}

const FAMILIES: [Family; 4] = [
    Family {
        name: "qwen3moe",
        class: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        experts: "num_experts",
        expert_width: "moe_intermediate_size",
        normalises: true,
        turns_rows: false,
    },
    Family {
        name: "qwen2moe",
        class: "Qwen2MoeForCausalLM",
        model_type: "qwen2_moe",
        experts: "num_experts",
        expert_width: "moe_intermediate_size",
        normalises: false,
        turns_rows: false,
    },
    Family {
        name: "olmoe",
        class: "OlmoeForCausalLM",
        model_type: "olmoe",
        experts: "num_experts",
        expert_width: "intermediate_size",
        normalises: false,
        turns_rows: false,
    },
    // Mixtral, that is: one with experts.
    Family {
        name: "llama",
        class: "MixtralForCausalLM",
        model_type: "mixtral",
        experts: "num_local_experts",
        expert_width: "intermediate_size",
        normalises: true,
        turns_rows: true,
    },
];

const ARCHITECTURE: &str = "general.architecture";
/// What kind of file it is, if that is said, and of which only models are read.
const KIND: &str = "general.type";
/// What would change what a model computes, and what says that it does not: no family of these has more of it.
const NEUTRAL: [(&str, &[f64]); 13] = [
    ("attention.scale", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("router_logit_softcapping", &[0.0]),
    ("interleave_moe_layer_step", &[0.0, 1.0]),
    ("expert_group_count", &[0.0, 1.0]),
    ("expert_group_used_count", &[0.0, 1.0]),
    ("rope.scaling.yarn_attn_factor", &[1.0]),
    ("rope.scaling.yarn_ext_factor", &[-1.0, 1.0]),
];
/// Rotary positions turn by powers of this where a file does not say.
const ROPE_BASE: f64 = 10_000.0;
/// What GGUF calls a softmax over experts.
const SOFTMAX: usize = 1;

/// The family of a file.
pub(super) fn family(meta: &Metadata<'_>) -> Result<&'static Family, ConvertError> {
    if let Some(kind) = meta.text_if_any(KIND)?.filter(|&kind| kind != "model") {
        return Err(meta.refuse(KIND, kind.to_owned(), "model"));
    }
    let found = meta.text(ARCHITECTURE)?;
    let expected = || FAMILIES.map(|family| family.name).join(", ");
    FAMILIES
        .iter()
        .find(|family| family.name == found)
        .ok_or_else(|| meta.refuse(ARCHITECTURE, found.to_owned(), expected()))
}

/// The config of the model in a file, but for its tokens.
pub(super) fn config(files: &Files, family: &Family) -> Result<Map<String, Value>, ConvertError> {
    let meta = files.metadata();
    let key = |of: &str| format!("{}.{of}", family.name);
    let (heads, width) = (meta.size(&key("attention.head_count"))?, meta.size(&key("embedding_length"))?);
    let kv_heads = meta.size_if_any(&key("attention.head_count_kv"))?.unwrap_or(heads);
    let head_dim = match meta.size_if_any(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => width / heads.max(1),
    };
    for of in ["attention.value_length", "rope.dimension_count"] {
        refuse_other(&meta, &key(of), head_dim)?;
    }
    refuse_other(&meta, &key("expert_gating_func"), SOFTMAX)?;
    refuse_other(&meta, &key("attention.sliding_window"), 0)?;
    refuse_other(&meta, &key("leading_dense_block_count"), 0)?;
    if let Some(scale) = meta.number_if_any(&key("expert_weights_scale"))?.filter(|&scale| scale != 0.0 && scale != 1.0)
    {
        return Err(meta.refuse(&key("expert_weights_scale"), scale.to_string(), "nothing, or 1"));
    }
    for (of, neutral) in NEUTRAL {
        let found = meta.number_if_any(&key(of))?.filter(|found| !neutral.contains(found));
        if let Some(found) = found {
            return Err(meta.refuse(&key(of), found.to_string(), format!("nothing, or {}", neutral[0])));
        }
    }
    if meta.flag_if_any(&key("attention.causal"))? == Some(false) {
        return Err(meta.refuse(&key("attention.causal"), "false".to_owned(), "nothing, or true"));
    }
    let sections = key("rope.dimension_sections");
    if meta.integers_if_any(&sections)?.is_some_and(|sections| sections.iter().any(|&section| section != 0)) {
        return Err(meta.refuse(&sections, "a list of sizes".to_owned(), "nothing: positions are of texts"));
    }
    let experts = meta.size_if_any(&key("expert_count"))?.unwrap_or(0);
    if experts == 0 {
        return Err(meta.refuse(&key("expert_count"), "missing or 0".to_owned(), "a model with experts"));
    }
    let shape = |tensor: &str| files.tensors().get(tensor).map(|tensor| &*tensor.shape);
    let missing = |tensor: &str| ConvertError::Gguf {
        file: files.path().to_owned(),
        reason: format!("tensor {tensor} is missing"),
    };
    let embedding = "token_embd.weight";
    let vocab_size = shape(embedding).ok_or_else(|| missing(embedding))?[0];
    let expert_width = match meta.size_if_any(&key("expert_feed_forward_length"))? {
        Some(width) => width,
        // Files of some families give only one width, older ones that of another part: what is stored counts.
        None => {
            let of = ["blk.0.ffn_down_exps.weight", "blk.0.ffn_down.0.weight"].into_iter().find_map(shape);
            of.and_then(<[usize]>::last).copied().ok_or_else(|| missing("blk.0.ffn_down_exps.weight"))?
        }
    };
    let mut config = Map::new();
    let mut set = |field: &str, value: Value| _ = config.insert(field.to_owned(), value);
    set("architectures", json!([family.class]));
    set("model_type", family.model_type.into());
    set("hidden_act", "silu".into());
    set("hidden_size", width.into());
    set("num_hidden_layers", meta.size(&key("block_count"))?.into());
    set("num_attention_heads", heads.into());
    set("num_key_value_heads", kv_heads.into());
    set("head_dim", head_dim.into());
    set("vocab_size", vocab_size.into());
    set("max_position_embeddings", meta.size(&key("context_length"))?.into());
    set("rms_norm_eps", meta.number(&key("attention.layer_norm_rms_epsilon"))?.into());
    set("rope_theta", meta.number_if_any(&key("rope.freq_base"))?.unwrap_or(ROPE_BASE).into());
    set("rope_scaling", rope_scaling(&meta, family)?);
    set("tie_word_embeddings", shape("output.weight").is_none().into());
    set(family.experts, experts.into());
    set("num_experts_per_tok", meta.size(&key("expert_used_count"))?.into());
    set(family.expert_width, expert_width.into());
    let normalises = meta.flag_if_any(&key("expert_weights_norm"))?.unwrap_or(family.normalises);
    let has_bias = Value::from(shape("blk.0.attn_q.bias").is_some());
    match family.model_type {
        "mixtral" if !normalises => {
            return Err(meta.refuse(&key("expert_weights_norm"), "false".to_owned(), "true, as of every Mixtral"));
        }
        "mixtral" => set("sliding_window", Value::Null),
        "olmoe" => {
            set("norm_topk_prob", normalises.into());
            set("attention_bias", has_bias);
            set("clip_qkv", meta.number_if_any(&key("attention.clamp_kqv"))?.filter(|&clip| clip != 0.0).into());
        }
        _ => {
            set("norm_topk_prob", normalises.into());
            let dense = meta.size_if_any(&key("feed_forward_length"))?.filter(|&width| width > 0);
            set("intermediate_size", dense.unwrap_or(expert_width).into());
            set("decoder_sparse_step", 1.into());
            set("mlp_only_layers", json!([]));
            set("use_sliding_window", false.into());
            if family.model_type == "qwen2_moe" {
                let shared = match meta.size_if_any(&key("expert_shared_feed_forward_length"))? {
                    Some(width) => width,
                    None => {
                        let tensor = "blk.0.ffn_down_shexp.weight";
                        shape(tensor).and_then(<[usize]>::last).copied().ok_or_else(|| missing(tensor))?
                    }
                };
                set("shared_expert_intermediate_size", shared.into());
                set("qkv_bias", has_bias);
            } else {
                set("attention_bias", has_bias);
            }
        }
    }
    Ok(config)
}

/// Refuses a number that is there and another than what this family has.
fn refuse_other(meta: &Metadata<'_>, key: &str, expected: usize) -> Result<(), ConvertError> {
    match meta.size_if_any(key)? {
        Some(found) if found != expected => Err(meta.refuse(key, found.to_string(), expected.to_string())),
        _ => Ok(()),
    }
}

/// How positions beyond those of the training are reached.
fn rope_scaling(meta: &Metadata<'_>, family: &Family) -> Result<Value, ConvertError> {
    let key = |of: &str| format!("{}.rope.{of}", family.name);
    let kind = meta.text_if_any(&key("scaling.type"))?;
    let factor = match meta.number_if_any(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => meta.number_if_any(&key("scale_linear"))?,
    };
    if let Some(factor) = meta.number_if_any(&key("scaling.attn_factor"))?.filter(|&factor| factor != 1.0) {
        return Err(meta.refuse(&key("scaling.attn_factor"), factor.to_string(), "nothing, or 1"));
    }
    let needed = |factor: Option<f64>| {
        factor.ok_or_else(|| meta.refuse(&key("scaling.factor"), "missing".to_owned(), "a number"))
    };
    match kind {
        None if factor.is_none_or(|factor| factor == 1.0 || factor == 0.0) => Ok(Value::Null),
        Some("none") => Ok(Value::Null),
        None | Some("linear") => Ok(json!({"rope_type": "linear", "factor": needed(factor)?})),
        Some("yarn") => {
            let mut scaling = json!({"rope_type": "yarn", "factor": needed(factor)?});
            let trained = meta.size_if_any(&key("scaling.original_context_length"))?;
            let fields = [
                ("original_max_position_embeddings", trained.map(Value::from)),
                ("beta_fast", meta.number_if_any(&key("scaling.yarn_beta_fast"))?.map(Value::from)),
                ("beta_slow", meta.number_if_any(&key("scaling.yarn_beta_slow"))?.map(Value::from)),
            ];
            fields.into_iter().filter_map(|(field, value)| Some((field, value?))).for_each(|(field, value)| {
                scaling[field] = value;
            });
            Ok(scaling)
        }
        Some(other) => Err(meta.refuse(&key("scaling.type"), format!("{other:?}"), "none, linear or yarn")),
    }
}
