//! The forward pass of every model, an equation a line, over h (n, d_model), the hidden states of the new tokens of some
//! sequences. Who computes it is behind [`Operations`]: threads of the processor ([`crate::cpu_backend`]), the stream of a
//! GPU (`cuda::pass`), or an oracle that the others are tested against (`tests/candle_oracle.rs`).
//!
//! A pass runs from a block as far as it can by itself: to the next MoE layer whose rows must leave for their experts, or to
//! the end.

use sida_routing::LayerId;

use crate::{
    backbone::{Attention, Block, FeedForward, Head, Matrices, Memory, Router, Shared, StackWeights},
    spec::{AttentionSpec, Rotary},
};

/// The operations of a pass. They change three things that an implementation keeps: h (n, d_model), x (n, d_model), which
/// a norm makes of it, and a (n, inner), what attention makes of that.
pub trait Operations {
    /// Where its weights are.
    type Memory: Memory;
    /// Why an operation fails.
    type Error;

    /// h = E\[ids\]
    fn embed(&mut self, embedding: &Matrix<Self>) -> Result<(), Self::Error>;
    /// x = w * h / rms(h)
    fn norm(&mut self, weight: &Vector<Self>) -> Result<(), Self::Error>;
    /// q, k, v = x W^T + b, side by side; of an attention to the input, q alone.
    fn project(&mut self, weight: &Matrix<Self>, bias: Option<&Vector<Self>>) -> Result<(), Self::Error>;
    /// q = w * q / rms(q), and k likewise: of each head, or of all heads of a row together.
    fn norm_heads(&mut self, spec: &AttentionSpec, weights: &[Vector<Self>; 2]) -> Result<(), Self::Error>;
    /// q, k, v between -limit and limit.
    fn clip(&mut self, limit: f32) -> Result<(), Self::Error>;
    /// q and k turned by their position.
    fn rotate(&mut self, spec: &AttentionSpec, rotary: &Rotary) -> Result<(), Self::Error>;
    /// a = softmax(scale * q K^T + bias) V, with K and V as `spec` says; what is new is written to the cache of `block`
    /// first.
    fn attend(&mut self, spec: &AttentionSpec, block: usize, bias: Option<&Bias<Self>>) -> Result<(), Self::Error>;
    /// h += a O^T + b
    fn add_output(&mut self, weight: &Matrix<Self>, bias: Option<&Vector<Self>>) -> Result<(), Self::Error>;
    /// h += relu(x Wi^T) Wo^T, or as gated.
    fn feed_forward(&mut self, matrices: &Matrices<Self::Memory>) -> Result<(), Self::Error>;
    /// h += sigmoid(x w) * shared(x), of an expert that all rows go to.
    fn shared(&mut self, shared: &Shared<Self::Memory>) -> Result<(), Self::Error>;
    /// The experts of each row of x, and their probabilities: softmax(x W^T + b).
    fn route(&mut self, layer: LayerId, router: &Router<Self::Memory>) -> Result<(), Self::Error>;
    /// h += probability * expert(x), row by row, if that can be done here.
    fn experts(&mut self, layer: LayerId) -> Result<Rows, Self::Error>;
    /// x = scale * w * h / rms(h), of the rows whose logits are wanted.
    fn norm_wanted(&mut self, weight: &Vector<Self>, scale: f32) -> Result<(), Self::Error>;
    /// logits = x E^T, of those rows.
    fn logits(&mut self, weight: &Matrix<Self>) -> Result<(), Self::Error>;
}

/// A matrix where `O` takes it.
pub type Matrix<O> = <<O as Operations>::Memory as Memory>::Matrix;
/// The weights of a norm where `O` takes them.
pub type Vector<O> = <<O as Operations>::Memory as Memory>::Vector;
/// A position bias where `O` takes it.
pub type Bias<O> = <<O as Operations>::Memory as Memory>::Bias;
type Stack<O> = StackWeights<<O as Operations>::Memory>;

