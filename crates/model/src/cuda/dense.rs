//! The dense part of a model on a GPU, walked block by block: at an MoE layer the rows and the router's choice come to the
//! host, and what experts elsewhere made of them goes back. The counterpart of [`crate::Backbone`] for a coordinator
//! whose experts are on other nodes; [`super::DeviceModel`] is the same with experts of its own, in one go.
//!
//! A walk is `begin`, then `attend` and `feed_forward` of each block, with `moe_rows` and `add` in between where a
//! block is sparse, then `finish`. The hidden states stay on the device, one walk at a time.

use cudarc::driver::PinnedHostSlice;
use sida_routing::LayerId;

use super::{
    arguments::Sequence,
    device::{DeviceMemory, Gpu},
    error::{CudaError, failed},
    kernels::Kernels,
    pass::{BatchShape, Machine, Pass},
    scratch::{LOGIT_ROWS_MAX, Packet, Scratch},
    sequence::DeviceSequence,
    weights::{self, Block, DeviceBackbone, FeedForward, StackWeights},
};
use crate::{Checkpoint, ModelConfig, ModelError, Precision, Spans, Stack};

/// See the file's head.
#[derive(Debug)]
pub struct DeviceDense {
    pub(super) gpu: Gpu,
    pub(super) config: ModelConfig,
    pub(super) precision: Precision,
    pub(super) kernels: Kernels,
    pub(super) backbone: DeviceBackbone,
    pub(super) scratch: Scratch,
    exchange: Option<Exchange>,
    walk: Option<Walk>,
}

/// Where rows stop on their way from and to the device.
#[derive(Debug)]
struct Exchange {
    host: PinnedHostSlice<u8>,
    /// (rows, d_model), float32
    added: DeviceMemory,
}

/// A pass that is walked.
#[derive(Clone, Copy, Debug)]
struct Walk {
    stack: Stack,
    shape: BatchShape,
    packet: Packet,
}

/// An MoE layer's rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoeRows {
    /// (rows, d_model): what experts see.
    pub x: Vec<f32>,
    /// The router's choice for each row, and its probability.
    pub experts: Vec<u16>,
    /// See `experts`.
    pub alpha: Vec<f32>,
    /// (rows, experts): all that the router said, empty until somebody asks.
    pub probabilities: Vec<f32>,
}

impl DeviceDense {
    /// Compiles the kernels and loads the weights. Batches of at most `rows_max` rows.
    pub fn open(gpu: Gpu, checkpoint: &Checkpoint, precision: Precision, rows_max: usize) -> Result<Self, CudaError> {
        let config = checkpoint.config().clone();
        weights::check(&config)?;
        gpu.enter()?;
        let kernels = Kernels::compile(&gpu, precision, config.d_kv)?;
        let backbone = DeviceBackbone::load(&gpu, checkpoint, precision)?;
        let scratch = Scratch::new(&gpu, &config, precision, rows_max)?;
        Ok(Self { gpu, config, precision, kernels, backbone, scratch, exchange: None, walk: None })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weights on the device, and of what passes work in; caches of sequences come on top.
    pub fn bytes(&self) -> (u64, u64) {
        let added = self.exchange.as_ref().map_or(0, |exchange| exchange.added.bytes() as u64);
        (self.backbone.bytes, self.scratch.bytes() + added)
    }

    /// Begins a walk through a stack: h = the embeddings of `ids`, which `spans` cuts into sequences. `sequences` are
    /// the decoder's, in the same order, and none for the encoder.
    pub fn begin(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: &mut [&mut DeviceSequence],
    ) -> Result<(), CudaError> {
        self.check_batch(ids, spans)?;
        self.gpu.enter()?;
        self.make_exchange()?;
        let described = match stack {
            Stack::Encoder => Self::prompts(spans),
            Stack::Decoder => self.describe(spans, sequences)?,
        };
        let shape = BatchShape::of(spans, 0);
        let packet = Packet::plan(&self.scratch, shape.rows, shape.sequences, 0);
        packet.send(&self.gpu, ids, &described, &[])?;
        let walk = Walk { stack, shape, packet };
        self.walk = Some(walk);
        self.pass(walk).embed(&self.weights(stack).embedding)
    }

    /// The attention of a block: h += attention(norm(h)).
    pub fn attend(&self, block: usize) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let walk = self.walk();
        let weights = self.weights(walk.stack);
        self.pass(walk).attend_block(&weights.blocks[block], block, weights)
    }

