//! A pass on a GPU: what it works with, and the kernels that it starts, for the `operations` of a forward among others. What
//! is computed by whom is in [`super::kernels`], where things lie in [`super::scratch`].
//!
//! A pass with experts may end early: where an expert is missing that a router chose, the device notes the MoE layer in the
//! pass's guard, and everything that was started after it does nothing (see `dense::through`). So the host never waits inside
//! a pass, and a pass that has all it needs never notices.

mod operations;

use sida_routing::LayerId;

use super::{
    arguments::{Add, Combine, Heads, Kind, Norm, Product, Route, Sequence},
    buffer::DeviceBuffer,
    device::Gpu,
    error::CudaError,
    grouped::{Grouped, Results, Slots},
    kernels::{Kernel, Kernels},
    scratch::{Packet, Scratch},
    ways::{self, Cut},
    weights::{Device, Matrix, Vector},
};
use crate::{
    ModelConfig, Spans,
    backbone::Matrices,
    rotary,
    spec::{Activation, Rotary},
};

/// What every pass of a model works with.
#[derive(Clone, Copy)]
pub(super) struct Machine<'m> {
    pub(super) gpu: &'m Gpu,
    pub(super) kernels: &'m Kernels,
    pub(super) scratch: &'m Scratch,
    pub(super) config: &'m ModelConfig,
    pub(super) turns: &'m [Turns],
    /// `None`: they are elsewhere, and rows leave for them at every MoE layer.
    pub(super) experts: Option<ExpertPlaces<'m>>,
}

/// Rotary positions, as kernels are told of them.
#[derive(Debug)]
pub(super) struct Turns {
    rotary: Rotary,
    /// (d_kv / 2)
    frequencies: DeviceBuffer<f32>,
}

impl Turns {
    /// Of all blocks of a model: those of most are the same.
    pub(super) fn of(gpu: &Gpu, config: &ModelConfig) -> Result<Vec<Self>, CudaError> {
        let mut all: Vec<Self> = Vec::new();
        for rotary in config.spec().decoder.blocks.iter().filter_map(|block| block.attention.rotary) {
            if !all.iter().any(|turns| turns.rotary == rotary) {
                let frequencies = gpu.allocate_with("positions", &rotary::frequencies(&rotary, config.d_kv))?;
                all.push(Self { rotary, frequencies });
            }
        }
        Ok(all)
    }
}

/// Experts on the device, as a pass is told of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertPlaces<'m> {
    /// (MoE layers, experts) of i32: the slot of each expert, -1 where it is not on the device.
    pub(super) table: u64,
    pub(super) layer_bytes: usize,
    pub(super) slots: &'m Slots,
    /// Whether an expert may be missing.
    pub(super) may_miss: bool,
}

impl ExpertPlaces<'_> {
    /// Where the slots of a layer's experts are listed, on the device.
    fn table_of(&self, layer: LayerId) -> u64 {
        self.table + (usize::from(layer.0) * self.layer_bytes) as u64
    }
}

/// What a batch looks like: all that the shape of a pass depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct BatchShape {
    pub(super) rows: usize,
    pub(super) sequences: usize,
    /// Rows of the longest sequence.
    pub(super) longest: usize,
    /// Rows whose logits are wanted.
    pub(super) wanted: usize,
    /// The runs of keys that the longest cache has, or a few more: steps to caches of about one length are of one shape. Of
    /// prompts, whether there are several.
    pub(super) runs: usize,
}

impl Machine<'_> {
    /// Starts a kernel with the arguments of an operation below.
    fn launch<A: Copy>(
        &self,
        kernel: &Kernel,
        grid: (usize, usize, usize),
        threads: u32,
        arguments: &A,
    ) -> Result<(), CudaError> {
        // SAFETY: each operation passes the structure of the kernel that it names. Addresses are those of weights, of scratch
        // and of what sequences hold, all of which is given back in the order of the stream; scratch is as large as the
        // largest batch needs, which batches are held to before they begin.
        unsafe { self.gpu.launch(kernel, grid, threads, arguments) }
    }
}

