//! What a model of a given shape consists of: its config and every tensor, of a Switch Transformer with the scale
//! transformers initialises it by. Called by [`super::synth`].

use serde_json::json;

use super::{
    SynthError,
    causal::{self, CausalShape},
    random::Signs,
};
use crate::{StoredDType, shards::TensorSpec};

/// The shape of a model.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum SynthShape {
    Switch(SwitchShape),
    Causal(Box<CausalShape>),
}

/// The shape of a Switch Transformer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SwitchShape {
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_heads: usize,
    pub encoder_layers: usize,
    pub decoder_layers: usize,
    /// Every so-manieth block is sparse, the last of each run (0: none).
    pub sparse_step: usize,
    pub num_experts: usize,
    pub expert_capacity: usize,
    pub vocab_size: usize,
}

/// The published shapes of Switch Transformers, without Google's prefix.
const SWITCH: [&str; 7] = [
    "switch-base-8",
    "switch-base-16",
    "switch-base-32",
    "switch-base-64",
    "switch-base-128",
    "switch-base-256",
    "switch-large-128",
];

/// All published shapes.
pub fn published() -> impl Iterator<Item = &'static str> {
    SWITCH.into_iter().chain(causal::PUBLISHED)
}

impl SynthShape {
    /// One of [`published`].
    pub fn published(name: &str) -> Result<Self, SynthError> {
        if let Some(causal) = CausalShape::published(name) {
            return Ok(Self::Causal(Box::new(causal?)));
        }
        let switch = SwitchShape::published(name).ok_or_else(|| SynthError::Shape { found: name.to_owned() })?;
        Ok(Self::Switch(switch))
    }

    /// The same with so many blocks, of a decoder-only model: what of a large one fits a small machine.
    pub fn with_blocks(self, blocks: usize) -> Result<Self, SynthError> {
        match self {
            Self::Causal(shape) => Ok(Self::Causal(Box::new(shape.with_blocks(blocks)?))),
            Self::Switch(_) => Err(SynthError::NoBlocks),
        }
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        self.weights().iter().map(|weight| weight.spec.bytes()).sum()
    }

    pub(super) fn weights(&self) -> Vec<Weight> {
        match self {
            Self::Switch(shape) => shape.weights(),
            Self::Causal(shape) => shape.weights(),
        }
    }

    pub(super) fn config(&self) -> serde_json::Value {
        match self {
            Self::Switch(shape) => shape.config(),
            Self::Causal(shape) => shape.json(),
        }
    }

    pub(super) fn vocab_size(&self) -> usize {
        match self {
            Self::Switch(shape) => shape.vocab_size,
            Self::Causal(shape) => shape.vocab_size(),
        }
    }
}

impl SwitchShape {
    /// One of [`SWITCH`] (the config.json of google/switch-base-* and google/switch-large-128).
    fn published(name: &str) -> Option<Self> {
        let (size, experts) = name.rsplit_once('-').filter(|_| SWITCH.contains(&name))?;
        let base = Self {
            d_model: 768,
            d_kv: 64,
            d_ff: 3072,
            num_heads: 12,
            encoder_layers: 12,
            decoder_layers: 12,
            sparse_step: 2,
            num_experts: experts.parse().ok()?,
            expert_capacity: 64,
            vocab_size: 32128,
        };
        Some(match size {
            "switch-base" => base,
            _ => Self { d_model: 1024, d_ff: 4096, num_heads: 16, encoder_layers: 24, decoder_layers: 24, ..base },
        })
    }

    /// Whether a block is sparse (transformers, SwitchTransformersStack).
    fn is_sparse(&self, block: usize) -> bool {
        self.sparse_step == 1 || self.sparse_step > 1 && block % self.sparse_step == 1
    }

    fn config(&self) -> serde_json::Value {
        let sparse = |layers: usize| (0..layers).filter(|&block| self.is_sparse(block)).count();
        json!({
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": "switch_transformers",
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_heads": self.num_heads,
            "num_layers": self.encoder_layers,
            "num_decoder_layers": self.decoder_layers,
            "num_experts": self.num_experts,
            "expert_capacity": self.expert_capacity,
            "encoder_sparse_step": self.sparse_step,
            "decoder_sparse_step": self.sparse_step,
            "num_sparse_encoder_layers": sparse(self.encoder_layers),
            "num_sparse_decoder_layers": sparse(self.decoder_layers),
            "router_bias": false,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": false,
            "router_type": "tokens_masked",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "is_encoder_decoder": true,
            "tie_word_embeddings": true,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "torch_dtype": "bfloat16",
        })
    }