    /// What follows in a block that is dense: h += feed_forward(norm(h)). A sparse one's router chooses; then come
    /// [`DeviceDense::moe_rows`] and [`DeviceDense::add`].
    pub fn feed_forward(&self, block: usize) -> Result<Option<LayerId>, CudaError> {
        self.gpu.enter()?;
        let walk = self.walk();
        let block: &Block = &self.weights(walk.stack).blocks[block];
        match &block.feed_forward {
            FeedForward::Dense { .. } => self.pass(walk).feed_forward(block).map(|()| None),
            FeedForward::Moe { layer, norm, router } => self.pass(walk).gate(norm, router).map(|()| Some(*layer)),
        }
    }

    /// The rows of the MoE layer that the walk is at, and the router's choice. Waits for the device.
    pub fn moe_rows(&mut self) -> Result<MoeRows, CudaError> {
        self.gpu.enter()?;
        let rows = self.walk().shape.rows;
        let value = self.precision.size();
        let (x, chosen, alpha) = (rows * self.config.d_model * value, rows * 2, rows * 4);
        let places = [
            (self.scratch.x.address(), x),
            (self.scratch.alpha.address(), alpha),
            (self.scratch.chosen(0, rows), chosen),
        ];
        let exchange = self.exchange.as_mut().expect("made when the walk began");
        let host = exchange.host.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        let mut at = 0;
        for (from, bytes) in places {
            // SAFETY: the buffer is this object's, and is touched again after `finish` below only.
            unsafe { self.gpu.start_reading(from, &mut host[at..at + bytes]) }?;
            at += bytes;
        }
        self.gpu.finish()?;
        let dtype = self.precision.stored();
        let mut found = MoeRows { x: Vec::with_capacity(rows * self.config.d_model), ..MoeRows::default() };
        dtype.widen_into(&host[..x], &mut found.x);
        found.alpha = crate::StoredDType::F32.widen(&host[x..x + alpha]);
        found.experts =
            host[x + alpha..x + alpha + chosen].as_chunks().0.iter().map(|&e| u16::from_le_bytes(e)).collect();
        Ok(found)
    }

    /// What the router of that layer said before the softmax: (rows, experts).
    pub fn router_logits(&self) -> Result<Vec<f32>, CudaError> {
        self.gpu.enter()?;
        let mut bytes = vec![0; self.walk().shape.rows * self.config.num_experts * 4];
        self.gpu.read(self.scratch.router_logits.address(), &mut bytes)?;
        Ok(crate::StoredDType::F32.widen(&bytes))
    }

