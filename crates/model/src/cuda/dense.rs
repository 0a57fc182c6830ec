//! The dense part of a model on a GPU: passes that stop at MoE layers, where the rows and the router's choice come to the
//! host, and what experts elsewhere made of them goes back. The hidden states stay on the device, one pass at a time.
//!
//! How rows travel is in `moe_rows`. With experts beside it on the device a pass goes `through` MoE layers without a stop.

mod moe_rows;
mod through;

use std::sync::Arc;

use cudarc::driver::PinnedHostSlice;
use rayon::prelude::*;
use sida_routing::{ExpertId, LayerId, Routes};

use self::through::Through;
use super::{
    arguments::Sequence,
    device::{DeviceMemory, Gpu},
    error::{CudaError, failed},
    grouped::Tiles,
    kernels::Kernels,
    pass::{BatchShape, Machine, Pass},
    recorded::Recordings,
    scratch::{LOGIT_ROWS_MAX, NO_TOKEN, Packet, Scratch},
    sequence::DeviceSequence,
    weights::{self, Device},
};
use crate::{
    Backbone, CacheSize, Checkpoint, ModelConfig, ModelError, PassedLayer, Precision, ResidentExperts, RowsOnDevice,
    RowsWindow, Spans, Stack, StoredDType,
    backend::{Backend, Beside, MoeRows, NewSequence, Passed, Wanted},
    forward::{self, Position},
    names,
};

/// Values that one thread widens at a time: what takes some ten microseconds.
const PIECE_VALUES: usize = 1 << 16;

/// Weights on a device, and the memory that passes through them work in.
#[derive(Debug)]
pub struct DeviceDense {
    pub(super) gpu: Gpu,
    pub(super) config: ModelConfig,
    pub(super) precision: Precision,
    pub(super) kernels: Kernels,
    pub(super) backbone: Backbone<Device>,
    backbone_bytes: u64,
    pub(super) scratch: Scratch,
    exchange: Exchange,
    through: Through,
    /// The pass that has the device's memory, or had it last.
    current: Current,
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
    /// A number for each of so many rows: the places of grouped rows whose results are taken over.
    places: DeviceMemory,
}

/// What the device is told of a pass.
#[derive(Clone, Copy, Debug)]
struct Current {
    shape: BatchShape,
    packet: Packet,
}

/// A pass on a GPU.
pub struct DevicePass<'s> {
    stack: Stack,
    /// The block that it goes on before.
    next: usize,
    spans: Spans,
    sequences: Vec<&'s mut DeviceSequence>,
    /// Experts on the device, if it goes through MoE layers by itself; the layers that it went through so.
    experts: Option<Arc<dyn ResidentExperts>>,
    layers: Vec<PassedLayer>,
    /// Whether what follows the last block is done, too, and what came of it: the best tokens of the wanted rows.
    is_finished: bool,
    tokens: Option<Vec<u32>>,
    /// At an MoE layer, what its router chose, and all that it said, (rows, experts), once somebody asked.
    choice: Routes,
    probabilities: Vec<f32>,
}

/// What a pass on a GPU left, until the next one begins: so many rows, of the encoder its states, of the decoder h after
/// the last block.
#[derive(Debug)]
pub struct DeviceStates {
    rows: usize,
    /// The best tokens of the rows that were wanted with the pass, where it chose them.
    tokens: Option<Vec<u32>>,
}

impl Exchange {
    fn new(gpu: &Gpu, config: &ModelConfig, rows: usize) -> Result<Self, CudaError> {
        Ok(Self {
            host: gpu.pinned(rows * (config.d_model * 4 + 4 + 2))?,
            added: gpu.allocate("activations", rows * config.d_model * 4)?,
            tiles: gpu.allocate("activations", Tiles::bytes_max(rows))?,
            places: gpu.allocate("activations", rows * 4)?,
        })
    }

    /// The host's side. Waits for what is on its way from there.
    fn host(&mut self) -> Result<&mut [u8], CudaError> {
        self.host.as_mut_slice().map_err(failed("cuEventSynchronize"))
    }
}

