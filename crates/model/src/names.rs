//! What the tensors of a Switch Transformers checkpoint are called. All names are here and nowhere else.
//!
//! There is one layout, that of the published google/switch-base-* files. transformers 5 fuses or renames the
//! experts of other families when it saves; for this one, 5.17 and 5.23 write what 4.x wrote (a ModuleDict of
//! `experts.expert_K`, no entry in conversion_mapping.py; tests/data/parity/random-saved is such a file). What
//! varies is which copies of the embedding a file holds: see [`embeddings`].
//!
//! Called by the loader of the backbone, by the expert store, and by `sida synth`.

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

/// The embedding that both stacks and the tied head share.
pub const SHARED: &str = "shared.weight";
/// The head's own matrix.
pub const LM_HEAD: &str = "lm_head.weight";

/// What one matrix of a tied model may be called: the name that transformers gives it first.
pub(crate) fn tied() -> [String; 4] {
    [SHARED.to_owned(), embedding(Stack::Encoder), embedding(Stack::Decoder), LM_HEAD.to_owned()]
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
    let names = tied();
    let [shared, encoder, decoder, head] = &names;
    if !checkpoint.config().tie_word_embeddings {
        let own_or_shared = |own: &String| if checkpoint.contains(own) { own } else { shared }.clone();
        let (encoder, decoder) = (own_or_shared(encoder), own_or_shared(decoder));
        return Ok(Embeddings { encoder, decoder, head: head.clone(), differing: Vec::new() });
    }
    let held: Vec<&String> = names.iter().filter(|name| checkpoint.contains(name)).collect();
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

/// A stack's own embedding.
fn embedding(stack: Stack) -> String {
    format!("{}.embed_tokens.weight", prefix(stack))
}

/// The norm after a stack's last block.
pub fn final_norm(stack: Stack) -> String {
    format!("{}.final_layer_norm.weight", prefix(stack))
}

/// One projection (`q`, `k`, `v`, `o`) of an attention.
pub fn projection(stack: Stack, block: usize, attention: Attention, projection: char) -> String {
    let (layer, module) = match attention {
        Attention::SelfAttention => (0, "SelfAttention"),
        Attention::CrossAttention => (1, "EncDecAttention"),
    };
    format!("{}.block.{block}.layer.{layer}.{module}.{projection}.weight", prefix(stack))
}

/// The norm before an attention.
pub fn attention_norm(stack: Stack, block: usize, attention: Attention) -> String {
    let layer = matches!(attention, Attention::CrossAttention) as usize;
    format!("{}.block.{block}.layer.{layer}.layer_norm.weight", prefix(stack))
}

/// The relative position bias of a stack, kept by its first block: (buckets, heads).
pub fn position_bias(stack: Stack) -> String {
    format!("{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", prefix(stack))
}

/// The norm before a feed-forward.
pub fn feed_forward_norm(stack: Stack, block: usize) -> String {
    format!("{}.layer_norm.weight", feed_forward(stack, block))
}

/// One matrix (`wi`, `wo`) of a dense feed-forward.
pub fn dense(stack: Stack, block: usize, matrix: &str) -> String {
    format!("{}.mlp.{matrix}.weight", feed_forward(stack, block))
}

/// The router of a sparse block: (experts, d_model).
pub fn router(stack: Stack, block: usize) -> String {
    format!("{}.mlp.router.classifier.weight", feed_forward(stack, block))
}

/// Its bias, where the config says it has one: (experts).
pub fn router_bias(stack: Stack, block: usize) -> String {
    format!("{}.mlp.router.classifier.bias", feed_forward(stack, block))
}

/// The matrices of an expert in the order of its slot, each with its shape [outputs, inputs].
pub fn expert(config: &ModelConfig, key: ExpertKey) -> Vec<(String, [usize; 2])> {
    let (stack, block) = config.moe_block(key.layer);
    let ExpertId(expert) = key.expert;
    let matrices = [("wi", [config.d_ff, config.d_model]), ("wo", [config.d_model, config.d_ff])];
    let experts = format!("{}.mlp.experts.expert_{expert}", feed_forward(stack, block));
    matrices.into_iter().map(|(matrix, shape)| (format!("{experts}.{matrix}.weight"), shape)).collect()
}

/// Whether a tensor belongs to an expert and not to the backbone.
pub fn is_expert(name: &str) -> bool {
    name.contains(".mlp.experts.")
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