impl BatchShape {
    /// Of a batch of these sequences.
    pub(super) fn of(spans: &Spans, sequences: &[Sequence], wanted: usize) -> Self {
        let longest = spans.ranges().map(|range| range.len()).max().unwrap_or(0);
        let keys = sequences.iter().map(|sequence| (sequence.position + sequence.rows) as usize).max().unwrap_or(0);
        let runs = keys.div_ceil(ways::RUN).next_power_of_two();
        let runs = if longest == 1 { runs } else { runs.min(2) };
        Self { rows: spans.rows(), sequences: spans.len(), longest, wanted, runs }
    }
}

/// A pass that is being started.
pub(super) struct Pass<'m> {
    machine: Machine<'m>,
    shape: BatchShape,
    packet: Packet,
    /// MoE layers whose experts are before what is started next.
    layers: usize,
    /// The guard, or 0 where every expert is resident.
    guard: u64,
    /// MoE layers behind which it pauses.
    pause: Option<usize>,
    /// What is done to the heads that were projected last, all at once by the operation that attends.
    heads: Heads,
    /// What the experts of the last MoE layer made, if it is still to be added to h: by the norm of the next block, or behind
    /// the last one by [`Pass::settle`]. Their choices, as [`Pass::combine`] takes them.
    uncombined: Option<u64>,
}

/// What becomes of the product of all rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Become {
    /// y
    Store,
    /// relu(y)
    Relu,
    /// silu(gate) * y
    Gate,
    /// h + y
    Add,
    /// y in float32
    Logits,
}

impl<'m> Pass<'m> {
    /// A pass that begins after `layers` MoE layers of its stack.
    pub(super) fn new(machine: Machine<'m>, shape: BatchShape, packet: Packet, layers: usize) -> Self {
        let may_miss = machine.experts.is_some_and(|experts| experts.may_miss);
        let guard = if may_miss { machine.scratch.guard() } else { 0 };
        Self { machine, shape, packet, layers, guard, pause: None, heads: Heads::default(), uncombined: None }
    }

    /// As it is, up to where `layers` MoE layers are behind it.
    pub(super) fn pausing_after(self, layers: Option<usize>) -> Self {
        Self { pause: layers, ..self }
    }

    /// Keys and values of the encoder's states, which are in `scratch.x`, for one block: (rows, 2 * inner) at `to`.
    pub(super) fn cross_keys(&self, keys_values: &Matrix, to: u64) -> Result<(), CudaError> {
        self.product(self.machine.scratch.x.address(), keys_values, to, Become::Store)
    }

    /// h += out (rows, d_model), what experts elsewhere made of x.
    pub(super) fn add(&self, out: u64) -> Result<(), CudaError> {
        let Machine { kernels, scratch, config, .. } = self.machine;
        let count = self.shape.rows * config.d_model;
        let arguments = Add { h: scratch.h.address(), y: out, count: count as i32 };
        self.machine.launch(&kernels.add_rows, (count.div_ceil(1024), 1, 1), 256, &arguments)
    }

    /// x = scale * norm(h), of all rows or of those listed on the device.
    fn norm_rows(&self, weight: &Vector, rows: Option<u64>, scale: f32) -> Result<(), CudaError> {
        let Machine { kernels, scratch, config, .. } = self.machine;
        let arguments = Norm {
            h: scratch.h.address(),
            weight: weight.address(),
            x: scratch.x.address(),
            rows: rows.unwrap_or(0),
            epsilon: config.layer_norm_epsilon as f32,
            scale,
            d: config.d_model as i32,
            layers: self.layers as i32,
            pass: self.guard,
        };
        let count = if rows.is_some() { self.shape.wanted } else { self.shape.rows };
        let threads = (config.d_model / 4).min(1024) as u32;
        self.machine.launch(&kernels.norm, (count, 1, 1), threads, &arguments)
    }

