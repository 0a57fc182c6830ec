//! The config of a model, checked: the sizes that everything around it asks for, and how it writes. What the model
//! computes is made of it: [`ModelConfig::spec`]. Read once by [`crate::Checkpoint`].

use std::{fmt::Write as _, ops::Range, path::Path};

use serde_json::{Map, Value, json};
use sida_routing::LayerId;

use crate::{
    GenerationConfig, ModelError, ModelSpec, bounded_file,
    family::{self, Family},
    generation::GENERATION_CONFIG,
    names::TensorNames,
    spec::Activation,
};

/// The field of a config that says how weights are stored, if not one by one, and what ours is called there: see
/// [`sida_kernels::dtype`].
pub(crate) const QUANTIZATION: &str = "quantization_config";
pub(crate) const QUANT_METHOD: &str = "sida";
/// What that field is in a model that stores some of its weights in blocks.
pub(crate) fn quantization() -> Value {
    json!({"quant_method": QUANT_METHOD})
}
/// The config's name in a model directory.
pub(crate) const CONFIG: &str = "config.json";
/// The longest config.json that is read, and the longest generation_config.json.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// One of a model's stacks of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stack {
    /// Reads the whole input at once.
    Encoder,
    /// Reads and writes token by token.
    Decoder,
}

/// A model's config, checked: every number is within the limits of `family`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What its family is called, as `model_type` of config.json.
    pub family: &'static str,
    /// Experts that each router chooses per token.
    pub top_k: usize,
    /// Whether routers add a bias to their logits.
    pub router_bias: bool,
    /// Tokens the model knows; ids are below it.
    pub vocab_size: usize,
    /// Width of a hidden state.
    pub d_model: usize,
    /// Width of one attention head. Not always `d_model / num_heads`.
    pub d_kv: usize,
    /// Inner width of an expert, and where there is an encoder of a dense feed-forward block.
    pub d_ff: usize,
    /// Attention heads per block.
    pub num_heads: usize,
    /// Blocks of the encoder.
    pub encoder_layers: usize,
    /// Blocks of the decoder.
    pub decoder_layers: usize,
    /// Experts of each MoE layer.
    pub num_experts: usize,
    /// Tokens of one sequence that one expert takes, where capacity is enforced.
    pub expert_capacity: usize,
    /// Buckets of the relative position bias.
    pub relative_attention_num_buckets: usize,
    /// Distance from which all positions share a bucket.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in every norm.
    pub layer_norm_epsilon: f64,
    /// The tokens of a sequence at most, prompt and answer: what the model was made for. `None`: no such number is known.
    pub positions_max: Option<usize>,
    /// Whether the head is the embedding. Then Switch Transformers scale its input by `d_model^-0.5`.
    pub tie_word_embeddings: bool,
    /// The padding token; never in a batch of ours.
    pub pad_token_id: u32,
    /// The tokens that end a text that is read: the tokenizer's last is one of them. Those that end an answer are
    /// `generation`'s.
    pub eos_token_ids: Vec<u32>,
    /// How it writes.
    pub generation: GenerationConfig,
    /// For each encoder block, whether its feed-forward is an MoE layer.
    /// Invariant: `encoder_layers` long.
    pub encoder_sparse: Vec<bool>,
    /// For each decoder block, whether its feed-forward is an MoE layer.
    /// Invariant: `decoder_layers` long.
    pub decoder_sparse: Vec<bool>,
    /// What experts do between their matrices.
    pub activation: Activation,
    /// What its tensors are called.
    pub names: TensorNames,
    /// What a decoder-only model computes; `None` where that follows from the fields above.
    pub causal: Option<Box<family::Causal>>,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory, whose `architectures` picks the family, and `generation_config.json` if it
    /// is there.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::open_checked(dir, &[], |_, _| Ok(()))
    }

    /// Reads `config.json` alone, and with it the fields of it that say how the model writes.
    pub fn open_alone(dir: &Path) -> Result<Self, ModelError> {
        Ok(Self::read(dir, &[])?.0)
    }

    /// `config.json`, and its content.
    fn read(dir: &Path, own: &[Family]) -> Result<(Self, Vec<u8>), ModelError> {
        let path = dir.join(CONFIG);
        let json = bounded_file::read(&path, CONFIG_BYTES_MAX)?;
        Ok((Self::parse_with_families(&json, &path, own)?, json))
    }

    /// As [`ModelConfig::open`], and has each file's name and content looked at; none is the content of a file that is not
    /// there. Knows the caller's `own` families, too.
    pub(crate) fn open_checked(
        dir: &Path,
        own: &[Family],
        check: impl Fn(&str, Option<&[u8]>) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        let (mut config, json) = Self::read(dir, own)?;
        check(CONFIG, Some(&json))?;
        let path = dir.join(GENERATION_CONFIG);
        if !path.try_exists().map_err(|source| ModelError::Read { path: path.clone(), source })? {
            check(GENERATION_CONFIG, None)?;
            return Ok(config);
        }
        let json = bounded_file::read(&path, CONFIG_BYTES_MAX)?;
        let fields = object(&json, &path)?;
        config.generation = GenerationConfig::read(&fields, &path, &config)?;
        check(GENERATION_CONFIG, Some(&json))?;
        Ok(config)
    }

    /// Reads the content of a config.json; `path` is for messages.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self, ModelError> {
        Self::parse_with_families(json, path, &[])
    }

    /// [`ModelConfig::parse`], which knows the caller's `own` families beside those that are built in.
    pub fn parse_with_families(json: &[u8], path: &Path, own: &[Family]) -> Result<Self, ModelError> {
        let json = object(json, path)?;
        let mut config = family::config(&json, path, own)?;
        config.generation = GenerationConfig::read(&json, path, &config)?;
        Ok(config)
    }

    /// Whether the weights of a row's experts are divided by their sum.
    pub fn is_normalised(&self) -> bool {
        self.causal.as_ref().is_some_and(|causal| causal.router.is_normalised)
    }

    /// What the model computes, as text: each field of the config that says something of it, in an order and a form of
    /// ours, however the file is written. Part of [`crate::Checkpoint::digest`].
    pub(crate) fn canonical(&self) -> String {
        let Self {
            family: _, // What it computes is in the other fields.
            top_k,
            router_bias,
            vocab_size,
            d_model,
            d_kv,
            d_ff,
            num_heads,
            encoder_layers: _, // As long as the lists of blocks.
            decoder_layers: _,
            num_experts,
            expert_capacity,
            relative_attention_num_buckets,
            relative_attention_max_distance,
            layer_norm_epsilon,
            tie_word_embeddings,
            // What is asked of the model, and what is done with its output, and no part of it.
            positions_max: _,
            pad_token_id: _,
            eos_token_ids: _,
            generation: _,
            encoder_sparse,
            decoder_sparse,
            activation: _, // Follows from the family.
            names: _,
            causal,
        } = self;
        let numbers = [
            ("top_k", *top_k),
            ("router_bias", usize::from(*router_bias)),
            ("vocab_size", *vocab_size),
            ("d_model", *d_model),
            ("d_kv", *d_kv),
            ("d_ff", *d_ff),
            ("num_heads", *num_heads),
            ("num_experts", *num_experts),
            ("expert_capacity", *expert_capacity),
            ("relative_attention_num_buckets", *relative_attention_num_buckets),
            ("relative_attention_max_distance", *relative_attention_max_distance),
            ("tie_word_embeddings", usize::from(*tie_word_embeddings)),
        ];
        let mut text = String::new();
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            writeln!(text, "{name} {value}").expect("a string takes what is written");
        };
        numbers.iter().for_each(|(name, number)| line(name, number));
        line("layer_norm_epsilon", &format!("{:016x}", layer_norm_epsilon.to_bits()));
        for (name, blocks) in [("encoder_sparse", encoder_sparse), ("decoder_sparse", decoder_sparse)] {
            line(name, &blocks.iter().map(|&sparse| if sparse { '1' } else { '0' }).collect::<String>());
        }
        if let Some(causal) = causal {
            line("causal", &causal.canonical());
        }
        text
    }

    /// The model as data: what each of its blocks computes.
    pub fn spec(&self) -> ModelSpec {
        family::spec(self)
    }

    /// Whether an encoder reads the input. If none does, the decoder does.
    pub fn has_encoder(&self) -> bool {
        self.encoder_layers > 0
    }

    /// Width of all heads side by side.
    pub fn inner_dim(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// For each block of a stack, whether it is sparse.
    pub fn sparse(&self, stack: Stack) -> &[bool] {
        match stack {
            Stack::Encoder => &self.encoder_sparse,
            Stack::Decoder => &self.decoder_sparse,
        }
    }

    /// The [`LayerId`]s of a stack's MoE layers: the encoder's first, then the decoder's.
    pub fn moe_layers(&self, stack: Stack) -> Range<u16> {
        let encoder = count(&self.encoder_sparse);
        match stack {
            Stack::Encoder => 0..encoder,
            Stack::Decoder => encoder..encoder + count(&self.decoder_sparse),
        }
    }

    /// MoE layers of the whole model.
    pub fn moe_layer_count(&self) -> usize {
        usize::from(self.moe_layers(Stack::Decoder).end)
    }

    /// The stack and block that hold an MoE layer.
    /// Panics if the model has no such layer: ids from outside are checked at the wire.
    pub fn moe_block(&self, layer: LayerId) -> (Stack, usize) {
        let blocks =
            |stack| self.sparse(stack).iter().enumerate().filter(|&(_, &sparse)| sparse).map(move |(b, _)| (stack, b));
        blocks(Stack::Encoder)
            .chain(blocks(Stack::Decoder))
            .nth(usize::from(layer.0))
            .unwrap_or_else(|| panic!("layer {layer} of {} MoE layers", self.moe_layer_count()))
    }
}

/// The content of a file that holds one JSON object.
fn object(json: &[u8], path: &Path) -> Result<Map<String, Value>, ModelError> {
    bounded_file::parse_json(json, path)
}

fn count(sparse: &[bool]) -> u16 {
    sparse.iter().filter(|&&sparse| sparse).count() as u16
}
