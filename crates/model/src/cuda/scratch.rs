//! Memory that a pass works in, taken once for the largest batch: what lies between operations, the packet that tells
//! the device what to compute, and the report of what came of it.

use std::sync::Arc;

use bytemuck::Pod;

use super::{
    arguments::{Sequence, Tile},
    buffer::{DeviceBuffer, DeviceSlice},
    device::Gpu,
    error::CudaError,
    window::{RowsLayout, Shareable},
};
use crate::{
    ModelConfig, Precision, Wanted,
    spec::{BlockSpec, FeedForwardSpec},
};

/// No token: of a row without a number among its logits, and where none is banned.
pub(super) const NO_TOKEN: u32 = u32::MAX;
/// Rows whose logits are computed at once: 33 MB of them for a vocabulary of 32,128.
pub(super) const LOGIT_ROWS_MAX: usize = 256;
/// Where the report's parts begin: the guard of the pass, the tokens of rows with logits, and the experts chosen.
const TOKENS_AT: usize = 16;
pub(super) const CHOSEN_AT: usize = TOKENS_AT + 4 * LOGIT_ROWS_MAX;

/// The memory that passes work in. Shapes are of the largest batch; what is bytes is values in the model's precision.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) rows_max: usize,
    /// (rows, d_model): the residual stream.
    pub(super) h: DeviceBuffer<f32>,
    /// Holds `x` and `order`, which nodes of this machine may be let read.
    pub(super) shared: Arc<Shareable>,
    pub(super) layout: RowsLayout,
    /// (rows, d_model): what a norm made of it.
    pub(super) x: DeviceBuffer<u8>,
    /// (rows, inner + 2 * kv_inner)
    pub(super) qkv: DeviceBuffer<u8>,
    /// (rows, inner)
    pub(super) attended: DeviceBuffer<u8>,
    /// (rows, d_ff) of a dense block by row, (choices, d_ff) of experts in grouped order.
    pub(super) hidden: DeviceBuffer<u8>,
    /// (rows, experts)
    pub(super) router_logits: DeviceBuffer<f32>,
    /// (choices): the factor of each. A row has top_k choices.
    pub(super) alpha: DeviceBuffer<f32>,
    /// (choices): the token of each place in grouped order.
    pub(super) order: DeviceBuffer<u32>,
    /// (choices): which choice each place is.
    pub(super) to: DeviceBuffer<u32>,
    /// (choices, d_model): what experts made of each.
    pub(super) each: DeviceBuffer<f32>,
    /// Tiles of groups with few rows, and of the others; then how many there are of each.
    pub(super) few_tiles: DeviceBuffer<Tile>,
    pub(super) many_tiles: DeviceBuffer<Tile>,
    pub(super) tile_counts: DeviceBuffer<i32>,
    /// (LOGIT_ROWS_MAX, vocab_size)
    pub(super) logits: DeviceBuffer<f32>,
    packet: DeviceBuffer<u8>,
    pub(super) report: DeviceBuffer<u8>,
}