    fn router_logits(&self, router: &Matrix) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, .. } = self.machine;
        let rows = self.shape.rows;
        let logits = Product {
            x: scratch.x.address(),
            w: router.address(),
            out: scratch.router_logits.address(),
            rows: rows as i32,
            k: router.inputs as i32,
            outputs: router.outputs as i32,
            layers: self.layers as i32,
            pass: self.guard,
            ..Product::default()
        };
        match ways::are_many_to_route(rows, router.outputs, gpu.description().multiprocessors) {
            true => {
                let grid = (router.outputs / 8, rows.div_ceil(32), 1);
                self.machine.launch(&kernels.router_logits_many, grid, 512, &logits)
            }
            false => {
                let grid = (router.outputs / 4, rows.div_ceil(8), 1);
                self.machine.launch(&kernels.router_logits, grid, 128, &logits)
            }
        }
    }

    /// What choosing and grouping the rows of the next MoE layer takes. `slots`: the layer's table, 0 where its experts
    /// are elsewhere.
    pub(super) fn route_of(&self, slots: u64) -> Route {
        let Machine { kernels, scratch, config, .. } = self.machine;
        let rows = self.shape.rows;
        let cut = self.cut();
        Route {
            logits: scratch.router_logits.address(),
            chosen: scratch.chosen(self.layers, rows * config.top_k).address(),
            alpha: scratch.alpha.address(),
            slots,
            pass: self.guard,
            few: scratch.few_tiles.address(),
            many: scratch.many_tiles.address(),
            counts: scratch.tile_counts.address(),
            order: scratch.order.address(),
            to: self.to(),
            rows: rows as i32,
            top_k: config.top_k as i32,
            is_normalised: i32::from(config.is_normalised()),
            experts: config.num_experts as i32,
            layer: self.layers as i32,
            few_rows: i32::try_from(cut.few_rows).unwrap_or(i32::MAX),
            few_tile: kernels.few.blocks.tile.1 as i32,
            many_tile: cut.tile() as i32,
            rest_rows: cut.rest_rows as i32,
        }
    }

    /// Which choice the row at each place is: where rows have one each, the row.
    fn to(&self) -> u64 {
        let Machine { scratch, config, .. } = self.machine;
        if config.top_k == 1 { scratch.order.address() } else { scratch.to.address() }
    }

    /// How the rows of an MoE layer become tiles.
    fn cut(&self) -> Cut {
        let Machine { kernels, config, experts, .. } = self.machine;
        let rows = self.shape.rows * config.top_k;
        match experts {
            Some(experts) => kernels.cut(experts.slots, rows, rows.min(config.num_experts)),
            // Nobody multiplies them here.
            None => ways::of_experts(rows, 1, false),
        }
    }

    /// Rows that are one tile of `few` if one expert has all of them.
    fn one_tile_rows_max(&self) -> usize {
        self.cut().few_rows.min(self.machine.kernels.few.blocks.tile.1)
    }

    /// h += the sum of alpha * expert(x) over each row's experts of a layer, as they were grouped.
    fn start_experts(&mut self, layer: LayerId, experts: &ExpertPlaces<'_>) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, config, .. } = self.machine;
        let rows = self.shape.rows * config.top_k;
        let groups = rows.min(config.num_experts);
        // How many tiles there are only the device knows; so many at most.
        let few = groups + rows / kernels.few.blocks.tile.1;
        let cut = self.cut();
        let many = match rows > cut.few_rows {
            true => rows / cut.tile() + config.num_experts.min(rows / (cut.few_rows + 1)),
            false => 0,
        };
        let (out, results) = match config.top_k {
            1 => (scratch.h.address(), Results::Added { alpha: scratch.alpha.address() }),
            _ => (scratch.each.address(), Results::Each),
        };
        let grouped = Grouped {
            gpu,
            kernels,
            d_model: config.d_model,
            d_ff: config.d_ff,
            x: scratch.x.address(),
            hidden: scratch.hidden.address(),
            out,
            results,
            order: scratch.order.address(),
            to: self.to(),
            slots: experts.slots.of(layer),
            few: scratch.few_tiles.address(),
            many: scratch.many_tiles.address(),
            counts: scratch.tile_counts.address(),
            others: cut.others,
            layers: self.layers,
            guard: self.guard,
        };
        // SAFETY: the memory is as in `launch`. The router's kernel has made tiles only of rows of this pass for experts that
        // its table has in slots, and layers of that table are held until the pass is over.
        unsafe { grouped.start(few, many) }?;
        match results {
            Results::Added { .. } => Ok(()),
            // The layer that chose is the one before what comes next.
            Results::Each => {
                self.uncombined = Some(scratch.chosen(self.layers - 1, rows).address());
                Ok(())
            }
        }
    }

    /// Adds what experts made, where no norm did. To be called when no block follows.
    pub(super) fn settle(&mut self) -> Result<(), CudaError> {
        match self.uncombined.take() {
            Some(chosen) => self.combine(chosen, None),
            None => Ok(()),
        }
    }

    /// h += the sum of alpha * y over each row's choices; then x = norm(h), if there is one. `chosen`: their experts, by whose
    /// order they are added; 0: in their own order.
    pub(super) fn combine(&self, chosen: u64, norm: Option<&Vector>) -> Result<(), CudaError> {
        let Machine { kernels, scratch, config, gpu, .. } = self.machine;
        let arguments = Combine {
            h: scratch.h.address(),
            each: scratch.each.address(),
            alpha: scratch.alpha.address(),
            chosen,
            top_k: config.top_k as i32,
            d: config.d_model as i32,
            layers: self.layers as i32,
            pass: self.guard,
            weight: norm.map_or(0, Vector::address),
            x: scratch.x.address(),
            epsilon: config.layer_norm_epsilon as f32,
        };
        let threads = (config.d_model / 4).min(1024) as u32;
        let kernel = match self.shape.rows <= gpu.description().multiprocessors {
            true => &kernels.combine_few_rows,
            false => &kernels.combine_rows,
        };
        self.machine.launch(kernel, (self.shape.rows, 1, 1), threads, &arguments)
    }

    /// out = silu(x Wg^T) * (x Wu^T), or relu(x Wi^T), (rows, d_ff), between the matrices of a feed-forward.
    fn start_hidden(&self, Matrices { activation, wi, .. }: &Matrices<Device>) -> Result<(), CudaError> {
        let scratch = self.machine.scratch;
        let become_ = match activation {
            Activation::Relu => Become::Relu,
            Activation::GatedSilu => Become::Gate,
        };
        self.product(scratch.x.address(), wi, scratch.hidden.address(), become_)
    }

    /// y = x W^T of all rows of the batch.
    fn product(&self, x: u64, matrix: &Matrix, out: u64, become_: Become) -> Result<(), CudaError> {
        self.product_of(self.shape.rows, x, matrix, out, become_)
    }

    fn product_of(&self, rows: usize, x: u64, w: &Matrix, out: u64, become_: Become) -> Result<(), CudaError> {
        let Machine { gpu, kernels, .. } = self.machine;
        // Of a gated one W has two rows for each output.
        let outputs = if become_ == Become::Gate { w.outputs / 2 } else { w.outputs };
        let can_be_wide = kernels.wide.is_some() && ways::is_wide(w.outputs, w.inputs);
        let kernels = match kernels.many {
            None => &kernels.few,
            Some(_) => kernels.of(ways::of_dense(rows, w.outputs, gpu.description().multiprocessors, can_be_wide)),
        };
        let kinds = kernels.kinds_in(w.layout)?;
        let (function, kind) = match become_ {
            Become::Store => (&kinds.store, Kind::Store),
            Become::Relu => (&kinds.relu, Kind::Relu),
            Become::Gate => (&kinds.gate, Kind::Gate),
            Become::Add => (&kinds.add, Kind::Add),
            Become::Logits => (&kinds.logits, Kind::Logits),
        };
        let arguments = Product {
            x,
            w: w.address(),
            out,
            rows: rows as i32,
            k: w.inputs as i32,
            outputs: outputs as i32,
            layers: self.layers as i32,
            pass: self.guard,
            kind: kind as i32,
            ..Product::default()
        };
        let grid = kernels.grid(w.outputs, rows.div_ceil(kernels.blocks.tile.1));
        self.machine.launch(function, grid, kernels.blocks.threads, &arguments)
    }
}