impl DeviceDense {
    /// Compiles the kernels and loads the weights. Batches of at most `rows_max` rows.
    pub fn open(gpu: Gpu, checkpoint: &Checkpoint, precision: Precision, rows_max: usize) -> Result<Self, CudaError> {
        let config = checkpoint.config().clone();
        weights::check(&config)?;
        gpu.enter()?;
        let kernels = Kernels::compile(&gpu, precision, config.d_kv)?;
        let (backbone, backbone_bytes) = weights::load(&gpu, checkpoint, precision)?;
        let scratch = Scratch::new(&gpu, &config, precision, rows_max)?;
        let exchange = Exchange::new(&gpu, &config, rows_max)?;
        let current = Current { shape: BatchShape::default(), packet: Packet::plan(&scratch, 0, 0, 0) };
        let (through, steps) = (Through::new(&gpu, &config, &scratch)?, Recordings::new());
        Ok(Self {
            gpu,
            config,
            precision,
            kernels,
            backbone,
            backbone_bytes,
            scratch,
            exchange,
            through,
            current,
            steps,
        })
    }

    /// Opens a device by its number, and there the model: in a precision, or as its embeddings are stored.
    pub fn load(
        ordinal: usize,
        checkpoint: &Checkpoint,
        precision: Option<Precision>,
        rows_max: usize,
    ) -> Result<Self, ModelError> {
        let stored = checkpoint.dtype(&names::embedding(checkpoint, Stack::Encoder))?;
        let precision = precision.unwrap_or(Precision::of_weights(stored));
        Ok(Self::open(Gpu::open(ordinal)?, checkpoint, precision, rows_max)?)
    }

    /// Bytes of weights on the device, and of what passes work in; caches of sequences come on top.
    pub fn bytes(&self) -> (u64, u64) {
        (self.backbone_bytes, self.scratch.bytes() + self.exchange.added.bytes() as u64)
    }

    /// The router's choice at MoE layer number `layer` of the report: the expert of each row, and its
    /// probability. Waits for the device.
    fn choice(&mut self, layer: usize) -> Result<Routes, CudaError> {
        self.gpu.enter()?;
        let rows = self.current.shape.rows;
        let (alpha, chosen) = (rows * 4, rows * 2);
        let places =
            [(self.scratch.alpha.address(), 0..alpha), (self.scratch.chosen(layer, rows), alpha..alpha + chosen)];
        let host = self.exchange.host()?;
        for (from, place) in places {
            // SAFETY: the buffer is this object's, and is touched again after `finish` below only.
            unsafe { self.gpu.start_reading(from, &mut host[place]) }?;
        }
        self.gpu.finish()?;
        let experts = host[alpha..alpha + chosen].as_chunks().0.iter();
        let experts = experts.map(|&expert| Some(ExpertId(u16::from_le_bytes(expert)))).collect();
        Ok(Routes { top_k: 1, experts, weights: StoredDType::F32.widen(&host[..alpha]) })
    }

    /// Starts computing logits and best tokens of at most [`LOGIT_ROWS_MAX`] rows, and no fewer than one.
    fn start_head(&mut self, wanted: &[Wanted]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let shape = BatchShape { wanted: wanted.len(), ..self.current.shape };
        let packet = Packet::plan(&self.scratch, 0, 0, wanted.len());
        packet.send(&self.gpu, &[], &[], wanted)?;
        let mut pass = Pass::new(self.machine(), shape, packet, 0);
        forward::head(&mut pass, &self.backbone.decoder, &self.backbone.head)
    }

