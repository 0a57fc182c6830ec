//! The dense part of a model on a GPU, walked block by block: at an MoE layer the rows and the router's choice come to the
//! host, and what experts elsewhere made of them goes back. The counterpart of [`crate::Backbone`] for a coordinator
//! whose experts are on other nodes; [`super::DeviceModel`] is the same with experts of its own, in one go.
//!
//! A walk is `begin`, then `advance` from MoE layer to MoE layer with `choice` and what is in `moe_rows` in between, then
//! `finish`. The hidden states stay on the device, one walk at a time.

mod moe_rows;

use cudarc::driver::PinnedHostSlice;
use rayon::prelude::*;
use sida_routing::LayerId;

use super::{
    arguments::Sequence,
    device::{DeviceMemory, Gpu},
    error::{CudaError, failed},
    grouped::Tiles,
    kernels::Kernels,
    pass::{BatchShape, Machine, Pass},
    recorded::Recordings,
    scratch::{LOGIT_ROWS_MAX, Packet, Scratch},
    sequence::DeviceSequence,
    weights::{self, Block, DeviceBackbone, FeedForward, StackWeights},
};
use crate::{Checkpoint, ModelConfig, ModelError, Precision, Spans, Stack, StoredDType};

/// Values that one thread widens at a time: what takes some ten microseconds.
const PIECE_VALUES: usize = 1 << 16;

/// No token: of a row without a number among its logits, and where none is banned.
const NO_TOKEN: u32 = u32::MAX;

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
    /// Steps of the decoder by the block that they begin at.
    steps: Recordings<(usize, BatchShape)>,
}

/// Where rows stop on their way from and to the device.
#[derive(Debug)]
struct Exchange {
    host: PinnedHostSlice<u8>,
    /// (rows, d_model), float32: what experts made of the rows.
    added: DeviceMemory,
    /// How many tiles of both ways there are, and those, where experts are on this device.
    tiles: DeviceMemory,
    /// A number for each of so many rows: the places of grouped rows whose results are taken over, tokens that are banned.
    places: DeviceMemory,
}

/// A pass that is walked.
#[derive(Clone, Copy, Debug)]
struct Walk {
    stack: Stack,
    shape: BatchShape,
    packet: Packet,
}