impl Scratch {
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        precision: Precision,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        let Widths { choices, qkv, inner, hidden } = Widths::of(config);
        // Kernels count the bytes of a batch's rows in 32 bits.
        let widest = config.d_model.max(hidden).max(qkv);
        if rows_max.saturating_mul(widest) >= 1 << 31 {
            let (what, found) = ("rows * width", format!("{rows_max} * {widest}"));
            return Err(CudaError::Unsupported { what, found, expected: "less than 2^31" });
        }
        let numbers = |width: usize| gpu.allocate::<f32>("activations", rows_max * width);
        let values = |width: usize| gpu.allocate::<u8>("activations", rows_max * width * precision.size());
        let tiles = |count: usize| gpu.allocate::<Tile>("activations", count);
        let experts = config.num_experts;
        let layout = RowsLayout::new(rows_max, choices, config.d_model, precision);
        let shared = Arc::new(Shareable::take(gpu, "activations", layout.bytes())?);
        Ok(Self {
            rows_max,
            h: numbers(config.d_model)?,
            x: DeviceBuffer::part_of(&shared, 0, layout.x_bytes()),
            order: DeviceBuffer::part_of(&shared, layout.order_at(), layout.places()),
            shared,
            layout,
            qkv: values(qkv)?,
            attended: values(inner)?,
            hidden: values(hidden)?,
            router_logits: numbers(experts)?,
            alpha: numbers(choices)?,
            to: gpu.allocate("activations", rows_max * choices)?,
            each: numbers(choices * config.d_model)?,
            few_tiles: tiles(experts + rows_max * choices / 8 + 1)?,
            many_tiles: tiles(experts + rows_max * choices / 64 + 1)?,
            tile_counts: gpu.allocate("activations", 2)?,
            logits: gpu.allocate("logits", LOGIT_ROWS_MAX * config.vocab_size)?,
            packet: gpu.allocate("activations", Packet::bytes_max(rows_max))?,
            report: gpu.allocate("activations", Report::bytes(config.moe_layer_count(), rows_max * choices))?,
        })
    }

    /// Bytes of all of it.
    pub(super) fn bytes(&self) -> u64 {
        let numbers = [&self.h, &self.router_logits, &self.alpha, &self.each, &self.logits];
        let values = [&self.qkv, &self.attended, &self.hidden, &self.packet, &self.report];
        let tiles = self.few_tiles.bytes() + self.many_tiles.bytes() + self.tile_counts.bytes();
        let numbers: u64 = numbers.into_iter().map(DeviceBuffer::bytes).sum();
        let values: u64 = values.into_iter().map(DeviceBuffer::bytes).sum();
        numbers + values + tiles + self.to.bytes() + self.shared.bytes() as u64
    }

    /// Choices of the largest batch.
    pub(super) fn choices_max(&self) -> usize {
        self.layout.places()
    }

    /// Where the guard of the pass is (`Pass` of numbers.cu).
    pub(super) fn guard(&self) -> u64 {
        self.report.address()
    }

    /// Where the best tokens go, at most [`LOGIT_ROWS_MAX`].
    pub(super) fn tokens(&self) -> DeviceSlice<'_, u32> {
        self.report.slice(TOKENS_AT..CHOSEN_AT).cast()
    }

    /// Where the experts of so many choices go that layer `index` of the pass makes.
    pub(super) fn chosen(&self, index: usize, choices: usize) -> DeviceSlice<'_, u16> {
        let at = CHOSEN_AT + index * choices * 2;
        self.report.slice(at..at + choices * 2).cast()
    }
}

/// What a row takes of the memory of a pass, in values.
struct Widths {
    /// Experts that a router chooses for it.
    choices: usize,
    qkv: usize,
    inner: usize,
    /// Between the matrices of a feed-forward: of its choices together, or of a dense one.
    hidden: usize,
}

impl Widths {
    fn of(config: &ModelConfig) -> Self {
        let spec = config.spec();
        let blocks = || spec.encoder.blocks.iter().chain(&spec.decoder.blocks);
        let most = |width: fn(&BlockSpec) -> usize| blocks().map(width).max().unwrap_or(0);
        let dense = most(|block| match block.feed_forward {
            FeedForwardSpec::Dense { d_ff, .. } => d_ff,
            FeedForwardSpec::Moe { shared, .. } => shared.map_or(0, |shared| shared.d_ff),
        });
        Self {
            choices: config.top_k,
            // Of an attention to the input, keys and values alone lie there too.
            qkv: most(|block| block.attention.inner() + 2 * block.attention.kv_inner()),
            inner: most(|block| block.attention.inner()),
            hidden: dense.max(config.top_k * config.d_ff),
        }
    }
}

/// What a pass is told, as one copy to the device. Its parts lie at places that depend on their numbers only, so that
/// a recorded pass finds them again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    base: u64,
    sequences_at: usize,
    wanted_at: usize,
    banned_at: usize,
    bytes: usize,
}