    /// Every tensor, and how transformers would initialise it (SwitchTransformersPreTrainedModel,
    /// `_init_weights`, factor 1).
    fn weights(&self) -> Vec<Weight> {
        let mut weights = vec![Weight::normal("shared.weight".to_owned(), [self.vocab_size, self.d_model], 1.0)];
        for (stack, layers, attentions) in [
            ("encoder", self.encoder_layers, &["SelfAttention"][..]),
            ("decoder", self.decoder_layers, &["SelfAttention", "EncDecAttention"]),
        ] {
            weights.push(Weight::ones(format!("{stack}.final_layer_norm.weight"), self.d_model));
            let inverse_root = (self.d_model as f64).powf(-0.5);
            let bias = format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
            weights.push(Weight::normal(bias, [32, self.num_heads], inverse_root));
            for block in 0..layers {
                for (layer, attention) in attentions.iter().enumerate() {
                    self.attention(&format!("{stack}.block.{block}.layer.{layer}"), attention, &mut weights);
                }
                self.feed_forward(&format!("{stack}.block.{block}.layer.{}", attentions.len()), block, &mut weights);
            }
        }
        weights
    }

    fn attention(&self, layer: &str, attention: &str, weights: &mut Vec<Weight>) {
        let (d, inner) = (self.d_model as f64, self.num_heads * self.d_kv);
        weights.push(Weight::ones(format!("{layer}.layer_norm.weight"), self.d_model));
        let matrices = [
            ("q", [inner, self.d_model], (d * self.d_kv as f64).powf(-0.5)),
            ("k", [inner, self.d_model], d.powf(-0.5)),
            ("v", [inner, self.d_model], d.powf(-0.5)),
            ("o", [self.d_model, inner], (inner as f64).powf(-0.5)),
        ];
        for (matrix, shape, deviation) in matrices {
            weights.push(Weight::normal(format!("{layer}.{attention}.{matrix}.weight"), shape, deviation));
        }
    }

    fn feed_forward(&self, layer: &str, block: usize, weights: &mut Vec<Weight>) {
        let inverse_root = (self.d_model as f64).powf(-0.5);
        weights.push(Weight::ones(format!("{layer}.layer_norm.weight"), self.d_model));
        let experts = if self.is_sparse(block) {
            weights.push(Weight::router(
                format!("{layer}.mlp.router.classifier.weight"),
                [self.num_experts, self.d_model],
            ));
            (0..self.num_experts).map(|expert| format!("experts.expert_{expert}.")).collect()
        } else {
            vec![String::new()]
        };
        // An expert's wo is initialised by d_model, a dense block's by d_ff.
        let wo = if self.is_sparse(block) { inverse_root } else { (self.d_ff as f64).powf(-0.5) };
        for expert in experts {
            let name = |matrix| format!("{layer}.mlp.{expert}{matrix}.weight");
            weights.push(Weight::normal(name("wi"), [self.d_ff, self.d_model], inverse_root));
            weights.push(Weight::normal(name("wo"), [self.d_model, self.d_ff], wo));
        }
    }
}

/// A tensor and what fills it.
pub(super) struct Weight {
    pub(super) spec: TensorSpec,
    pub(super) fill: Fill,
}

#[derive(Clone, Copy)]
pub(super) enum Fill {
    Ones,
    /// Mean 0, this standard deviation.
    Normal(f64),
    /// Standard normal.
    Router,
    /// As [`super::zipf`] says: (ids, d_model).
    Embedding,
    /// As [`super::zipf`] says: what adds to the hidden states, (d_model, columns).
    Output {
        deviation: f64,
        signs: Signs,
    },
    /// As [`super::zipf`] says: a router whose biases are in this unit.
    Biased {
        unit: f64,
    },
}

impl Weight {
    pub(super) fn normal(name: String, shape: [usize; 2], deviation: f64) -> Self {
        let spec = TensorSpec { name, dtype: StoredDType::BF16, shape: shape.to_vec() };
        Self { spec, fill: Fill::Normal(deviation) }
    }

    pub(super) fn ones(name: String, len: usize) -> Self {
        Self { spec: TensorSpec { name, dtype: StoredDType::BF16, shape: vec![len] }, fill: Fill::Ones }
    }

    pub(super) fn bias(name: String, len: usize) -> Self {
        Self { spec: TensorSpec { name, dtype: StoredDType::BF16, shape: vec![len] }, fill: Fill::Normal(0.1) }
    }

    fn router(name: String, shape: [usize; 2]) -> Self {
        let spec = TensorSpec { name, dtype: StoredDType::F32, shape: shape.to_vec() };
        Self { spec, fill: Fill::Router }
    }
}
