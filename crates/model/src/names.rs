//! What the tensors of a checkpoint are called, by family. All names are here and nowhere else.
//!
//! Of Switch Transformers there is one layout, that of the published google/switch-base-* files. transformers 5 fuses or
//! renames the experts of other families when it saves; for this one, 5.17 and 5.23 write what 4.x wrote (a ModuleDict of
//! `experts.expert_K`, no entry in conversion_mapping.py; tests/data/parity/random-saved is such a file). What
//! varies is which copies of the embedding a file holds: see [`embeddings`].
//!
//! Of decoder-only families there are two: a tensor for each matrix of an expert, as published, or all experts of a layer
//! stacked in one, as transformers 5 keeps them in memory ([`TensorNames::stacked`]; of Mixtral under the published name
//! of the module).
//!
//! Called by the loader of the backbone, by the expert store, and by `sida convert`.

use sida_routing::{ExpertId, ExpertKey};

use crate::{Checkpoint, ModelConfig, ModelError, Stack};

/// Which attention of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Over the block's own input.
    SelfAttention,
    /// Of the decoder, over the encoder's output.
    CrossAttention,
}

/// How a family names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorNames {
    /// Switch Transformers.
    Switch,
    /// Decoder-only models, but for what their MoE layers are called.
    Causal {
        /// The module of a block's feed-forward: `mlp`.
        moe: &'static str,
        /// The matrices of an expert: gate, up, down.
        expert: [&'static str; 3],
    },
}

/// The embedding that both stacks of Switch Transformers and the tied head share.
pub const SHARED: &str = "shared.weight";
/// The head's own matrix.
pub const LM_HEAD: &str = "lm_head.weight";
/// The embedding of decoder-only models.
const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// The matrices of a dense feed-forward that is gated.
const GATED: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Where a part of an expert is: a tensor, or a part of one that holds those of all experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPart {
    /// The tensor.
    pub tensor: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Which of the parts that it is cut into along its first dimension, where it holds all experts'.
    pub index: Option<usize>,
}

impl ExpertPart {
    /// How many values of the tensor it is.
    pub fn values(&self) -> usize {
        self.shape.iter().skip(usize::from(self.index.is_some())).product()
    }

    /// Which part of how many equal ones of the tensor's bytes it is.
    pub fn share(&self) -> (usize, usize) {
        self.index.map_or((0, 1), |index| (index, self.shape[0]))
    }
}

/// What the embeddings of both stacks and the head are called in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Embeddings {
    /// The encoder's embedding.
    pub encoder: String,
    /// The decoder's.
    pub decoder: String,
    /// The matrix of the head.
    pub head: String,
    /// Tensors that config.json ties to another one, from whose values theirs differ.
    pub differing: Vec<String>,
}

/// Finds the embeddings and the head.
///
/// In a tied model all of them are one matrix. Files hold it under [`SHARED`], or under one of the names of its
/// places, or as several copies; any will do. Where copies differ, each place uses its own if there is one, as
/// transformers does from release 5 on (before, [`SHARED`] was used everywhere). To learn that, copies are read.
///
/// An untied model has one embedding per stack since that release ([`SHARED`] is then stored, but no longer used), and
/// shared ones before.
pub fn embeddings(checkpoint: &Checkpoint) -> Result<Embeddings, ModelError> {
    let names = checkpoint.config().names.tied();
    let [shared, encoder, decoder, head] = &names;
    if !checkpoint.config().tie_word_embeddings {
        let own_or_shared = |own: &String| if checkpoint.contains(own) { own } else { shared }.clone();
        let (encoder, decoder) = (own_or_shared(encoder), own_or_shared(decoder));
        return Ok(Embeddings { encoder, decoder, head: head.clone(), differing: Vec::new() });
    }
    let mut held: Vec<&String> = names.iter().filter(|name| checkpoint.contains(name)).collect();
    held.dedup();
    // If there is none, the missing tensor has its usual name.
    let first = held.first().copied().unwrap_or(shared);
    let mut differing = Vec::new();
    for other in held.into_iter().skip(1) {
        if !is_copy(checkpoint, other, first)? {
            differing.push(other.clone());
        }
    }
    let of = |own: &String| if differing.contains(own) { own } else { first }.clone();
    Ok(Embeddings { encoder: of(encoder), decoder: of(decoder), head: of(head), differing })
}

