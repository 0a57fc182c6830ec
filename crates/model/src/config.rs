//! The config of a model, checked: the sizes that everything around it asks for. What the model computes is made of it:
//! [`ModelConfig::spec`]. Read once by [`crate::Checkpoint`].

use std::{ops::Range, path::Path};

use sida_routing::LayerId;

use crate::{ModelError, ModelSpec, bounded_file, family};

/// The config's name in a model directory.
pub(crate) const CONFIG: &str = "config.json";
/// The longest config.json that is read.
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
    /// Inner width of an expert and of a dense feed-forward block.
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
    /// Whether the head is the embedding (and then scales its input by `d_model^-0.5`).
    pub tie_word_embeddings: bool,
    /// The padding token; never in a batch of ours.
    pub pad_token_id: u32,
    /// Ends a sequence.
    pub eos_token_id: u32,
    /// What a decoder starts from.
    pub decoder_start_token_id: u32,
    /// For each encoder block, whether its feed-forward is an MoE layer.
    /// Invariant: `encoder_layers` long.
    pub encoder_sparse: Vec<bool>,
    /// For each decoder block, whether its feed-forward is an MoE layer.
    /// Invariant: `decoder_layers` long.
    pub decoder_sparse: Vec<bool>,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory; `architectures` picks the family.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(CONFIG);
        Self::parse(&bounded_file::read(&path, CONFIG_BYTES_MAX)?, &path)
    }

    /// Reads the content of a config.json; `path` is for messages.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self, ModelError> {
        family::config(bounded_file::parse_json(json, path)?, path)
    }

    /// The model as data: what each of its blocks computes.
    pub fn spec(&self) -> ModelSpec {
        family::spec(self)
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

fn count(sparse: &[bool]) -> u16 {
    sparse.iter().filter(|&&sparse| sparse).count() as u16
}
