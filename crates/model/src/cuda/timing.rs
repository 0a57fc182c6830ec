//! What the device and its kernels reach by themselves: the ceilings that every figure of a benchmark is held against,
//! and the products at various numbers of rows, timed by events on the device. Called by `sida bench --gpu`.

use std::time::Instant;

use cudarc::driver::CudaEvent;
use sida_routing::LayerId;

use super::{
    arguments::Product,
    device::Gpu,
    error::{CudaError, failed},
    kernels::{Kernels, ProductKernels},
    model::DeviceModel,
    pass::{BatchShape, Pass},
    scratch::{NOT_STOPPED, Packet},
    weights::plain_bytes,
};
use crate::backbone::FeedForward;

/// What a copy within the device, and one to it, is timed with: several times its cache.
const COPY_BYTES: usize = 1 << 30;
const UPLOAD_BYTES: usize = 1 << 28;
const REPEATS: usize = 20;
/// How often all experts are uploaded to be timed.
const UPLOAD_ROUNDS: usize = 3;

/// The fastest that the device moves bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Of a copy within the device, bytes read plus bytes written a second.
    pub copy_bytes_per_s: f64,
    /// From page-locked memory of the host.
    pub upload_bytes_per_s: f64,
}

/// How long one launch, or one pair for experts, takes.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTiming {
    /// Which.
    pub what: String,
    /// Rows of the batch.
    pub rows: usize,
    /// Median.
    pub seconds: f64,
    /// Bytes of weights it must read.
    pub bytes: f64,
    /// Multiplications and additions it must do.
    pub operations: f64,
}

impl Gpu {
    /// Measures both. Takes 2 GiB of the device for a moment.
    pub fn ceilings(&self) -> Result<Ceilings, CudaError> {
        self.enter()?;
        let (from, to) = (self.allocate("a measurement", COPY_BYTES)?, self.allocate("a measurement", COPY_BYTES)?);
        let copy = median(self, || self.copy(from.address(), to.address(), COPY_BYTES))?;
        let mut host = self.pinned(UPLOAD_BYTES)?;
        let bytes = host.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 31) as u8);
        // SAFETY: nobody else has either end, and the median waits for every copy.
        let upload = median(self, || unsafe { self.upload(&self.compute, bytes, to.address()) })?;
        let copy_bytes_per_s = 2.0 * COPY_BYTES as f64 / copy;
        Ok(Ceilings { copy_bytes_per_s, upload_bytes_per_s: UPLOAD_BYTES as f64 / upload })
    }
}

/// The median time on the compute stream of what `work` starts.
fn median(gpu: &Gpu, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let (begun, ended): (CudaEvent, CudaEvent) = (gpu.timer()?, gpu.timer()?);
    let mut seconds = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS + 3 {
        begun.record(&gpu.compute).map_err(failed("cuEventRecord"))?;
        work()?;
        ended.record(&gpu.compute).map_err(failed("cuEventRecord"))?;
        seconds.push(f64::from(begun.elapsed_ms(&ended).map_err(failed("cuEventElapsedTime"))?) / 1e3);
    }
    let mut timed = seconds.split_off(3);
    timed.sort_by(f64::total_cmp);
    Ok(timed[timed.len() / 2])
}

impl DeviceModel {
    /// Seconds that an expert's upload takes among many: the median over [`UPLOAD_ROUNDS`] of all that are resident.
    pub fn upload_seconds(&mut self) -> Result<f64, CudaError> {
        self.dense.gpu.enter()?;
        let mut rounds = [0.0; UPLOAD_ROUNDS];
        for round in &mut rounds {
            let begun = Instant::now();
            let uploads = self.experts.upload_again(&self.dense.gpu, &mut self.host)?;
            *round = begun.elapsed().as_secs_f64() / uploads as f64;
        }
        rounds.sort_by(f64::total_cmp);
        Ok(rounds[UPLOAD_ROUNDS / 2])
    }

    /// Times the experts of an MoE layer and the largest dense products, at each of these numbers of rows. Rows go to
    /// experts in turn. Every expert must be resident.
    pub fn kernel_timings(&mut self, rows: &[usize]) -> Result<Vec<KernelTiming>, CudaError> {
        self.dense.gpu.enter()?;
        let mut timings = Vec::new();
        self.put_noise()?;
        for &rows in rows.iter().filter(|&&rows| rows <= self.dense.scratch.rows_max) {
            timings.push(self.time_experts(rows)?);
            timings.extend(self.time_dense(rows)?);
        }
        Ok(timings)
    }

