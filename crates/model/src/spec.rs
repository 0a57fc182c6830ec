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
    /// Reads the whole input at once.
    pub encoder: StackSpec,
    /// Reads and writes token by token.
    pub decoder: StackSpec,
}

/// The blocks of a stack, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct StackSpec {
    /// What the attention of every block to its own stack adds to its scores.
    pub positions: RelativeBias,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSpec {
    /// To the block's own stack.
    pub attention: AttentionSpec,
    /// Of a decoder, to the encoder's output.
    pub cross: Option<AttentionSpec>,
    /// What follows.
    pub feed_forward: FeedForwardSpec,
}

/// `softmax(q K^T + bias) V O`, the scores unscaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionSpec {
    /// Heads, side by side in a row.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whose keys and values are attended to.
    pub keys: Keys,
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
    /// `relu(x Wi^T) Wo^T`, the same matrices for every row.
    Dense {
        /// Width between the matrices.
        d_ff: usize,
    },
    /// The same by the expert that a router chooses for each row, times its probability.
    Moe {
        /// Which of the model's MoE layers.
        layer: LayerId,
        /// How many experts it has.
        experts: usize,
        /// Whether the router adds a bias to its logits.
        router_bias: bool,
    },
}

impl ModelSpec {
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
    /// Width of all heads side by side.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }
}
