//! What the tensors of a Switch Transformers checkpoint are called. All names are here and nowhere else.
//!
//! There is one layout, that of the published google/switch-base-* files. transformers 5 fuses or renames the
//! experts of other families when it saves; for this one, 5.17 and 5.23 write what 4.x wrote (a ModuleDict of
//! `experts.expert_K`, no entry in conversion_mapping.py; tests/data/parity/random-saved is such a file). What
//! varies is which copies of the embedding a file holds: see [`embedding`].
//!
//! Called by the loader of the backbone, by the expert store, and by `sida synth`.

use sida_routing::{ExpertId, ExpertKey};

use crate::{Checkpoint, ModelConfig, Stack};

/// Which attention of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Over the block's own input.
    SelfAttention,
    /// Of the decoder, over the encoder's output.
    CrossAttention,
}

/// The embedding both stacks and the tied head share.
pub const SHARED: &str = "shared.weight";
/// The head where it is not tied.
pub const LM_HEAD: &str = "lm_head.weight";

/// Where a stack's embedding is. A tied model keeps one under [`SHARED`]; files of early releases hold copies
/// beside it, and files without it hold a stack's own. An untied model has one embedding per stack since
/// release 5 (`shared.weight` is then stored, but no longer used), and shared ones before.
pub fn embedding(checkpoint: &Checkpoint, stack: Stack) -> String {
    let own = format!("{}.embed_tokens.weight", prefix(stack));
    let tied = checkpoint.config().tie_word_embeddings;
    if checkpoint.contains(&own) && !(tied && checkpoint.contains(SHARED)) { own } else { SHARED.to_owned() }
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
