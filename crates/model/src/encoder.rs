//! The encoder: every token of a sequence sees all of it. A caller walks its layers:
//!
//! ```text
//! for layer in encoder.layers() {
//!     h = layer.attend(&h, &spans)?;
//!     h = match layer.feed_forward() { Dense(dense) => dense.forward(&h)?, Moe(gate) => /* to the experts */ };
//! }
//! encoder.finish(&h)
//! ```
//!
//! or, with the same bits, takes all blocks up to the next gate at once ([`Encoder::advance`]).

use std::sync::Arc;

use candle_core::Tensor;
use sida_routing::LayerId;

use crate::{
    ModelConfig, ModelError, Spans, Stack,
    attention::SelfAttention,
    feed_forward::FeedForward,
    loader::Loader,
    names,
    norm::Norm,
    pieces,
    position_bias::PositionBias,
    tensor_rows::{from_rows, rows},
};

/// All blocks of the encoder, and the norm after them.
#[derive(Debug)]
pub struct Encoder {
    layers: Vec<EncoderLayer>,
    final_norm: Norm,
}

/// One block.
#[derive(Debug)]
pub struct EncoderLayer {
    attention: SelfAttention,
    feed_forward: FeedForward,
}

impl Encoder {
    pub(crate) fn load(loader: &mut Loader<'_>) -> Result<Self, ModelError> {
        let stack = Stack::Encoder;
        let bias = Arc::new(PositionBias::load(loader.checkpoint, stack)?);
        let layers = moe_ids(loader.checkpoint.config(), stack)
            .into_iter()
            .enumerate()
            .map(|(block, id)| {
                Ok(EncoderLayer {
                    attention: SelfAttention::load(loader, stack, block, &bias)?,
                    feed_forward: FeedForward::load(loader, stack, block, id)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self { layers, final_norm: loader.norm(&names::final_norm(stack))? })
    }

    /// The blocks, in order.
    pub fn layers(&self) -> &[EncoderLayer] {
        &self.layers
    }

    /// From block `first` on through the attention of the next sparse one: h (rows of all sequences, d_model) before
    /// its gate, and its number; or, without one, h after the last block. The threads meet once.
    pub fn advance(&self, h: &Tensor, first: usize, spans: &Spans) -> Result<(Tensor, Option<usize>), ModelError> {
        check_rows(h, spans)?;
        let d_model = h.dim(1)?;
        let is_sparse = |&block: &usize| matches!(self.layers[block].feed_forward, FeedForward::Moe(_));
        let sparse = (first..self.layers.len()).find(is_sparse);
        let blocks = &self.layers[first..sparse.map_or(self.layers.len(), |block| block + 1)];
        let mut h = rows(h, <[f32]>::to_vec)?;
        pieces::by_sequence(&mut h, d_model, spans, |h, spans| blocks.iter().for_each(|block| block.apply(h, spans)));
        Ok((from_rows(h, d_model)?, sparse))
    }

    /// The norm after the last block: h (n, d_model) -> the encoder's states (n, d_model)
    pub fn finish(&self, h: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.final_norm.forward(h)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.attention.bytes() + layer.feed_forward.bytes()).sum()
    }
}

impl EncoderLayer {
    /// Self-attention, its norm and its residual: h (rows of all sequences, d_model) -> the same shape.
    pub fn attend(&self, h: &Tensor, spans: &Spans) -> Result<Tensor, ModelError> {
        check_rows(h, spans)?;
        self.attention.encode(h, spans)
    }

    /// Attention, and what follows if it is dense.
    fn apply(&self, h: &mut [f32], spans: &Spans) {
        self.attention.apply(h, spans);
        if let FeedForward::Dense(dense) = &self.feed_forward {
            dense.apply(h);
        }
    }

    /// What follows.
    pub fn feed_forward(&self) -> &FeedForward {
        &self.feed_forward
    }
}

/// For each block of a stack, its MoE layer if it is sparse.
pub(crate) fn moe_ids(config: &ModelConfig, stack: Stack) -> Vec<Option<LayerId>> {
    let mut ids = config.moe_layers(stack).map(LayerId);
    config.sparse(stack).iter().map(|&sparse| if sparse { ids.next() } else { None }).collect()
}

/// Refuses hidden states that are not the rows of these sequences.
pub(crate) fn check_rows(h: &Tensor, spans: &Spans) -> Result<(), ModelError> {
    match *h.dims() {
        [rows, _] if rows == spans.rows() => Ok(()),
        _ => Err(ModelError::Shape {
            what: "hidden states [rows, d_model]",
            expected: vec![spans.rows(), h.dims().last().copied().unwrap_or(0)],
            found: h.dims().to_vec(),
        }),
    }
}