    fn compute_best_tokens(&mut self, wanted: &[Wanted]) -> Result<Vec<u32>, CudaError> {
        let mut best = Vec::with_capacity(wanted.len());
        for wanted in wanted.chunks(LOGIT_ROWS_MAX) {
            self.start_head(wanted)?;
            let mut tokens = vec![0; wanted.len() * 4];
            self.gpu.read(self.scratch.tokens(), &mut tokens)?;
            best.extend(tokens.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)));
        }
        Ok(best)
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
    fn write_states(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        self.check_rows(out.len() / self.config.d_model)?;
        self.gpu.enter()?;
        let stored = self.precision.stored();
        let host = &mut self.exchange.host()?[..out.len() * stored.size()];
        self.gpu.read(self.scratch.x.address(), host)?;
        let pieces = host.par_chunks(PIECE_VALUES * stored.size()).zip(out.par_chunks_mut(PIECE_VALUES));
        pieces.for_each(|(bytes, values)| stored.widen_over(bytes, values));
        Ok(())
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

    /// The current pass, from where its rows leave for their experts.
    fn pass(&self) -> Pass<'_> {
        Pass::new(self.machine(), self.current.shape, self.current.packet, 0)
    }

    pub(super) fn check_batch(&self, ids: &[u32], spans: &Spans) -> Result<(), CudaError> {
        self.check_rows(ids.len())?;
        if spans.rows() != ids.len() || spans.is_empty() || spans.ranges().any(|range| range.is_empty()) {
            let (expected, found) = (vec![ids.len()], vec![spans.rows()]);
            return Err(ModelError::Shape { what: "sequences, none empty [rows]", expected, found }.into());
        }
        Ok(self.backbone.check_ids(ids)?)
    }

    pub(super) fn check_rows(&self, rows: usize) -> Result<(), CudaError> {
        match rows <= self.scratch.rows_max {
            true => Ok(()),
            false => Err(CudaError::TooManyRows { rows, limit: self.scratch.rows_max }),
        }
    }
}

impl Backend for DeviceDense {
    type Pass<'s> = DevicePass<'s>;
    type States = DeviceStates;
    type Sequence = DeviceSequence;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn cache_size(&self) -> CacheSize {
        CacheSize::new(&self.backbone.spec, self.precision.size())
    }

    fn another(&self) -> Option<Self> {
        None
    }