/// What becomes of the rows of an MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Their experts were computed, or their computation was started, where the pass is.
    Stay,
    /// They leave for their experts, and come back before the pass goes on.
    Leave,
}

/// From tokens to the first hidden states.
pub fn embed<O: Operations>(ops: &mut O, stack: &Stack<O>) -> Result<(), O::Error> {
    ops.embed(&stack.embedding) // h = E[ids]                            (n, d_model)
}

/// Through the blocks from `from` on; the block whose rows must leave, with h as it is before its experts and x what they
/// take, or `None` after the last block.
pub fn advance<O: Operations>(ops: &mut O, stack: &Stack<O>, from: usize) -> Result<Option<usize>, O::Error> {
    for (index, block) in stack.blocks.iter().enumerate().skip(from) {
        attend(ops, stack, block, index)?;
        if feed_forward(ops, block)? == Rows::Leave {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// A block's attention to its own stack, then to the input.
pub fn attend<O: Operations>(
    ops: &mut O,
    stack: &Stack<O>,
    block: &Block<O::Memory>,
    index: usize,
) -> Result<(), O::Error> {
    let cross = block.cross.as_ref().map(|cross| &cross.attention);
    for Attention { spec, norm, projection, bias, qk_norm, output, output_bias } in
        std::iter::once(&block.attention).chain(cross)
    {
        ops.norm(norm)?; // x = norm(h)                                  (n, d_model)
        ops.project(projection, bias.as_ref())?; // q, k, v = x W^T + b  (n, inner + 2 * kv_inner), or q (n, inner)
        if let Some(weights) = qk_norm {
            ops.norm_heads(spec, weights)?; // q, k = norm(q), norm(k)
        }
        if let Some(limit) = spec.clip {
            ops.clip(limit)?; // q, k, v within the limit
        }
        if let Some(rotary) = &spec.rotary {
            ops.rotate(spec, rotary)?; // q, k = turned(q), turned(k)
        }
        ops.attend(spec, index, stack.bias.as_ref())?; // a = softmax(scale * q K^T + bias) V    (n, inner)
        ops.add_output(output, output_bias.as_ref())?; // h += a O^T + b (n, d_model)
    }
    Ok(())
}

/// What follows in a block: one feed-forward for all rows, or the expert of each.
pub fn feed_forward<O: Operations>(ops: &mut O, block: &Block<O::Memory>) -> Result<Rows, O::Error> {
    match &block.feed_forward {
        FeedForward::Dense { norm, matrices } => {
            ops.norm(norm)?; // x = norm(h)                              (n, d_model)
            ops.feed_forward(matrices)?; // h += relu(x Wi^T) Wo^T       (n, d_ff) between
            Ok(Rows::Stay)
        }
        FeedForward::Moe { layer, norm, router, shared } => {
            ops.norm(norm)?; // x = norm(h)                              (n, d_model)
            ops.route(*layer, router)?; // p = softmax(x W^T + b)        (n, experts)
            if let Some(shared) = shared {
                ops.shared(shared)?; // h += sigmoid(x w) * shared(x)
            }
            ops.experts(*layer) // h += sum of p[e] * expert_e(x) over the most probable
        }
    }
}

/// After the last block of an encoder: its states.
pub fn finish<O: Operations>(ops: &mut O, stack: &Stack<O>) -> Result<(), O::Error> {
    ops.norm(&stack.final_norm) // x = norm(h)                           (n, d_model)
}

/// After the last block of a decoder: scores of every token of the vocabulary after the rows that are wanted.
pub fn head<O: Operations>(ops: &mut O, stack: &Stack<O>, head: &Head<O::Memory>) -> Result<(), O::Error> {
    ops.norm_wanted(&stack.final_norm, head.scale)?; // x = scale * norm(h)      (wanted, d_model)
    ops.logits(&head.weight) // logits = x E^T                           (wanted, vocab_size)
}
