//! Self- and cross-attention of a block, norm and residual included:
//! `h + (softmax(q K^T + bias) V) O` with q, K and V made of the normed h (or of the encoder's output).

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    ModelConfig, ModelError, Spans, Stack,
    cpu::attention::{Attention, HeadRows, Sequence},
    elementwise::{add, add_to},
    kv_cache::DecoderState,
    linear::Linear,
    loader::Loader,
    names,
    norm::Norm,
    pieces,
    position_bias::PositionBias,
    tensor_rows::{from_rows, rows},
};

/// The heads of every attention of a model.
#[derive(Clone, Copy, Debug)]
struct Heads {
    count: usize,
    d_kv: usize,
}

impl Heads {
    fn of(config: &ModelConfig) -> Self {
        Self { count: config.num_heads, d_kv: config.d_kv }
    }

    fn inner(self) -> usize {
        self.count * self.d_kv
    }

    fn attention(self, causal: bool, bias: Option<&PositionBias>) -> Attention<'_> {
        Attention { heads: self.count, d_kv: self.d_kv, causal, bias }
    }
}

/// Attention of a stack to itself.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    norm: Norm,
    /// (3 * inner, d_model): q, k and v as one product.
    qkv: Linear,
    /// (d_model, inner)
    output: Linear,
    bias: Arc<PositionBias>,
    heads: Heads,
}

impl SelfAttention {
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        stack: Stack,
        block: usize,
        bias: &Arc<PositionBias>,
    ) -> Result<Self, ModelError> {
        let attention = names::Attention::SelfAttention;
        let heads = Heads::of(loader.checkpoint.config());
        let d_model = loader.checkpoint.config().d_model;
        let names = ['q', 'k', 'v'].map(|projection| names::projection(stack, block, attention, projection));
        Ok(Self {
            norm: loader.norm(&names::attention_norm(stack, block, attention))?,
            qkv: loader.fused(&names, heads.inner(), d_model)?,
            output: loader.linear(&names::projection(stack, block, attention, 'o'), d_model, heads.inner())?,
            bias: bias.clone(),
            heads,
        })
    }

    /// Every token sees its whole sequence.
    pub(crate) fn encode(&self, h: &Tensor, spans: &Spans) -> Result<Tensor, ModelError> {
        let d_model = h.dim(1)?;
        let mut h = rows(h, <[f32]>::to_vec)?;
        pieces::by_sequence(&mut h, d_model, spans, |h, spans| self.apply(h, spans));
        Ok(from_rows(h, d_model)?)
    }

    /// As [`SelfAttention::encode`], in place and by the calling thread as far as products do not split themselves.
    pub(crate) fn apply(&self, h: &mut [f32], spans: &Spans) {
        let inner = self.heads.inner();
        let qkv = self.qkv.product(&self.norm.apply(h)); // (n, 3 inner)
        let mut attended = vec![0.0; spans.rows() * inner];
        let sequences = spans.ranges().map(|span| {
            let own = &qkv[span.start * 3 * inner..span.end * 3 * inner];
            let part = |part: usize| HeadRows { values: own, stride: 3 * inner, offset: part * inner };
            Sequence {
                query_rows: span.len(),
                first_position: 0,
                key_rows: span.len(),
                queries: part(0),
                keys: part(1),
                values: part(2),
            }
        });
        self.heads.attention(false, Some(&self.bias)).run(&sequences.collect::<Vec<_>>(), &mut attended);
        add_to(h, &self.output.product(&attended));
    }

    /// Every token sees its sequence up to itself. Writes the new tokens' keys and values into the states'
    /// caches of this block.
    pub(crate) fn decode(
        &self,
        h: &Tensor,
        block: usize,
        states: &mut [&mut DecoderState],
        spans: &Spans,
    ) -> Result<Tensor, ModelError> {
        let inner = self.heads.inner();
        let qkv = self.qkv.forward(&self.norm.forward(h)?)?; // (n, 3 inner)
        let mut attended = vec![0.0; spans.rows() * inner];
        rows(&qkv, |qkv| {
            for (state, span) in states.iter_mut().zip(spans.ranges()) {
                let position = state.position();
                state.caches[block].write(position, &qkv[span.start * 3 * inner..span.end * 3 * inner]);
            }
            let sequences = states.iter().zip(spans.ranges()).map(|(state, span)| {
                let cache = &state.caches[block];
                Sequence {
                    query_rows: span.len(),
                    first_position: state.position(),
                    key_rows: cache.tokens(),
                    queries: HeadRows { values: &qkv[span.start * 3 * inner..], stride: 3 * inner, offset: 0 },
                    keys: HeadRows { values: cache.rows(), stride: 2 * inner, offset: 0 },
                    values: HeadRows { values: cache.rows(), stride: 2 * inner, offset: inner },
                }
            });
            self.heads.attention(true, Some(&self.bias)).run(&sequences.collect::<Vec<_>>(), &mut attended);
        })?;
        Ok(add(h, &self.output.forward(&from_rows(attended, inner)?)?)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.qkv.bytes() + self.output.bytes()
    }
}