/// What the router chose for the rows of an MoE layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// The expert of each row.
    pub experts: Vec<u16>,
    /// Its probability.
    pub alpha: Vec<f32>,
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
        Ok(Self {
            gpu,
            config,
            precision,
            kernels,
            backbone,
            scratch,
            exchange: None,
            walk: None,
            steps: Recordings::new(),
        })
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

    /// Goes on from block `from` to the next MoE layer, whose router chooses; then come [`DeviceDense::choice`], and
    /// [`DeviceDense::add`] or [`DeviceDense::add_computed`]. Returns it, if there is one, and the block behind it.
    pub fn advance(&mut self, from: usize) -> Result<(usize, Option<LayerId>), CudaError> {
        self.gpu.enter()?;
        let walk = self.walk();
        let blocks = &self.weights(walk.stack).blocks;
        let sparse = blocks[from..].iter().enumerate().find_map(|(at, block)| match block.feed_forward {
            FeedForward::Moe { layer, .. } => Some((from + at, layer)),
            FeedForward::Dense { .. } => None,
        });
        let (end, layer) = sparse.map_or((blocks.len(), None), |(at, layer)| (at + 1, Some(layer)));
        if walk.stack == Stack::Encoder || walk.shape.longest > 1 || from == end {
            // Prompts are seldom of the same lengths again.
            self.start_blocks(walk, from..end)?;
        } else {
            let mut steps = std::mem::replace(&mut self.steps, Recordings::new());
            let started = steps.start(&self.gpu, (from, walk.shape), || self.start_blocks(walk, from..end));
            self.steps = steps;
            started?;
        }
        Ok((end, layer))
    }

    /// h += attention(norm(h)), then h += feed_forward(norm(h)) in a dense block; in a sparse one the router chooses.
    fn start_blocks(&self, walk: Walk, blocks: std::ops::Range<usize>) -> Result<(), CudaError> {
        let weights = self.weights(walk.stack);
        for index in blocks {
            let block: &Block = &weights.blocks[index];
            self.pass(walk).attend_block(block, index, weights)?;
            match &block.feed_forward {
                FeedForward::Dense { .. } => self.pass(walk).feed_forward(block)?,
                FeedForward::Moe { norm, router, .. } => self.pass(walk).gate(norm, router)?,
            }
        }
        Ok(())
    }

    /// The router's choice at the MoE layer that the walk is at. Waits for the device.
    pub fn choice(&mut self) -> Result<Choice, CudaError> {
        self.gpu.enter()?;
        let rows = self.walk().shape.rows;
        let (alpha, chosen) = (rows * 4, rows * 2);
        let places = [(self.scratch.alpha.address(), 0..alpha), (self.scratch.chosen(0, rows), alpha..alpha + chosen)];
        let exchange = self.exchange.as_mut().expect("made when the walk began");
        let host = exchange.host.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        for (from, place) in places {
            // SAFETY: the buffer is this object's, and is touched again after `finish` below only.
            unsafe { self.gpu.start_reading(from, &mut host[place]) }?;
        }
        self.gpu.finish()?;
        let experts = host[alpha..alpha + chosen].as_chunks().0.iter().map(|&e| u16::from_le_bytes(e)).collect();
        Ok(Choice { experts, alpha: StoredDType::F32.widen(&host[..alpha]) })
    }

    /// What the router of that layer said before the softmax: (rows, experts).
    pub fn router_logits(&self) -> Result<Vec<f32>, CudaError> {
        self.gpu.enter()?;
        let mut bytes = vec![0; self.walk().shape.rows * self.config.num_experts * 4];
        self.gpu.read(self.scratch.router_logits.address(), &mut bytes)?;
        Ok(StoredDType::F32.widen(&bytes))
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
        let vocab_size = self.config.vocab_size;
        let mut all = vec![0.0; rows.len() * vocab_size];
        for (rows, values) in rows.chunks(LOGIT_ROWS_MAX).zip(all.chunks_mut(LOGIT_ROWS_MAX * vocab_size)) {
            self.start_head(rows, None)?;
            self.gpu.read(self.scratch.logits.address(), weights::plain_bytes_mut(values))?;
        }
        Ok(all)
    }

    /// The most likely token after each of these rows of the decoder's last walk, never the one that is banned for it; none
    /// where no logit is a number. What would be the first of the largest logits is chosen on the device.
    pub fn best_tokens(&mut self, rows: &[u32], banned: &[Option<u32>]) -> Result<Vec<Option<u32>>, CudaError> {
        let mut best = Vec::with_capacity(rows.len());
        for (rows, banned) in rows.chunks(LOGIT_ROWS_MAX).zip(banned.chunks(LOGIT_ROWS_MAX)) {
            let banned: Vec<u32> = banned.iter().map(|token| token.unwrap_or(NO_TOKEN)).collect();
            self.start_head(rows, Some(&banned))?;
            let mut tokens = vec![0; rows.len() * 4];
            self.gpu.read(self.scratch.tokens(), &mut tokens)?;
            let token = |&bytes| Some(u32::from_le_bytes(bytes)).filter(|&token| token != NO_TOKEN);
            best.extend(tokens.as_chunks().0.iter().map(token));
        }
        Ok(best)
    }

    /// Starts computing logits and best tokens of at most [`LOGIT_ROWS_MAX`] rows.
    fn start_head(&mut self, rows: &[u32], banned: Option<&[u32]>) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let mut walk = self.walk();
        walk.shape.wanted = rows.len();
        walk.packet = Packet::plan(&self.scratch, 0, 0, rows.len());
        walk.packet.send(&self.gpu, &[], &[], rows)?;
        let places = self.exchange.as_ref().expect("made when the walk began").places.address();
        if let Some(banned) = banned {
            self.gpu.write(places, weights::plain_bytes(banned))?;
        }
        let DeviceBackbone { decoder, head, head_scale, .. } = &self.backbone;
        self.pass(walk).head(&decoder.final_norm, head, *head_scale, banned.map(|_| places))
    }

    /// The encoder's states (rows, d_model), in the model's precision.
    pub fn read_states(&self, rows: usize, into: &mut Vec<u8>) -> Result<(), CudaError> {
        self.check_rows(rows)?;
        self.gpu.enter()?;
        into.resize(rows * self.config.d_model * self.precision.size(), 0);
        self.gpu.read(self.scratch.x.address(), into)
    }

    /// As [`DeviceDense::read_states`], in float32, over what `out` (rows, d_model) holds. What is large is widened by the
    /// threads of the pool.
    pub fn write_states(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        let rows = out.len() / self.config.d_model;
        self.check_rows(rows)?;
        self.gpu.enter()?;
        let stored = self.precision.stored();
        let exchange = self.exchange.as_mut().expect("made when the walk began");
        let host = exchange.host.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        let host = &mut host[..out.len() * stored.size()];
        self.gpu.read(self.scratch.x.address(), host)?;
        let pieces = host.par_chunks(PIECE_VALUES * stored.size()).zip(out.par_chunks_mut(PIECE_VALUES));
        pieces.for_each(|(bytes, values)| stored.widen_over(bytes, values));
        Ok(())
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
        let mut values = vec![0.0; rows * self.config.vocab_size];
        self.gpu.read(self.scratch.logits.address(), weights::plain_bytes_mut(&mut values))?;
        Ok(values)
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
            let tiles = self.gpu.allocate("activations", Tiles::bytes_max(rows))?;
            let places = self.gpu.allocate("activations", rows * 4)?;
            self.exchange = Some(Exchange { host, added, tiles, places });
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
        Pass::new(self.machine(), walk.shape, walk.packet, None)
    }
}
