//! Memory that a pass works in, taken once for the largest batch: what lies between operations, the packet that tells
//! the device what to compute, and the report of what came of it.

use std::sync::Arc;

use super::{
    arguments::Sequence,
    device::{DeviceMemory, Gpu},
    error::CudaError,
    weights::plain_bytes,
    window::{RowsLayout, Shareable},
};
use crate::{ModelConfig, Precision, Wanted};

/// No token: of a row without a number among its logits, and where none is banned.
pub(super) const NO_TOKEN: u32 = u32::MAX;
/// Rows whose logits are computed at once: 33 MB of them for a vocabulary of 32,128.
pub(super) const LOGIT_ROWS_MAX: usize = 256;
/// Where the report's parts begin: the guard of the pass, the tokens of rows with logits, and the experts chosen.
const TOKENS_AT: usize = 16;
pub(super) const CHOSEN_AT: usize = TOKENS_AT + 4 * LOGIT_ROWS_MAX;

/// The memory that passes work in. Shapes are of the largest batch.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) rows_max: usize,
    /// (rows, d_model), float32: the residual stream.
    pub(super) h: DeviceMemory,
    /// Holds `x` and `order`, which nodes of this machine may be let read.
    pub(super) shared: Arc<Shareable>,
    pub(super) layout: RowsLayout,
    /// (rows, d_model): what a norm made of it.
    pub(super) x: DeviceMemory,
    /// (rows, 3 * inner)
    pub(super) qkv: DeviceMemory,
    /// (rows, inner)
    pub(super) attended: DeviceMemory,
    /// (rows, d_ff), of a dense block by row, of experts in grouped order.
    pub(super) hidden: DeviceMemory,
    /// (rows, experts), float32
    pub(super) router_logits: DeviceMemory,
    /// (rows), float32: the factor of each row's expert.
    pub(super) alpha: DeviceMemory,
    /// (rows): the token of each place in grouped order.
    pub(super) order: DeviceMemory,
    /// Tiles of groups with few rows, and of the others; then how many there are of each.
    pub(super) few_tiles: DeviceMemory,
    pub(super) many_tiles: DeviceMemory,
    pub(super) tile_counts: DeviceMemory,
    /// (LOGIT_ROWS_MAX, vocab_size), float32
    pub(super) logits: DeviceMemory,
    packet: DeviceMemory,
    pub(super) report: DeviceMemory,
}

impl Scratch {
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        precision: Precision,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        let take = |width: usize, size: usize| gpu.allocate("activations", rows_max * width * size);
        let (value, experts) = (precision.size(), config.num_experts);
        let tiles = |count: usize| gpu.allocate("activations", count * 16);
        let layout = RowsLayout::new(rows_max, config.d_model, precision);
        let shared = Arc::new(Shareable::take(gpu, "activations", layout.bytes())?);
        Ok(Self {
            rows_max,
            h: take(config.d_model, 4)?,
            x: DeviceMemory::part(&shared, 0, layout.x_bytes()),
            order: DeviceMemory::part(&shared, layout.order_at(), layout.order_bytes()),
            shared,
            layout,
            qkv: take(3 * config.inner_dim(), value)?,
            attended: take(config.inner_dim(), value)?,
            hidden: take(config.d_ff, value)?,
            router_logits: take(experts, 4)?,
            alpha: take(1, 4)?,
            few_tiles: tiles(experts + rows_max / 8 + 1)?,
            many_tiles: tiles(experts + rows_max / 64 + 1)?,
            tile_counts: gpu.allocate("activations", 8)?,
            logits: gpu.allocate("logits", LOGIT_ROWS_MAX * config.vocab_size * 4)?,
            packet: gpu.allocate("activations", Packet::bytes_max(rows_max))?,
            report: gpu.allocate("activations", CHOSEN_AT + config.moe_layer_count() * rows_max * 2)?,
        })
    }

    /// Bytes of all of it.
    pub(super) fn bytes(&self) -> u64 {
        let all = [
            &self.h,
            &self.qkv,
            &self.attended,
            &self.hidden,
            &self.router_logits,
            &self.alpha,
            &self.few_tiles,
            &self.many_tiles,
            &self.tile_counts,
            &self.logits,
            &self.packet,
            &self.report,
        ];
        all.iter().map(|memory| memory.bytes() as u64).sum::<u64>() + self.shared.bytes() as u64
    }

    /// Where the guard of the pass is (`Pass` of numbers.cu).
    pub(super) fn guard(&self) -> u64 {
        self.report.address()
    }

    /// Where the best tokens go.
    pub(super) fn tokens(&self) -> u64 {
        self.report.address() + TOKENS_AT as u64
    }

    /// Where the experts go that layer `index` of the pass chose.
    pub(super) fn chosen(&self, index: usize, rows: usize) -> u64 {
        self.report.address() + (CHOSEN_AT + index * rows * 2) as u64
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
        gpu.write(self.base, &bytes)
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
fn put<V: Copy>(to: &mut [u8], values: &[V]) {
    let bytes = plain_bytes(values);
    to[..bytes.len()].copy_from_slice(bytes);
}

/// What a pass left in the report.
#[derive(Debug)]
pub(super) struct Report {
    bytes: Vec<u8>,
}

impl Report {
    /// Of bytes that were read.
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// How many there are, up to what `layers` MoE layers of `rows` rows chose.
    pub(super) fn bytes(layers: usize, rows: usize) -> usize {
        CHOSEN_AT + layers * rows * 2
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

    /// The expert of each row in layer `index` of the pass.
    pub(super) fn chosen(&self, index: usize, rows: usize) -> Vec<u16> {
        let bytes = &self.bytes[CHOSEN_AT + index * rows * 2..][..rows * 2];
        bytes.as_chunks().0.iter().map(|&expert| u16::from_le_bytes(expert)).collect()
    }
}

/// A guard that was not set: every byte 0x7f, which a memset can write.
pub(super) const NOT_STOPPED: i32 = 0x7f7f_7f7f;
