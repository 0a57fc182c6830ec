//! expert(x) by the experts of each row: two products over tiles, each a run of rows for one expert, groups with few rows and
//! those with many each in their own way. Started by a `pass` through the model, and by a `slab` that computes for others.

use bytemuck::cast_slice;

use super::{
    arguments::{Product, Tile},
    device::Gpu,
    error::CudaError,
    kernels::{Kernels, ProductKernels},
};
use crate::{ExpertSlot, SlotRun, expert_slot::Layout, spec::Activation};

/// Up to so many rows at once all groups are tiles of `few`: two kernels less, and their blocks are shorter. Measured on an H200, a
/// layer's experts, four tenths of the rows being of one: 93 instead of 107 us at 224 rows, no difference at 640, 222 instead of
/// 206 at 900.
const ALL_FEW_ROWS_MAX: usize = 640;
/// With more, groups of at most so many are one tile of `few`, which reads its expert once.
const FEW_GROUP_ROWS_MAX: usize = 32;

/// Up to how many rows a group is tiles of `few`, where there is `many`, among `rows` in all.
pub(super) fn few_group_rows_max(rows: usize) -> usize {
    if rows <= ALL_FEW_ROWS_MAX { ALL_FEW_ROWS_MAX } else { FEW_GROUP_ROWS_MAX }
}

/// What becomes of an expert's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Results {
    /// out\[token\] += alpha\[token\] * y, where a token has one choice.
    Added {
        /// The factor of each token.
        alpha: u64,
    },
    /// out\[choice\] = y
    Each,
}

/// Rows, their experts, and where results go. Addresses are the device's.
#[derive(Clone, Copy)]
pub(super) struct Grouped<'m> {
    pub(super) gpu: &'m Gpu,
    pub(super) kernels: &'m Kernels,
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    /// (rows, d_model) by token.
    pub(super) x: u64,
    /// (places, d_ff)
    pub(super) hidden: u64,
    /// (rows, d_model) by token or by choice, float32.
    pub(super) out: u64,
    pub(super) results: Results,
    /// The token of each place.
    pub(super) order: u64,
    /// Where in `out` the result of each place goes.
    pub(super) to: u64,
    pub(super) slots: Slots,
    /// `Tile`s of product.cu of both ways; then how many there are of each, as i32.
    pub(super) few: u64,
    pub(super) many: u64,
    pub(super) counts: u64,
    /// MoE layers before this one, and the guard of the pass or 0.
    pub(super) layers: usize,
    pub(super) guard: u64,
}

/// Where experts lie, as kernels are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    /// wi and wo of slot 0.
    matrices: [u64; 2],
    /// From one slot to the next, in values, of those that are not plain in bytes.
    stride: u64,
    layout: Layout,
    are_gated: bool,
}

impl Slots {
    /// How matrices lie in them.
    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Slots from `at` on.
    pub(super) fn new(at: u64, slot: &ExpertSlot) -> Self {
        let matrices = [at, at + slot.output_at() as u64];
        let are_gated = slot.shape().activation == Activation::GatedSilu;
        Self { matrices, stride: slot.stride(), layout: slot.layout(), are_gated }
    }
}

impl Grouped<'_> {
    /// Starts both products, with room for so many tiles of each way.
    ///
    /// # Safety
    /// The addresses are of memory that is as large as they say and lives until the stream is done with it. The tiles are of
    /// rows below `rows`, and of slots whose experts are there and stay until then.
    pub(super) unsafe fn start(&self, few_max: usize, many_max: usize) -> Result<(), CudaError> {
        // SAFETY: by the caller's promise.
        unsafe { self.products(&self.kernels.few, few_max, self.few, self.counts) }?;
        match &self.kernels.many {
            // SAFETY: by the caller's promise.
            Some(many) => unsafe { self.products(many, many_max, self.many, self.counts + 4) },
            None => Ok(()),
        }
    }

    /// # Safety
    /// As of [`Grouped::start`].
    unsafe fn products(
        &self,
        kernels: &ProductKernels,
        tiles: usize,
        list: u64,
        tile_count: u64,
    ) -> Result<(), CudaError> {
        if tiles == 0 {
            return Ok(());
        }
        let experts = kernels.experts_in(self.slots.layout)?;
        let wi = Product {
            x: self.x,
            w: self.slots.matrices[0],
            out: self.hidden,
            k: self.d_model as i32,
            outputs: self.d_ff as i32,
            layers: self.layers as i32,
            pass: self.guard,
            tiles: list,
            tile_count,
            order: self.order,
            to: self.to,
            alpha: match self.results {
                Results::Added { alpha } => alpha,
                Results::Each => 0,
            },
            slot_stride: self.slots.stride,
            ..Product::default()
        };
        let (gather, outputs) = match &experts.gather_gate {
            Some(gather_gate) if self.slots.are_gated => (gather_gate, kernels.gated_outputs()),
            _ => (&experts.gather, kernels.tile.0),
        };
        let back = match self.results {
            Results::Added { .. } => &experts.scatter,
            Results::Each => &experts.each,
        };
        // SAFETY: both kernels take a `Product`; the rest by the caller's promise.
        unsafe { self.gpu.launch(gather, (self.d_ff / outputs, tiles, 1), kernels.threads, &wi) }?;
        let wo = Product {
            x: self.hidden,
            w: self.slots.matrices[1],
            out: self.out,
            k: self.d_ff as i32,
            outputs: self.d_model as i32,
            ..wi
        };
        // SAFETY: both kernels take a `Product`; the rest by the caller's promise.
        unsafe { self.gpu.launch(back, (self.d_model / kernels.tile.0, tiles, 1), kernels.threads, &wo) }
    }
}

/// Rows in slots as tiles of both ways, where the host knows who is where.
pub(super) struct Tiles {
    pub(super) few: Vec<Tile>,
    pub(super) many: Vec<Tile>,
}

/// Bytes of the numbers of tiles, which come first.
const COUNTS_BYTES: usize = 16;

impl Tiles {
    /// Cuts runs of rows.
    pub(super) fn of(kernels: &Kernels, runs: &[SlotRun]) -> Self {
        let few_rows_max = few_group_rows_max(runs.iter().map(|run| run.rows).sum());
        let mut tiles = Self { few: Vec::new(), many: Vec::new() };
        for run in runs {
            let (list, tile) = match &kernels.many {
                Some(many) if run.rows > few_rows_max => (&mut tiles.many, many.tile.1),
                _ => (&mut tiles.few, kernels.few.tile.1),
            };
            for at in (0..run.rows).step_by(tile) {
                let (slot, rows) = (run.slot as i32, tile.min(run.rows - at) as i32);
                list.push(Tile { slot, first: (run.first + at) as i32, rows, unused: 0 });
            }
        }
        tiles
    }

    /// What the device is sent: how many there are, then the tiles.
    pub(super) fn packet(&self) -> Vec<u8> {
        let counts = [self.few.len() as i32, self.many.len() as i32, 0, 0];
        [cast_slice(&counts), cast_slice(&self.few), cast_slice::<_, u8>(&self.many)].concat()
    }

    /// Where the numbers and both lists are in a packet at `base`.
    pub(super) fn addresses(&self, base: u64) -> (u64, u64, u64) {
        let few = base + COUNTS_BYTES as u64;
        (base, few, few + size_of_val(&self.few[..]) as u64)
    }

    /// Of a packet for `rows` rows: at worst each is a run of its own.
    pub(super) fn bytes_max(rows: usize) -> usize {
        COUNTS_BYTES + (rows + 1) * size_of::<Tile>()
    }
}