impl Packet {
    fn bytes_max(rows_max: usize) -> usize {
        // A row has an id, is perhaps a sequence of its own, and perhaps wanted, with a token that is banned.
        rows_max * (4 + size_of::<Sequence>() + 8) + 32
    }

    /// The places of `rows` ids, so many sequences, and so many rows whose logits are wanted.
    pub(super) fn plan(scratch: &Scratch, rows: usize, sequences: usize, wanted: usize) -> Self {
        let sequences_at = (rows * 4).next_multiple_of(16);
        let wanted_at = sequences_at + sequences * size_of::<Sequence>();
        let banned_at = wanted_at + wanted * 4;
        Self { base: scratch.packet.address(), sequences_at, wanted_at, banned_at, bytes: banned_at + wanted * 4 }
    }

    /// Writes it to the device, in the order of the compute stream.
    pub(super) fn send(
        &self,
        gpu: &Gpu,
        scratch: &Scratch,
        ids: &[u32],
        sequences: &[Sequence],
        wanted: &[Wanted],
    ) -> Result<(), CudaError> {
        let mut bytes = vec![0; self.bytes];
        put(&mut bytes, ids);
        put(&mut bytes[self.sequences_at..], sequences);
        let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
        let banned: Vec<u32> = wanted.iter().map(|wanted| wanted.banned.unwrap_or(NO_TOKEN)).collect();
        put(&mut bytes[self.wanted_at..], &rows);
        put(&mut bytes[self.banned_at..], &banned);
        gpu.write(scratch.packet.all(), &bytes)
    }

    pub(super) fn ids(&self) -> u64 {
        self.base
    }

    pub(super) fn sequences(&self) -> u64 {
        self.base + self.sequences_at as u64
    }

    pub(super) fn wanted(&self) -> u64 {
        self.base + self.wanted_at as u64
    }

    /// For each wanted row, the token that cannot be next, or [`NO_TOKEN`].
    pub(super) fn banned(&self) -> u64 {
        self.base + self.banned_at as u64
    }
}

/// Copies plain values to the beginning of `to`.
fn put<V: Pod>(to: &mut [u8], values: &[V]) {
    let bytes = bytemuck::cast_slice(values);
    to[..bytes.len()].copy_from_slice(bytes);
}

/// What a pass left in the report.
#[derive(Debug)]
pub(super) struct Report {
    bytes: Vec<u8>,
    /// The first MoE layer whose choices it has.
    first: usize,
}

impl Report {
    /// Of bytes that were read, with the choices of MoE layers from `first` on.
    pub(super) fn of(bytes: Vec<u8>, first: usize) -> Self {
        Self { bytes, first }
    }

    /// How many there are, with what `layers` MoE layers chose, so many choices each.
    pub(super) fn bytes(layers: usize, choices: usize) -> usize {
        CHOSEN_AT + layers * choices * 2
    }

    /// The first MoE layer of which an expert was missing, if any was: what follows was not computed.
    pub(super) fn stopped_at(&self) -> Option<usize> {
        let stop = i32::from_le_bytes(self.bytes[..4].try_into().expect("four bytes"));
        (stop < NOT_STOPPED).then_some(stop as usize)
    }

    /// The best token of each wanted row.
    pub(super) fn tokens(&self, count: usize) -> Vec<u32> {
        let bytes = &self.bytes[TOKENS_AT..TOKENS_AT + count * 4];
        bytes.as_chunks().0.iter().map(|&token| u32::from_le_bytes(token)).collect()
    }

    /// The expert of each of so many choices in layer `index` of the pass.
    pub(super) fn chosen(&self, index: usize, choices: usize) -> Vec<u16> {
        let bytes = &self.bytes[CHOSEN_AT + (index - self.first) * choices * 2..][..choices * 2];
        bytes.as_chunks().0.iter().map(|&expert| u16::from_le_bytes(expert)).collect()
    }
}

/// A guard that was not set: every byte 0x7f, which a memset can write.
pub(super) const NOT_STOPPED: i32 = 0x7f7f_7f7f;
