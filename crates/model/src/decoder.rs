//! The decoder: new tokens of each sequence see what came before them, and the whole encoder output. A caller
//! walks its layers as the encoder's, with a state per sequence, and advances the states at the end.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    ModelError, Spans, Stack,
    attention::{CrossAttention, SelfAttention},
    encoder::{check_rows, moe_ids},
    feed_forward::FeedForward,
    kv_cache::DecoderState,
    loader::Loader,
    names,
    norm::Norm,
    position_bias::PositionBias,
};

/// All blocks of the decoder, and the norm after them.
#[derive(Debug)]
pub struct Decoder {
    layers: Vec<DecoderLayer>,
    final_norm: Norm,
    inner: usize,
}

/// One block.
#[derive(Debug)]
pub struct DecoderLayer {
    block: usize,
    self_attention: SelfAttention,
    cross_attention: CrossAttention,
    feed_forward: FeedForward,
}

impl Decoder {
    pub(crate) fn load(loader: &mut Loader<'_>) -> Result<Self, ModelError> {
        let stack = Stack::Decoder;
        let bias = Arc::new(PositionBias::load(loader.checkpoint, stack)?);
        let layers = moe_ids(loader.checkpoint.config(), stack)
            .into_iter()
            .enumerate()
            .map(|(block, id)| {
                Ok(DecoderLayer {
                    block,
                    self_attention: SelfAttention::load(loader, stack, block, &bias)?,
                    cross_attention: CrossAttention::load(loader, block)?,
                    feed_forward: FeedForward::load(loader, stack, block, id)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let final_norm = loader.norm(&names::final_norm(stack))?;
        Ok(Self { layers, final_norm, inner: loader.checkpoint.config().inner_dim() })
    }

    /// A sequence's state before its first token: keys and values of the encoder's states (tokens, d_model) for
    /// the cross-attention of every block.
    pub fn start(&self, encoder_states: &Tensor) -> Result<DecoderState, ModelError> {
        let mut states = self.start_batch(encoder_states, &Spans::new([encoder_states.dim(0)?]))?;
        Ok(states.remove(0))
    }

    /// [`Decoder::start`] for all sequences of a batch (rows of all sequences, d_model).
    pub fn start_batch(&self, encoder_states: &Tensor, spans: &Spans) -> Result<Vec<DecoderState>, ModelError> {
        check_rows(encoder_states, spans)?;
        let mut cross = vec![Vec::with_capacity(self.layers.len()); spans.len()];
        for layer in &self.layers {
            let kv = layer.cross_attention.keys_and_values(encoder_states)?; // (rows, 2 inner)
            for (cross, span) in cross.iter_mut().zip(spans.ranges()) {
                cross.push(kv[span.start * 2 * self.inner..span.end * 2 * self.inner].to_vec());
            }
        }
        Ok(cross.into_iter().map(|cross| DecoderState::new(cross, self.inner)).collect())
    }

    /// The blocks, in order.
    pub fn layers(&self) -> &[DecoderLayer] {
        &self.layers
    }

    /// The norm after the last block: h (n, d_model) -> (n, d_model), what [`crate::Backbone::logits`] takes.
    pub fn finish(&self, h: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.final_norm.forward(h)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        let layer = |layer: &DecoderLayer| {
            layer.self_attention.bytes() + layer.cross_attention.bytes() + layer.feed_forward.bytes()
        };
        self.layers.iter().map(layer).sum()
    }
}

impl DecoderLayer {
    /// Self-attention over each sequence's past and new tokens, then cross-attention, with their norms and
    /// residuals: h (new tokens of all sequences, d_model) -> the same shape. `states` and `spans` speak of
    /// the same sequences in the same order. Does not advance the states.
    pub fn attend(&self, h: &Tensor, states: &mut [&mut DecoderState], spans: &Spans) -> Result<Tensor, ModelError> {
        check_rows(h, spans)?;
        if states.len() != spans.len() {
            return Err(ModelError::Shape {
                what: "decoder states [sequences]",
                expected: vec![spans.len()],
                found: vec![states.len()],
            });
        }
        let h = self.self_attention.decode(h, self.block, states, spans)?;
        self.cross_attention.forward(&h, self.block, states, spans)
    }

    /// What follows.
    pub fn feed_forward(&self) -> &FeedForward {
        &self.feed_forward
    }
}