/// Attention of the decoder to the encoder's output. Has no position bias.
#[derive(Debug)]
pub(crate) struct CrossAttention {
    norm: Norm,
    /// (inner, d_model)
    query: Linear,
    /// (2 * inner, d_model): k and v as one product.
    kv: Linear,
    /// (d_model, inner)
    output: Linear,
    heads: Heads,
}

impl CrossAttention {
    pub(crate) fn load(loader: &mut Loader<'_>, block: usize) -> Result<Self, ModelError> {
        let (stack, attention) = (Stack::Decoder, names::Attention::CrossAttention);
        let heads = Heads::of(loader.checkpoint.config());
        let d_model = loader.checkpoint.config().d_model;
        let name = |projection| names::projection(stack, block, attention, projection);
        Ok(Self {
            norm: loader.norm(&names::attention_norm(stack, block, attention))?,
            query: loader.linear(&name('q'), heads.inner(), d_model)?,
            kv: loader.fused(&[name('k'), name('v')], heads.inner(), d_model)?,
            output: loader.linear(&name('o'), d_model, heads.inner())?,
            heads,
        })
    }

    /// Keys and values of the encoder's output (tokens, d_model) -> (tokens, 2 * inner), once per sequence.
    pub(crate) fn keys_and_values(&self, encoder_states: &Tensor) -> Result<Vec<f32>, ModelError> {
        Ok(rows(encoder_states, |states| self.kv.product(states))?)
    }

    /// Every token sees the whole input of its sequence.
    pub(crate) fn forward(
        &self,
        h: &Tensor,
        block: usize,
        states: &[&mut DecoderState],
        spans: &Spans,
    ) -> Result<Tensor, ModelError> {
        let inner = self.heads.inner();
        let q = self.query.forward(&self.norm.forward(h)?)?; // (n, inner)
        let mut attended = vec![0.0; spans.rows() * inner];
        rows(&q, |q| {
            let sequences = states.iter().zip(spans.ranges()).map(|(state, span)| {
                let kv = &state.cross[block];
                Sequence {
                    query_rows: span.len(),
                    first_position: 0,
                    key_rows: kv.len() / (2 * inner),
                    queries: HeadRows { values: &q[span.start * inner..], stride: inner, offset: 0 },
                    keys: HeadRows { values: kv, stride: 2 * inner, offset: 0 },
                    values: HeadRows { values: kv, stride: 2 * inner, offset: inner },
                }
            });
            self.heads.attention(false, None).run(&sequences.collect::<Vec<_>>(), &mut attended);
        })?;
        Ok(add(h, &self.output.forward(&from_rows(attended, inner)?)?)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.query.bytes() + self.kv.bytes() + self.output.bytes()
    }
}
