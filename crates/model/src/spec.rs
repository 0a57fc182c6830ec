//! A model as data: its stacks as lists of blocks, and what each block computes. A family makes it of its config
//! ([`crate::ModelConfig::spec`]); weights are loaded by it ([`crate::backbone`]), and [`crate::forward`] executes it.

use sida_routing::LayerId;

use crate::Stack;

/// What a model computes. One with an encoder and a decoder is two lists of blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Tokens the model knows.
    pub vocab_size: usize,
    /// Width of a hidden state.
    pub d_model: usize,
    /// Added to the mean square in every norm.
    pub norm_epsilon: f32,
    /// What the norm's output is multiplied by before the head.
    pub head_scale: f32,
    /// Reads the whole input at once. Without blocks where the model has none.
    pub encoder: StackSpec,
    /// Reads and writes token by token; the input, too, where there is no encoder.
    pub decoder: StackSpec,
}

/// The blocks of a stack, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct StackSpec {
    /// What the attention of every block to its own stack adds to its scores, if anything.
    pub positions: Option<RelativeBias>,
    /// Every block.
    pub blocks: Vec<BlockSpec>,
}

/// T5's relative position bias: distances between key and query share buckets, and each bucket has a bias per head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBias {
    /// How many buckets.
    pub buckets: usize,
    /// Distance from which all positions share a bucket.
    pub max_distance: usize,
    /// Whether keys ahead of the query have buckets of their own.
    pub is_bidirectional: bool,
}

/// `h += attention(norm(h))`, then the same with the input where there is one, then `h += feed_forward(norm(h))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockSpec {
    /// To the block's own stack.
    pub attention: AttentionSpec,
    /// Of a decoder, to the encoder's output.
    pub cross: Option<AttentionSpec>,
    /// What follows.
    pub feed_forward: FeedForwardSpec,
}

/// `softmax(scale * q K^T + bias) V O`. Before that, what the fields say is done to q, k and v, in their order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Heads of queries, side by side in a row.
    pub heads: usize,
    /// Heads of keys and values; as many heads of queries share each.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whose keys and values are attended to.
    pub keys: Keys,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Whether a bias is added to q, k and v.
    pub has_bias: bool,
    /// Whether one is added to the output.
    pub has_output_bias: bool,
    /// How q and k are normed.
    pub qk_norm: QkNorm,
    /// What q, k and v are limited to, both ways.
    pub clip: Option<f32>,
    /// How q and k are turned by their position.
    pub rotary: Option<Rotary>,
    /// How many keys back a query sees, itself among them.
    pub window: Option<usize>,
}

/// How queries and keys are normed before they meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself, with weights that heads share.
    Heads,
    /// All heads of a row together.
    Rows,
}

/// Rotary positions: of a head of `width` values, value i and value i + width / 2 are turned by `position * frequency(i)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary {
    /// Frequency i is `theta^(-2 i / width)`.
    pub theta: f64,
    /// What is done to the frequencies, for texts longer than those that were trained on.
    pub scaling: RotaryScaling,
}

/// How frequencies are scaled. Source: transformers, modeling_rope_utils.py.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// All by the same factor.
    Linear {
        /// Positions are divided by it.
        factor: f64,
    },
    /// High frequencies stay, low ones are divided by the factor, with a ramp between; cosines and sines are multiplied.
    Yarn {
        /// What low frequencies are divided by.
        factor: f64,
        /// So many turns within the trained length are high.
        beta_fast: f64,
        /// So many are low.
        beta_slow: f64,
        /// The length that was trained on.
        trained: f64,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Whether the ramp's ends are whole numbers.
        truncate: bool,
    },
    /// As yarn, with a ramp by wavelength and nothing multiplied.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths over the trained length divided by this are long.
        low_freq_factor: f64,
        /// Wavelengths below the trained length divided by this are short.
        high_freq_factor: f64,
        /// The length that was trained on.
        trained: f64,
    },
}

/// Whose keys and values a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Those of the rows of its sequence in this pass, all of them.
    Rows,
    /// Those of its sequence up to itself, which are kept in a cache.
    Cache,
    /// Those of the sequence's input, all of them, without a position bias.
    Input,
}

/// What a block does after attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForwardSpec {
    /// The same matrices for every row.
    Dense {
        /// Width between the matrices.
        d_ff: usize,
        /// What is between them.
        activation: Activation,
    },
    /// The same by the experts that a router chooses for each row, each times its weight.
    Moe {
        /// Which of the model's MoE layers.
        layer: LayerId,
        /// How many experts it has.
        experts: usize,
        /// How they are chosen.
        router: RouterSpec,
        /// An expert that all rows go to.
        shared: Option<SharedSpec>,
    },
}

/// What a feed-forward does between its matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `relu(x Wi^T) Wo^T`
    Relu,
    /// `(silu(x Wg^T) * (x Wu^T)) Wd^T`
    GatedSilu,
}

/// A router: softmax over all experts, of which the most probable are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterSpec {
    /// Experts per row.
    pub top_k: usize,
    /// Whether a bias is added to the logits.
    pub has_bias: bool,
    /// Whether the weights of a row's experts are divided by their sum.
    pub is_normalised: bool,
}

/// An expert that all rows go to, computed with the dense part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSpec {
    /// Its width.
    pub d_ff: usize,
    /// Whether it is multiplied by `sigmoid(x w)`.
    pub is_gated: bool,
}

impl Activation {
    /// How many matrices a feed-forward has.
    pub fn matrices(self) -> usize {
        match self {
            Self::Relu => 2,
            Self::GatedSilu => 3,
        }
    }
}

impl ModelSpec {
    /// Whether an encoder reads the input. If none does, the decoder does.
    pub fn has_encoder(&self) -> bool {
        !self.encoder.blocks.is_empty()
    }

    /// One of its stacks.
    pub fn stack(&self, stack: Stack) -> &StackSpec {
        match stack {
            Stack::Encoder => &self.encoder,
            Stack::Decoder => &self.decoder,
        }
    }
}

impl StackSpec {
    /// The first MoE layer in block `from` or behind it: its block, and its number among the model's.
    pub fn next_moe(&self, from: usize) -> Option<(usize, LayerId)> {
        self.blocks.iter().enumerate().skip(from).find_map(|(index, block)| match block.feed_forward {
            FeedForwardSpec::Moe { layer, .. } => Some((index, layer)),
            FeedForwardSpec::Dense { .. } => None,
        })
    }
}

impl AttentionSpec {
    /// Width of all heads of queries side by side.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all heads of keys, or of values.
    pub fn kv_inner(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