    /// h += out (rows, d_model).
    pub fn add(&mut self, out: &[f32]) -> Result<(), CudaError> {
        let walk = self.walk();
        let expected = walk.shape.rows * self.config.d_model;
        if out.len() != expected {
            let (expected, found) = (vec![expected], vec![out.len()]);
            return Err(ModelError::Shape { what: "results of experts [values]", expected, found }.into());
        }
        self.gpu.enter()?;
        let bytes = weights::plain_bytes(out);
        let exchange = self.exchange.as_mut().expect("made when the walk began");
        // Nothing is on its way: the rows were waited for.
        let host = exchange.host.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        host[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: `host` is written again only after the device was waited for, by `moe_rows`; the stream orders `added`.
        unsafe { self.gpu.upload(&self.gpu.compute, &host[..bytes.len()], exchange.added.address()) }?;
        self.pass(walk).add(self.exchange.as_ref().expect("as above").added.address())
    }

    /// Ends a walk. Of the encoder the states are left for [`DeviceDense::read_states`] and [`DeviceDense::start`], of
    /// the decoder for [`DeviceDense::logits`], each until the next walk; the decoder's `sequences` advance.
    pub fn finish(&mut self, spans: &Spans, sequences: &mut [&mut DeviceSequence]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let walk = self.walk();
        if walk.stack == Stack::Encoder {
            self.pass(walk).finish(self.weights(walk.stack))?;
        }
        for (sequence, range) in sequences.iter_mut().zip(spans.ranges()) {
            sequence.advance(range.len());
        }
        // What the host takes back next is ordered after this; what it was given is not written before.
        self.gpu.finish()
    }

    /// Logits of rows of the decoder's last walk: (rows, vocab_size).
    pub fn logits(&mut self, rows: &[u32]) -> Result<Vec<f32>, CudaError> {
        let mut all = Vec::with_capacity(rows.len() * self.config.vocab_size);
        for rows in rows.chunks(LOGIT_ROWS_MAX) {
            self.gpu.enter()?;
            let mut walk = self.walk();
            walk.shape.wanted = rows.len();
            walk.packet = Packet::plan(&self.scratch, 0, 0, rows.len());
            walk.packet.send(&self.gpu, &[], &[], rows)?;
            let DeviceBackbone { decoder, head, head_scale, .. } = &self.backbone;
            self.pass(walk).head(&decoder.final_norm, head, *head_scale)?;
            all.extend(self.read_logits(rows.len())?);
        }
        Ok(all)
    }

    /// The encoder's states (rows, d_model), in the model's precision.
    pub fn read_states(&self, rows: usize, into: &mut Vec<u8>) -> Result<(), CudaError> {
        self.check_rows(rows)?;
        self.gpu.enter()?;
        into.resize(rows * self.config.d_model * self.precision.size(), 0);
        self.gpu.read(self.scratch.x.address(), into)
    }

    /// As [`DeviceDense::read_states`], in float32.
    pub fn states(&self, rows: usize) -> Result<Vec<f32>, CudaError> {
        let mut bytes = Vec::new();
        self.read_states(rows, &mut bytes)?;
        Ok(self.precision.stored().widen(&bytes))
    }

    pub(super) fn read_logits(&self, rows: usize) -> Result<Vec<f32>, CudaError> {
        if rows > LOGIT_ROWS_MAX {
            return Err(CudaError::TooManyRows { rows, limit: LOGIT_ROWS_MAX });
        }
        self.gpu.enter()?;
        let mut bytes = vec![0; rows * self.config.vocab_size * 4];
        self.gpu.read(self.scratch.logits.address(), &mut bytes)?;
        Ok(crate::StoredDType::F32.widen(&bytes))
    }

    /// Sequences of prompts: nothing but their rows.
    pub(super) fn prompts(spans: &Spans) -> Vec<Sequence> {
        let sequence = |range: std::ops::Range<usize>| Sequence {
            first_row: range.start as i32,
            rows: range.len() as i32,
            ..Sequence::default()
        };
        spans.ranges().map(sequence).collect()
    }

    /// What a pass works with, without experts.
    pub(super) fn machine(&self) -> Machine<'_> {
        let Self { gpu, kernels, scratch, config, .. } = self;
        Machine { gpu, kernels, scratch, config, experts: None }
    }

    pub(super) fn check_batch(&self, ids: &[u32], spans: &Spans) -> Result<(), CudaError> {
        self.check_rows(ids.len())?;
        if spans.rows() != ids.len() || spans.is_empty() || spans.ranges().any(|range| range.is_empty()) {
            let (expected, found) = (vec![ids.len()], vec![spans.rows()]);
            return Err(ModelError::Shape { what: "sequences, none empty [rows]", expected, found }.into());
        }
        let vocab_size = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenId { id, vocab_size }.into()),
            None => Ok(()),
        }
    }

    pub(super) fn check_rows(&self, rows: usize) -> Result<(), CudaError> {
        match rows <= self.scratch.rows_max {
            true => Ok(()),
            false => Err(CudaError::TooManyRows { rows, limit: self.scratch.rows_max }),
        }
    }

    fn make_exchange(&mut self) -> Result<(), CudaError> {
        if self.exchange.is_none() {
            let (rows, d_model) = (self.scratch.rows_max, self.config.d_model);
            let host = self.gpu.pinned(rows * (d_model * 4 + 4 + 2))?;
            let added = self.gpu.allocate("activations", rows * d_model * 4)?;
            self.exchange = Some(Exchange { host, added });
        }
        Ok(())
    }

    fn weights(&self, stack: Stack) -> &StackWeights {
        match stack {
            Stack::Encoder => &self.backbone.encoder,
            Stack::Decoder => &self.backbone.decoder,
        }
    }

    fn walk(&self) -> Walk {
        self.walk.expect("a walk was begun")
    }

    fn pass(&self, walk: Walk) -> Pass<'_> {
        Pass::new(self.machine(), walk.shape, walk.packet, None, false)
    }
}