    /// x and h of random values: a product of zeros is faster than any other.
    fn put_noise(&mut self) -> Result<(), CudaError> {
        let (rows, d_model) = (self.dense.scratch.rows_max, self.dense.config.d_model);
        let mut state = 1_u64;
        let noise: Vec<f32> = (0..rows * d_model)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        self.put_states(&noise)?;
        self.dense.gpu.write(self.dense.scratch.h.address(), plain_bytes(&noise))
    }

    fn time_experts(&self, rows: usize) -> Result<KernelTiming, CudaError> {
        let num_experts = self.dense.config.num_experts;
        let chosen: Vec<u16> = (0..rows).map(|row| (row % num_experts) as u16).collect();
        self.dense.gpu.write(self.dense.scratch.guard(), &NOT_STOPPED.to_le_bytes())?;
        self.dense.gpu.write(self.dense.scratch.chosen(0, rows), plain_bytes(&chosen))?;
        self.dense.gpu.write(self.dense.scratch.alpha.address(), plain_bytes(&vec![1e-3_f32; rows]))?;
        let layers = self.dense.config.moe_layer_count() as u16;
        let shape = BatchShape { rows, sequences: 1, longest: rows, wanted: 0 };
        let pass = Pass::new(self.machine(), shape, Packet::plan(&self.dense.scratch, 0, 0, 0), 0);
        let experts = self.experts.places();
        let mut layer = 0;
        let mut route = pass.route_of(experts.table_of(LayerId(0)));
        // Another layer each time, so that the cache does not hold the weights.
        let seconds = median(&self.dense.gpu, || {
            layer = (layer + 1) % layers;
            route.slots = experts.table_of(LayerId(layer));
            self.dense.gpu.launch(&self.dense.kernels.group_rows, (1, 1, 1), 1024, &route)?;
            pass.start_experts(&experts)
        })?;
        let grouping =
            median(&self.dense.gpu, || self.dense.gpu.launch(&self.dense.kernels.group_rows, (1, 1, 1), 1024, &route))?;
        let matrices = 2.0 * (self.dense.config.d_model * self.dense.config.d_ff) as f64;
        Ok(KernelTiming {
            what: "experts".to_owned(),
            rows,
            seconds: seconds - grouping,
            bytes: rows.min(num_experts) as f64 * matrices * self.dense.precision.size() as f64,
            operations: 2.0 * matrices * rows as f64,
        })
    }

    fn time_dense(&self, rows: usize) -> Result<Vec<KernelTiming>, CudaError> {
        let dense = self.dense.backbone.encoder.blocks.iter().filter_map(|block| match &block.feed_forward {
            FeedForward::Dense { wi, .. } => Some(wi),
            FeedForward::Moe { .. } => None,
        });
        let matrices: Vec<_> = dense.collect();
        let Kernels { few, many, .. } = &self.dense.kernels;
        let ways = [("few", Some(few)), ("many", many.as_ref())];
        let mut timings = Vec::new();
        for (what, kernels) in ways.into_iter().filter_map(|(what, kernels)| Some((what, kernels?))) {
            let Some(first) = matrices.first() else { break };
            let mut turn = 0;
            let seconds = median(&self.dense.gpu, || {
                turn += 1;
                self.multiply(kernels, rows, matrices[turn % matrices.len()].address(), (first.inputs, first.outputs))
            })?;
            let values = (first.inputs * first.outputs) as f64;
            timings.push(KernelTiming {
                what: format!("dense {}x{} {what}", first.inputs, first.outputs),
                rows,
                seconds,
                bytes: values * self.dense.precision.size() as f64,
                operations: 2.0 * values * rows as f64,
            });
        }
        Ok(timings)
    }

    fn multiply(
        &self,
        kernels: &ProductKernels,
        rows: usize,
        w: u64,
        (inputs, outputs): (usize, usize),
    ) -> Result<(), CudaError> {
        let arguments = Product {
            x: self.dense.scratch.x.address(),
            w,
            out: self.dense.scratch.hidden.address(),
            rows: rows as i32,
            k: inputs as i32,
            outputs: outputs as i32,
            ..Product::default()
        };
        let grid = (outputs / kernels.tile.0, rows.div_ceil(kernels.tile.1), 1);
        self.dense.gpu.launch(&kernels.relu, grid, kernels.threads, &arguments)
    }
}
