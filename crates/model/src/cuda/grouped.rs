//! expert(x) by the experts of each row: two products over tiles, each a run of rows for one expert, groups with few rows and
//! those with many each in their own way. Started by a `pass` through the model, and by a `slab` that computes for others.

use bytemuck::cast_slice;
use sida_routing::LayerId;

use super::{
    arguments::{Kind, Product, Tile},
    device::Gpu,
    error::CudaError,
    kernels::{Kernels, ProductKernels},
    ways::{self, Cut, Way},
};
use crate::{
    ExpertShape, ExpertSlot, SlotRun,
    expert_slot::{LayerLayouts, Layout},
    spec::Activation,
};

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
    pub(super) slots: LayerSlots,
    /// `Tile`s of product.cu, of `few` and of the way of larger groups; then how many there are of each, as i32.
    pub(super) few: u64,
    pub(super) many: u64,
    pub(super) counts: u64,
    pub(super) others: Way,
    /// MoE layers before this one, and the guard of the pass or 0.
    pub(super) layers: usize,
    pub(super) guard: u64,
}

/// Where experts lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    /// Slot 0.
    at: u64,
    slot: ExpertSlot,
    /// Whether `wide` takes both matrices.
    can_be_wide: bool,
}

/// Those of a layer, as kernels are told.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerSlots {
    /// wi and wo of slot 0, and how they lie.
    matrices: [(u64, Layout); 2],
    /// From one slot to the next, in bytes.
    stride: u64,
    are_gated: bool,
}

impl Slots {
    /// Slots from `at` on.
    pub(super) fn new(at: u64, slot: &ExpertSlot) -> Self {
        let ExpertShape { d_model, d_ff, activation, .. } = *slot.shape();
        let inner = (activation.matrices() - 1) * d_ff;
        let can_be_wide = !slot.is_packed() && ways::is_wide(inner, d_model) && ways::is_wide(d_model, d_ff);
        Self { at, slot: slot.clone(), can_be_wide }
    }

    /// How matrices lie in them.
    pub(super) fn layouts(&self) -> impl Iterator<Item = Layout> {
        self.slot.layouts()
    }

    /// Those with the experts of a layer.
    pub(super) fn of(&self, layer: LayerId) -> LayerSlots {
        let LayerLayouts { inputs, output, output_at, .. } = self.slot.of_layer(layer);
        LayerSlots {
            matrices: [(self.at, inputs), (self.at + output_at as u64, output)],
            stride: self.slot.bytes() as u64,
            are_gated: self.slot.shape().activation == Activation::GatedSilu,
        }
    }
}

impl Kernels {
    /// How `rows` rows in so many groups become tiles.
    pub(super) fn cut(&self, slots: &Slots, rows: usize, groups: usize) -> Cut {
        match self.many {
            None => Cut { few_rows: usize::MAX, others: Way::Few, rest_rows: 0 },
            Some(_) => ways::of_experts(rows, groups, self.wide.is_some() && slots.can_be_wide),
        }
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
        // SAFETY: by the caller's promise.
        unsafe { self.products(self.kernels.of(self.others), many_max, self.many, self.counts + 4) }
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
        let LayerSlots { matrices: [(wi_at, wi_layout), (wo_at, wo_layout)], stride, are_gated } = self.slots;
        let (lead_in, lead_out) = (kernels.experts_in(wi_layout)?, kernels.experts_in(wo_layout)?);
        let is_gated = are_gated && lead_in.gather_gate.is_some();
        let wi = Product {
            x: self.x,
            w: wi_at,
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
            slot_stride: stride,
            kind: if is_gated { Kind::GatherGate } else { Kind::Gather } as i32,
            ..Product::default()
        };
        let (gather, w_rows) = match &lead_in.gather_gate {
            Some(gather_gate) if is_gated => (gather_gate, 2 * self.d_ff),
            _ => (&lead_in.gather, self.d_ff),
        };
        let (back, kind) = match self.results {
            Results::Added { .. } => (&lead_out.scatter, Kind::Scatter),
            Results::Each => (&lead_out.each, Kind::Each),
        };
        // SAFETY: both kernels take a `Product`; the rest by the caller's promise.
        unsafe { self.gpu.launch(gather, kernels.grid(w_rows, tiles), kernels.blocks.threads, &wi) }?;
        let wo = Product {
            x: self.hidden,
            w: wo_at,
            out: self.out,
            k: self.d_ff as i32,
            outputs: self.d_model as i32,
            kind: kind as i32,
            ..wi
        };
        // SAFETY: both kernels take a `Product`; the rest by the caller's promise.
        unsafe { self.gpu.launch(back, kernels.grid(self.d_model, tiles), kernels.blocks.threads, &wo) }
    }
}

/// Rows in slots as tiles of both ways, where the host knows who is where.
pub(super) struct Tiles {
    pub(super) few: Vec<Tile>,
    pub(super) many: Vec<Tile>,
    /// The way of `many`.
    pub(super) others: Way,
}

/// Bytes of the numbers of tiles, which come first.
const COUNTS_BYTES: usize = 16;

impl Tiles {
    /// Cuts runs of rows.
    pub(super) fn of(kernels: &Kernels, slots: &Slots, runs: &[SlotRun]) -> Self {
        let cut = kernels.cut(slots, runs.iter().map(|run| run.rows).sum(), runs.len());
        let mut tiles = Self { few: Vec::new(), many: Vec::new(), others: cut.others };
        for run in runs {
            let others = cut.others_of(run.rows);
            let push = |list: &mut Vec<Tile>, tile: usize, from: usize, to: usize| {
                for at in (from..to).step_by(tile) {
                    let (slot, rows) = (run.slot as i32, tile.min(to - at) as i32);
                    list.push(Tile { slot, first: (run.first + at) as i32, rows, unused: 0 });
                }
            };
            push(&mut tiles.many, cut.tile(), 0, others);
            push(&mut tiles.few, kernels.few.blocks.tile.1, others, run.rows);
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
