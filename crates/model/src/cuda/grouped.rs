//! out += alpha * relu(x Wi^T) Wo^T by the expert of each row: two products over tiles, each a run of rows for one expert,
//! groups with few rows and those with many each in their own way. Started by a `pass` through the model, and by a
//! `slab` that computes for others.

use super::{
    arguments::Product,
    device::Gpu,
    error::CudaError,
    kernels::{Kernels, ProductKernels},
};

/// Groups of at most so many rows are one tile that reads its expert once.
pub(super) const FEW_GROUP_ROWS_MAX: usize = 32;

/// Rows, their experts, and where results go. Addresses are the device's.
#[derive(Clone, Copy)]
pub(super) struct Grouped<'m> {
    pub(super) gpu: &'m Gpu,
    pub(super) kernels: &'m Kernels,
    pub(super) rows: usize,
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    /// (rows, d_model) by token.
    pub(super) x: u64,
    /// (rows, d_ff) by place.
    pub(super) hidden: u64,
    /// (rows, d_model) by token, float32.
    pub(super) out: u64,
    /// The token of each place.
    pub(super) order: u64,
    /// The factor of each token.
    pub(super) alpha: u64,
    /// Where wi and wo of slot 0 are, and from one slot to the next, in values.
    pub(super) matrices: [u64; 2],
    pub(super) slot_values: usize,
    /// `Tile`s of product.cu of both ways; then how many there are of each, as i32.
    pub(super) few: u64,
    pub(super) many: u64,
    pub(super) counts: u64,
    /// MoE layers before this one, and the guard of the pass or 0.
    pub(super) layers: usize,
    pub(super) guard: u64,
}

impl Grouped<'_> {
    /// Starts both products, with room for so many tiles of each way.
    pub(super) fn start(&self, few_max: usize, many_max: usize) -> Result<(), CudaError> {
        self.products(&self.kernels.few, few_max, self.few, self.counts)?;
        match &self.kernels.many {
            Some(many) => self.products(many, many_max, self.many, self.counts + 4),
            None => Ok(()),
        }
    }

    fn products(&self, kernels: &ProductKernels, tiles: usize, list: u64, tile_count: u64) -> Result<(), CudaError> {
        if tiles == 0 {
            return Ok(());
        }
        let wi = Product {
            x: self.x,
            w: self.matrices[0],
            out: self.hidden,
            rows: self.rows as i32,
            k: self.d_model as i32,
            outputs: self.d_ff as i32,
            layers: self.layers as i32,
            pass: self.guard,
            tiles: list,
            tile_count,
            order: self.order,
            alpha: self.alpha,
            slot_stride: self.slot_values as u64,
        };
        self.gpu.launch(&kernels.gather, (self.d_ff / kernels.tile.0, tiles, 1), kernels.threads, &wi)?;
        let wo = Product {
            x: self.hidden,
            w: self.matrices[1],
            out: self.out,
            k: self.d_ff as i32,
            outputs: self.d_model as i32,
            ..wi
        };
        self.gpu.launch(&kernels.scatter, (self.d_model / kernels.tile.0, tiles, 1), kernels.threads, &wo)
    }
}
