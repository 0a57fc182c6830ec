//! The dense part of a model on a GPU: passes that stop at MoE layers, where the rows and the router's choice come to the
//! host, and what experts elsewhere made of them goes back. The hidden states stay on the device, one pass at a time.
//!
//! How a pass goes is in `backend`, how rows travel in `moe_rows`. With experts beside it on the device a pass goes `through`
//! MoE layers without a stop.

mod backend;
mod moe_rows;
mod through;

use bytemuck::cast_slice_mut;
use cudarc::driver::PinnedHostSlice;
use rayon::prelude::*;
use sida_routing::{ExpertId, Routes};

pub use self::backend::{DevicePass, DeviceStates};
use self::through::Through;
use super::{
    arguments::{Mean, Sequence},
    buffer::DeviceBuffer,
    device::Gpu,
    error::{CudaError, failed},
    grouped::Tiles,
    kernels::Kernels,
    pass::{BatchShape, Machine, Pass, Turns},
    recorded::Recordings,
    scratch::{LOGIT_ROWS_MAX, Packet, Report, Scratch},
    weights::{self, Device},
};
use crate::{
    Backbone, Checkpoint, ExpertStore, ModelConfig, ModelError, Precision, Spans, Wanted, expert_slot::Layout, forward,
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
    turns: Vec<Turns>,
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
    /// (rows, d_model): what comes from the host and is about to be added.
    added: DeviceBuffer<f32>,
    /// How many tiles of both ways there are, and those, where experts are on this device.
    tiles: DeviceBuffer<u8>,
    /// A number for each of so many rows: the places of grouped rows whose results are taken over.
    places: DeviceBuffer<u32>,
}

/// What the device is told of a pass.
#[derive(Clone, Copy, Debug)]
struct Current {
    shape: BatchShape,
    packet: Packet,
}