/// Whether a tensor is a copy of another. If it is, it is not needed any more.
fn is_copy(checkpoint: &Checkpoint, copy: &str, of: &str) -> Result<bool, ModelError> {
    let (one, other) = (checkpoint.tensor(copy)?, checkpoint.tensor(of)?);
    let is_copy = one.dtype == other.dtype && one.shape == other.shape && one.bytes == other.bytes;
    if is_copy {
        checkpoint.release(copy);
    }
    Ok(is_copy)
}

impl TensorNames {
    /// What one matrix of a tied model may be called: what it is called first, and as each stack's embedding and the head.
    pub(crate) fn tied(self) -> [String; 4] {
        match self {
            Self::Switch => {
                let embedding = |stack| format!("{}.embed_tokens.weight", prefix(stack));
                [SHARED.to_owned(), embedding(Stack::Encoder), embedding(Stack::Decoder), LM_HEAD.to_owned()]
            }
            Self::Causal { .. } => [EMBED_TOKENS, EMBED_TOKENS, EMBED_TOKENS, LM_HEAD].map(str::to_owned),
        }
    }

    /// The norm after a stack's last block.
    pub fn final_norm(self, stack: Stack) -> String {
        match self {
            Self::Switch => format!("{}.final_layer_norm.weight", prefix(stack)),
            Self::Causal { .. } => "model.norm.weight".to_owned(),
        }
    }

    /// One projection (`q`, `k`, `v`, `o`) of an attention.
    pub fn projection(self, stack: Stack, block: usize, attention: Attention, projection: char) -> String {
        format!("{}.weight", self.projection_of(stack, block, attention, projection))
    }

    /// What is added to its output.
    pub fn projection_bias(self, stack: Stack, block: usize, attention: Attention, projection: char) -> String {
        format!("{}.bias", self.projection_of(stack, block, attention, projection))
    }

    fn projection_of(self, stack: Stack, block: usize, attention: Attention, projection: char) -> String {
        match self {
            Self::Switch => {
                let (layer, module) = match attention {
                    Attention::SelfAttention => (0, "SelfAttention"),
                    Attention::CrossAttention => (1, "EncDecAttention"),
                };
                format!("{}.block.{block}.layer.{layer}.{module}.{projection}", prefix(stack))
            }
            Self::Causal { .. } => format!("model.layers.{block}.self_attn.{projection}_proj"),
        }
    }

    /// The norm of queries (`q`) or keys (`k`).
    pub fn qk_norm(self, block: usize, of: char) -> String {
        format!("model.layers.{block}.self_attn.{of}_norm.weight")
    }

    /// The norm before an attention.
    pub fn attention_norm(self, stack: Stack, block: usize, attention: Attention) -> String {
        match self {
            Self::Switch => {
                let layer = matches!(attention, Attention::CrossAttention) as usize;
                format!("{}.block.{block}.layer.{layer}.layer_norm.weight", prefix(stack))
            }
            Self::Causal { .. } => format!("model.layers.{block}.input_layernorm.weight"),
        }
    }

    /// The norm before a feed-forward.
    pub fn feed_forward_norm(self, stack: Stack, block: usize) -> String {
        match self {
            Self::Switch => format!("{}.layer_norm.weight", feed_forward(stack, block)),
            Self::Causal { .. } => format!("model.layers.{block}.post_attention_layernorm.weight"),
        }
    }

    /// The matrices of a dense feed-forward, in the order in which they are used; what a gate gates comes second.
    pub fn dense(self, stack: Stack, block: usize) -> Vec<String> {
        match self {
            Self::Switch => {
                ["wi", "wo"].map(|matrix| format!("{}.mlp.{matrix}.weight", feed_forward(stack, block))).to_vec()
            }
            Self::Causal { .. } => GATED.map(|matrix| format!("model.layers.{block}.mlp.{matrix}.weight")).to_vec(),
        }
    }