    fn begin<'s>(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: Vec<&'s mut DeviceSequence>,
        Beside { wanted, experts }: Beside<'_>,
    ) -> Result<DevicePass<'s>, ModelError> {
        self.check_batch(ids, spans)?;
        self.gpu.enter()?;
        let described = match stack {
            Stack::Encoder => Self::prompts(spans),
            Stack::Decoder => self.describe(spans, &sequences)?,
        };
        let wanted = if wanted.len() <= LOGIT_ROWS_MAX { wanted } else { &[] };
        let shape = BatchShape::of(spans, wanted.len());
        let packet = Packet::plan(&self.scratch, shape.rows, shape.sequences, shape.wanted);
        packet.send(&self.gpu, ids, &described, wanted)?;
        self.current = Current { shape, packet };
        Ok(DevicePass {
            stack,
            next: 0,
            spans: spans.clone(),
            sequences,
            experts,
            layers: Vec::new(),
            choice: Routes { top_k: 1, experts: Vec::new(), weights: Vec::new() },
            is_finished: false,
            tokens: None,
            probabilities: Vec::new(),
        })
    }

    fn advance(&mut self, pass: &mut DevicePass<'_>) -> Result<Option<LayerId>, ModelError> {
        if let Some(experts) = pass.experts.clone() {
            return Ok(self.advance_through(pass, &*experts)?);
        }
        self.gpu.enter()?;
        let (spec, from) = (self.backbone.spec.stack(pass.stack), pass.next);
        let moe = spec.next_moe(from);
        let end = moe.map_or(spec.blocks.len(), |(block, _)| block + 1);
        let shape = self.current.shape;
        let mut steps = std::mem::replace(&mut self.steps, Recordings::new());
        let start = || {
            let weights = self.backbone.stack(pass.stack);
            if from == 0 {
                forward::embed(&mut self.pass(), weights)?;
            }
            forward::advance(&mut self.pass(), weights, Position::Block(from)).map(drop)
        };
        let started = match pass.stack == Stack::Encoder || shape.longest > 1 || from == end {
            // Prompts are seldom of the same lengths again.
            true => start(),
            false => steps.start(&self.gpu, (from, shape), start),
        };
        self.steps = steps;
        started?;
        pass.next = end;
        pass.probabilities.clear();
        if moe.is_some() {
            pass.choice = self.choice(0)?;
        }
        Ok(moe.map(|(_, layer)| layer))
    }

    fn routes(&mut self, pass: &mut DevicePass<'_>) -> Result<Routes, ModelError> {
        Ok(pass.choice.clone())
    }

    /// The softmax is taken here: the device takes it of the largest only.
    fn probabilities<'p>(&mut self, pass: &'p mut DevicePass<'_>) -> Result<&'p [f32], ModelError> {
        if pass.probabilities.is_empty() {
            self.gpu.enter()?;
            pass.probabilities = vec![0.0; self.current.shape.rows * self.config.num_experts];
            let logits = weights::plain_bytes_mut(&mut pass.probabilities);
            self.gpu.read(self.scratch.router_logits.address(), logits)?;
            crate::cpu::norm::softmax(&mut pass.probabilities, self.config.num_experts);
        }
        Ok(&pass.probabilities)
    }

    fn rows<'p>(&'p mut self, _: &'p mut DevicePass<'_>) -> MoeRows<'p> {
        MoeRows::Device(RowsOnDevice { dense: self })
    }

    fn add(&mut self, _: &mut DevicePass<'_>, out: &[f32]) -> Result<(), ModelError> {
        Ok(self.add_rows(out)?)
    }

    fn finish(&mut self, mut pass: DevicePass<'_>) -> Result<Passed<DeviceStates>, ModelError> {
        self.gpu.enter()?;
        if pass.stack == Stack::Encoder && !pass.is_finished {
            forward::finish(&mut self.pass(), &self.backbone.encoder)?;
        }
        for (sequence, range) in pass.sequences.iter_mut().zip(pass.spans.ranges()) {
            sequence.advance(range.len());
        }
        if !pass.is_finished {
            // What the host takes back next is ordered after this; what it was given is not written before.
            self.gpu.finish()?;
        }
        Ok(Passed { states: DeviceStates { rows: pass.spans.rows(), tokens: pass.tokens }, layers: pass.layers })
    }

    fn join(&mut self, mut parts: Vec<DeviceStates>) -> Result<DeviceStates, ModelError> {
        let (expected, found) = (vec![1], vec![parts.len()]);
        parts.pop().filter(|_| found == expected).ok_or(ModelError::Shape {
            what: "passes of a batch on a device",
            expected,
            found,
        })
    }

    fn values<'b>(&mut self, states: &DeviceStates, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], ModelError> {
        let values = states.rows * self.config.d_model;
        if buffer.len() < values {
            buffer.resize(values, 0.0);
        }
        self.write_states(&mut buffer[..values])?;
        Ok(&buffer[..values])
    }

    fn start(
        &mut self,
        states: &DeviceStates,
        sequences: &[NewSequence],
    ) -> Result<Vec<Result<DeviceSequence, ModelError>>, ModelError> {
        let started = self.start_sequences(states.rows, sequences)?;
        Ok(started.into_iter().map(|sequence| sequence.map_err(ModelError::from)).collect())
    }

    fn fork(&self, sequence: &DeviceSequence) -> Result<DeviceSequence, ModelError> {
        Ok(self.fork_sequence(sequence)?)
    }

    fn logits(&mut self, _: &DeviceStates, rows: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (rows, vocab_size) = (rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), self.config.vocab_size);
        let mut all = vec![0.0; rows.len() * vocab_size];
        for (rows, values) in rows.chunks(LOGIT_ROWS_MAX).zip(all.chunks_mut(LOGIT_ROWS_MAX * vocab_size)) {
            self.start_head(&rows.iter().map(|&row| Wanted { row, banned: None }).collect::<Vec<_>>())?;
            self.gpu.read(self.scratch.logits.address(), weights::plain_bytes_mut(values))?;
        }
        Ok(all)
    }

    /// What would be the first of the largest logits is chosen on the device, by the pass itself if these rows were wanted with
    /// it and it went through to its end.
    fn best_tokens(
        &mut self,
        states: &DeviceStates,
        wanted: &[Wanted],
    ) -> Option<Result<Vec<Option<u32>>, ModelError>> {
        let tokens = match &states.tokens {
            Some(tokens) if tokens.len() == wanted.len() => Ok(tokens.clone()),
            _ => self.compute_best_tokens(wanted),
        };
        let is_one = |&token: &u32| token != NO_TOKEN;
        let best = |tokens: Vec<u32>| tokens.into_iter().map(|token| Some(token).filter(is_one)).collect();
        Some(tokens.map(best).map_err(ModelError::from))
    }

    fn device(&mut self) -> Option<RowsOnDevice<'_>> {
        Some(RowsOnDevice { dense: self })
    }

    fn rows_window(&self) -> Option<Result<RowsWindow, ModelError>> {
        let shared = self.shared_rows().map_err(ModelError::from);
        Some(shared.map(|shared| RowsWindow { shared: Arc::new(shared) }))
    }
}