impl Exchange {
    fn new(gpu: &Gpu, config: &ModelConfig, rows: usize) -> Result<Self, CudaError> {
        let choices = rows * config.top_k;
        let read = Report::bytes(config.moe_layer_count(), choices).max(choices * (4 + 2));
        Ok(Self {
            host: gpu.pinned(read.max(rows * config.d_model * 4))?,
            added: gpu.allocate("activations", rows * config.d_model)?,
            tiles: gpu.allocate("activations", Tiles::bytes_max(choices))?,
            places: gpu.allocate("activations", choices)?,
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
        let (backbone, backbone_bytes, mut formats) = weights::load(&gpu, checkpoint, precision)?;
        // Those of a slab on this device are computed by this module.
        let of_experts = ExpertStore::dtypes_of(checkpoint)?;
        formats.extend(of_experts.into_iter().filter_map(|stored| Layout::of(stored, precision).format()));
        let kernels = Kernels::compile(&gpu, precision, &formats, config.d_kv)?;
        let turns = Turns::of(&gpu, &config)?;
        let scratch = Scratch::new(&gpu, &config, precision, rows_max)?;
        let exchange = Exchange::new(&gpu, &config, rows_max)?;
        let current = Current { shape: BatchShape::default(), packet: Packet::plan(&scratch, 0, 0, 0) };
        let (through, steps) = (Through::new(&gpu, &config, &scratch)?, Recordings::new(1));
        Ok(Self {
            gpu,
            config,
            precision,
            kernels,
            backbone,
            backbone_bytes,
            turns,
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
        let stored = checkpoint.dtype(&names::embeddings(checkpoint)?.encoder)?;
        let precision = precision.unwrap_or(Precision::of_weights(stored));
        Ok(Self::open(Gpu::open(ordinal)?, checkpoint, precision, rows_max)?)
    }

    /// Bytes of weights on the device, and of what passes work in; caches of sequences come on top.
    pub fn bytes(&self) -> (u64, u64) {
        (self.backbone_bytes, self.scratch.bytes() + self.exchange.added.bytes())
    }

    /// The router's choice at MoE layer number `layer` of the report: the experts of each row, and their
    /// probabilities. Waits for the device.
    fn choice(&mut self, layer: usize) -> Result<Routes, CudaError> {
        self.gpu.enter()?;
        let top_k = self.config.top_k;
        let choices = self.current.shape.rows * top_k;
        let (alpha, chosen) = self.exchange.host()?[..choices * 6].split_at_mut(choices * 4);
        let (alpha, chosen): (&mut [f32], &mut [u16]) = (cast_slice_mut(alpha), cast_slice_mut(chosen));
        // SAFETY: the buffer is this object's, and is touched again after `finish` below only.
        unsafe { self.gpu.start_reading(self.scratch.alpha.all(), alpha) }?;
        // SAFETY: as above.
        unsafe { self.gpu.start_reading(self.scratch.chosen(layer, choices), chosen) }?;
        self.gpu.finish()?;
        let experts = chosen.iter().map(|&expert| Some(ExpertId(expert))).collect();
        Ok(Routes { top_k, experts, weights: alpha.to_vec() })
    }

    /// Starts computing logits and best tokens of at most [`LOGIT_ROWS_MAX`] rows, and no fewer than one.
    fn start_head(&mut self, wanted: &[Wanted]) -> Result<(), CudaError> {
        self.gpu.enter()?;
        let shape = BatchShape { wanted: wanted.len(), ..self.current.shape };
        let packet = Packet::plan(&self.scratch, 0, 0, wanted.len());
        packet.send(&self.gpu, &self.scratch, &[], &[], wanted)?;
        let mut pass = Pass::new(self.machine(), shape, packet, 0);
        forward::head(&mut pass, &self.backbone.decoder, &self.backbone.head)
    }

    fn compute_best_tokens(&mut self, wanted: &[Wanted]) -> Result<Vec<u32>, CudaError> {
        let mut best = Vec::with_capacity(wanted.len());
        for wanted in wanted.chunks(LOGIT_ROWS_MAX) {
            self.start_head(wanted)?;
            let from = best.len();
            best.resize(from + wanted.len(), 0);
            self.gpu.read(self.scratch.tokens(), &mut best[from..])?;
        }
        Ok(best)
    }

    /// The encoder's states (rows, d_model), in the model's precision.
    pub fn read_states(&self, rows: usize, into: &mut Vec<u8>) -> Result<(), CudaError> {
        self.check_rows(rows)?;
        self.gpu.enter()?;
        into.resize(rows * self.config.d_model * self.precision.size(), 0);
        self.gpu.read(self.scratch.x.all(), into)
    }

    /// As [`DeviceDense::read_states`], in float32, over what `out` (rows, d_model) holds. What is large is widened by the
    /// threads of the pool.
    fn write_states(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        self.check_rows(out.len() / self.config.d_model)?;
        self.gpu.enter()?;
        let stored = self.precision.stored();
        let host = &mut self.exchange.host()?[..stored.bytes(out.len())];
        self.gpu.read(self.scratch.x.all(), host)?;
        let pieces = host.par_chunks(stored.bytes(PIECE_VALUES)).zip(out.par_chunks_mut(PIECE_VALUES));
        pieces.for_each(|(bytes, values)| stored.widen_over(bytes, values));
        Ok(())
    }

    /// The mean of the encoder's states over each of so many sequences of the current pass, in float32.
    fn read_means(&mut self, sequences: usize) -> Result<Vec<f32>, CudaError> {
        self.gpu.enter()?;
        let (packet, d) = (self.current.packet, self.config.d_model);
        let (x, out) = (self.scratch.x.address(), self.exchange.added.first(sequences * d));
        let arguments = Mean { x, sequences: packet.sequences(), out: out.address(), d: d as i32 };
        // SAFETY: the packet has so many sequences, whose rows are among those of x; `out` was measured above.
        unsafe { self.gpu.launch(&self.kernels.mean, (sequences, d.div_ceil(128), 1), 128, &arguments) }?;
        let mut means = vec![0.0; out.len()];
        self.gpu.read(out, &mut means)?;
        Ok(means)
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
        let Self { gpu, kernels, scratch, config, turns, .. } = self;
        Machine { gpu, kernels, scratch, config, turns, experts: None }
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