    /// The router of a sparse block: (experts, d_model).
    pub fn router(self, stack: Stack, block: usize) -> String {
        match self {
            Self::Switch => format!("{}.mlp.router.classifier.weight", feed_forward(stack, block)),
            Self::Causal { moe, .. } => format!("model.layers.{block}.{moe}.gate.weight"),
        }
    }

    /// Its bias, where the config says it has one: (experts).
    pub fn router_bias(self, stack: Stack, block: usize) -> String {
        match self {
            Self::Switch => format!("{}.mlp.router.classifier.bias", feed_forward(stack, block)),
            Self::Causal { moe, .. } => format!("model.layers.{block}.{moe}.gate.bias"),
        }
    }

    /// The matrices of the expert that all rows go to, as [`TensorNames::dense`].
    pub fn shared(self, block: usize) -> Vec<String> {
        GATED.map(|matrix| format!("model.layers.{block}.mlp.shared_expert.{matrix}.weight")).to_vec()
    }

    /// What decides on how much of it: (1, d_model).
    pub fn shared_gate(self, block: usize) -> String {
        format!("model.layers.{block}.mlp.shared_expert_gate.weight")
    }

    /// The parts of an expert in the order of its slot, a tensor each.
    pub fn expert(self, config: &ModelConfig, key: ExpertKey) -> Vec<ExpertPart> {
        let (stack, block) = config.moe_block(key.layer);
        let ExpertId(expert) = key.expert;
        let (d_ff, d_model) = (config.d_ff, config.d_model);
        let part = |tensor: String, shape: [usize; 2]| ExpertPart { tensor, shape: shape.to_vec(), index: None };
        match self {
            Self::Switch => {
                let experts = format!("{}.mlp.experts.expert_{expert}", feed_forward(stack, block));
                let matrices = [("wi", [d_ff, d_model]), ("wo", [d_model, d_ff])];
                matrices.map(|(matrix, shape)| part(format!("{experts}.{matrix}.weight"), shape)).to_vec()
            }
            Self::Causal { moe, expert: [gate, up, down] } => {
                let experts = format!("model.layers.{block}.{moe}.experts.{expert}");
                let matrices = [(gate, [d_ff, d_model]), (up, [d_ff, d_model]), (down, [d_model, d_ff])];
                matrices.map(|(matrix, shape)| part(format!("{experts}.{matrix}.weight"), shape)).to_vec()
            }
        }
    }

    /// The same of a file that holds the experts of a layer stacked: gate and up as one, then down.
    pub fn stacked(self, config: &ModelConfig, key: ExpertKey) -> Vec<ExpertPart> {
        let (_, block) = config.moe_block(key.layer);
        let (d_ff, d_model, index) = (config.d_ff, config.d_model, Some(usize::from(key.expert.0)));
        let Self::Causal { moe, .. } = self else { return Vec::new() };
        let part = |matrix: &str, shape: [usize; 2]| ExpertPart {
            tensor: format!("model.layers.{block}.{moe}.experts.{matrix}"),
            shape: vec![config.num_experts, shape[0], shape[1]],
            index,
        };
        vec![part("gate_up_proj", [2 * d_ff, d_model]), part("down_proj", [d_model, d_ff])]
    }
}

/// The relative position bias of a stack, kept by its first block: (buckets, heads).
pub fn position_bias(stack: Stack) -> String {
    format!("{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", prefix(stack))
}

/// Whether a tensor is the table of a position bias.
pub fn is_position_bias(name: &str) -> bool {
    name.ends_with("relative_attention_bias.weight")
}

/// Whether a tensor is a router's, or the gate of a shared expert.
pub fn is_router(name: &str) -> bool {
    name.contains(".router.") || name.ends_with(".gate.weight") || name.ends_with(".shared_expert_gate.weight")
}

/// Whether a tensor belongs to an expert and not to the backbone.
pub fn is_expert(name: &str) -> bool {
    name.contains(".experts.")
}

fn feed_forward(stack: Stack, block: usize) -> String {
    let layer = match stack {
        Stack::Encoder => 1,
        Stack::Decoder => 2,
    };
    format!("{}.block.{block}.layer.{layer}", prefix(stack))
}

fn prefix(stack: Stack) -> &'static str {
    match stack {
        Stack::Encoder => "encoder",
        Stack::Decoder => "decoder",
    }
}
