//! One pass through a stack: every operation of the forward, as a kernel that is started. Reads like the maths; what
//! is computed by whom is in [`super::kernels`], where things lie in [`super::scratch`].
//!
//! A pass may end early: where an expert is missing that a router chose, the device notes the MoE layer in the pass's
//! guard, and everything that was started after it does nothing. The caller loads the expert and starts a pass that
//! resumes at that layer. So the host never waits inside a pass, and a pass that has all it needs never notices.

use cudarc::driver::CudaFunction;

use super::{
    arguments::{Add, Attention, Best, Embed, Norm, Product, Route},
    device::Gpu,
    error::CudaError,
    experts::ExpertPlaces,
    grouped::{Grouped, few_group_rows_max},
    kernels::Kernels,
    scratch::{Packet, Scratch},
    weights::{Block, CrossAttention, FeedForward, Matrix, NormWeight, SelfAttention, StackWeights},
};
use crate::{ModelConfig, Spans};

/// Up to so many rows a dense product reads its matrix once per 32 rows; with more it is multiplied in larger tiles.
/// Measured: at 128 rows 14 against 18 us, at 256 rows 21 against 18.
const FEW_ROWS_MAX: usize = 192;
/// Up to so many rows one block chooses and groups; with more, choosing is spread over the device.
const FUSED_ROUTE_ROWS_MAX: usize = 256;

/// What every pass of a model works with.
#[derive(Clone, Copy)]
pub(super) struct Machine<'m> {
    pub(super) gpu: &'m Gpu,
    pub(super) kernels: &'m Kernels,
    pub(super) scratch: &'m Scratch,
    pub(super) config: &'m ModelConfig,
    /// `None`: they are elsewhere, and no pass goes through an MoE layer.
    pub(super) experts: Option<ExpertPlaces>,
}

/// What a batch looks like: all that the shape of a pass depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BatchShape {
    pub(super) rows: usize,
    pub(super) sequences: usize,
    /// Rows of the longest sequence.
    pub(super) longest: usize,
    /// Rows whose logits are wanted.
    pub(super) wanted: usize,
}

impl BatchShape {
    /// Of a batch of these sequences.
    pub(super) fn of(spans: &Spans, wanted: usize) -> Self {
        let longest = spans.ranges().map(|range| range.len()).max().unwrap_or(0);
        Self { rows: spans.rows(), sequences: spans.len(), longest, wanted }
    }
}

/// See the file's head.
pub(super) struct Pass<'m> {
    machine: Machine<'m>,
    shape: BatchShape,
    packet: Packet,
    /// Blocks and MoE layers of the stack that were passed.
    blocks: usize,
    layers: usize,
    /// The MoE layer to begin at: what is before it was done.
    resume: Option<usize>,
    /// The guard, or 0 where every expert is resident.
    guard: u64,
}

/// What becomes of a product's results.
enum Become {
    /// y
    Store,
    /// relu(y)
    Relu,
    /// h + y
    Add,
    /// y in float32
    Logits,
}

impl<'m> Pass<'m> {
    pub(super) fn new(machine: Machine<'m>, shape: BatchShape, packet: Packet, resume: Option<usize>) -> Self {
        let may_miss = machine.experts.is_some_and(|experts| experts.may_miss);
        let guard = if may_miss { machine.scratch.guard() } else { 0 };
        Self { machine, shape, packet, blocks: 0, layers: 0, resume, guard }
    }

    /// ids (rows) -> the encoder's states (rows, d_model), in `scratch.x`.
    pub(super) fn encode(&mut self, weights: &StackWeights) -> Result<(), CudaError> {
        self.encode_through(usize::MAX, weights)?;
        self.finish(weights)
    }

    /// The beginning of [`Pass::encode`], until `layers` MoE layers are behind it.
    pub(super) fn encode_through(&mut self, layers: usize, weights: &StackWeights) -> Result<(), CudaError> {
        if self.blocks == 0 {
            self.embed(&weights.embedding)?;
        }
        while self.layers < layers
            && let Some(block) = weights.blocks.get(self.blocks)
        {
            self.attend_block(block, self.blocks, weights)?;
            self.feed_forward(block)?;
            self.blocks += 1;
        }
        Ok(())
    }

    /// ids (rows), and caches, which get the rows' keys and values -> the best token of each wanted row, whose logits
    /// are in `scratch.logits`.
    pub(super) fn decode(&mut self, weights: &StackWeights, head: &Matrix, head_scale: f32) -> Result<(), CudaError> {
        self.embed(&weights.embedding)?;
        for (index, block) in weights.blocks.iter().enumerate() {
            self.attend_block(block, index, weights)?;
            self.feed_forward(block)?;
        }
        self.head(&weights.final_norm, head, head_scale, None)
    }

    /// The attention of a block; one without cross-attention is the encoder's.
    pub(super) fn attend_block(&self, block: &Block, index: usize, weights: &StackWeights) -> Result<(), CudaError> {
        match &block.cross {
            None => self.attend_own_rows(&block.attention, weights),
            Some(cross) => {
                self.attend_cache(&block.attention, index, weights)?;
                self.attend_input(cross, index)
            }
        }
    }

    /// x = the norm after the last block.
    pub(super) fn finish(&self, weights: &StackWeights) -> Result<(), CudaError> {
        self.norm(&weights.final_norm, None, 1.0)
    }

    /// Keys and values of the encoder's states, which are in `scratch.x`, for one block: (rows, 2 * inner) at `to`.
    pub(super) fn cross_keys(&self, cross: &CrossAttention, to: u64) -> Result<(), CudaError> {
        self.product(self.machine.scratch.x.address(), &cross.kv, to, Become::Store)
    }

    /// Logits of the wanted rows of h, and the best token of each, but for one that is banned for it.
    pub(super) fn head(
        &self,
        norm: &NormWeight,
        head: &Matrix,
        scale: f32,
        banned: Option<u64>,
    ) -> Result<(), CudaError> {
        if self.shape.wanted == 0 {
            return Ok(());
        }
        self.norm(norm, Some(self.packet.wanted()), scale)?;
        let Machine { gpu, kernels, scratch, .. } = self.machine;
        let (x, logits, tokens) = (scratch.x.address(), scratch.logits.address(), scratch.tokens());
        self.product_of(self.shape.wanted, x, head, logits, Become::Logits)?;
        let arguments = Best { logits, tokens, banned: banned.unwrap_or(0), vocab: head.outputs as i32 };
        gpu.launch(&kernels.best, (self.shape.wanted, 1, 1), 1024, &arguments)
    }

    pub(super) fn embed(&self, embedding: &Matrix) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, .. } = self.machine;
        if self.is_done() {
            return Ok(());
        }
        let (table, d) = (embedding.address(), embedding.inputs as i32);
        let arguments = Embed { table, ids: self.packet.ids(), h: scratch.h.address(), d };
        gpu.launch(&kernels.embed, (self.shape.rows, 1, 1), 256, &arguments)
    }

    /// x = norm(h), of all rows or of those listed on the device.
    fn norm(&self, weight: &NormWeight, rows: Option<u64>, scale: f32) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, config, .. } = self.machine;
        if self.is_done() {
            return Ok(());
        }
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
        gpu.launch(&kernels.norm, (count, 1, 1), 128, &arguments)
    }

    /// h += (softmax(q K^T + bias) V) O, every row seeing its whole sequence.
    fn attend_own_rows(&self, own: &SelfAttention, weights: &StackWeights) -> Result<(), CudaError> {
        let scratch = self.machine.scratch;
        self.norm(&own.norm, None, 1.0)?;
        self.product(scratch.x.address(), &own.qkv, scratch.qkv.address(), Become::Store)?;
        let arguments = self.attention(3, weights.bias_address(), 0);
        self.attend(&self.machine.kernels.attend_own_rows, &arguments)?;
        self.product(scratch.attended.address(), &own.output, scratch.h.address(), Become::Add)
    }

    /// As above, every row seeing its sequence up to itself.
    fn attend_cache(&self, own: &SelfAttention, block: usize, weights: &StackWeights) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, .. } = self.machine;
        self.norm(&own.norm, None, 1.0)?;
        self.product(scratch.x.address(), &own.qkv, scratch.qkv.address(), Become::Store)?;
        let arguments = self.attention(3, weights.bias_address(), block);
        if !self.is_done() {
            let grid = (self.shape.sequences, self.shape.longest.min(64), 1);
            gpu.launch(&kernels.write_cache, grid, 256, &arguments)?;
        }
        self.attend(&kernels.attend_cache, &arguments)?;
        self.product(scratch.attended.address(), &own.output, scratch.h.address(), Become::Add)
    }

    /// h += (softmax(q K^T) V) O, K and V being the input's.
    fn attend_input(&self, cross: &CrossAttention, block: usize) -> Result<(), CudaError> {
        let scratch = self.machine.scratch;
        self.norm(&cross.norm, None, 1.0)?;
        self.product(scratch.x.address(), &cross.query, scratch.qkv.address(), Become::Store)?;
        self.attend(&self.machine.kernels.attend_input, &self.attention(1, 0, block))?;
        self.product(scratch.attended.address(), &cross.output, scratch.h.address(), Become::Add)
    }

    /// `width`: the row of q in heads' widths, 3 where keys and values follow.
    fn attention(&self, width: usize, bias: u64, block: usize) -> Attention {
        let Machine { scratch, config, .. } = self.machine;
        Attention {
            q: scratch.qkv.address(),
            out: scratch.attended.address(),
            sequences: self.packet.sequences(),
            bias,
            q_stride: (width * config.inner_dim()) as i32,
            inner: config.inner_dim() as i32,
            reach: config.relative_attention_max_distance as i32,
            block: block as i32,
            layers: self.layers as i32,
            pass: self.guard,
        }
    }

    fn attend(&self, function: &CudaFunction, arguments: &Attention) -> Result<(), CudaError> {
        if self.is_done() {
            return Ok(());
        }
        let blocks = self.shape.longest.div_ceil(self.machine.kernels.queries);
        let grid = (self.machine.config.num_heads, self.shape.sequences, blocks);
        self.machine.gpu.launch(function, grid, 128, arguments)
    }

    /// h += relu(norm(h) Wi^T) Wo^T, or the same by the expert of each row.
    pub(super) fn feed_forward(&mut self, block: &Block) -> Result<(), CudaError> {
        let scratch = self.machine.scratch;
        match &block.feed_forward {
            FeedForward::Dense { norm, wi, wo } => {
                self.norm(norm, None, 1.0)?;
                self.product(scratch.x.address(), wi, scratch.hidden.address(), Become::Relu)?;
                self.product(scratch.hidden.address(), wo, scratch.h.address(), Become::Add)
            }
            FeedForward::Moe { layer, norm, router } => {
                if self.resume == Some(self.layers) {
                    self.resume = None;
                }
                if self.is_done() {
                    self.layers += 1;
                    return Ok(());
                }
                let experts = self.machine.experts.expect("a pass through an MoE layer has experts");
                self.norm(norm, None, 1.0)?;
                let route = self.route(router, experts.table_of(*layer))?;
                self.layers += 1;
                self.experts(&experts, &route)
            }
        }
    }

    /// x = norm(h), and the expert and the factor of each row: what goes to experts that are elsewhere.
    pub(super) fn gate(&self, norm: &NormWeight, router: &Matrix) -> Result<(), CudaError> {
        let Machine { gpu, kernels, .. } = self.machine;
        self.norm(norm, None, 1.0)?;
        self.router_logits(router)?;
        gpu.launch(&kernels.choose_experts, (self.shape.rows.div_ceil(4), 1, 1), 128, &self.route_of(0))
    }

    /// h += out (rows, d_model), what experts elsewhere made of x.
    pub(super) fn add(&self, out: u64) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, config, .. } = self.machine;
        let count = self.shape.rows * config.d_model;
        let arguments = Add { h: scratch.h.address(), y: out, count: count as i32 };
        gpu.launch(&kernels.add_rows, (count.div_ceil(1024), 1, 1), 256, &arguments)
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
        gpu.launch(&kernels.router_logits, (router.outputs.div_ceil(16), rows.div_ceil(8), 1), 128, &logits)
    }

    /// Where each row of x goes: chosen, grouped, and noted in the guard if it is nowhere.
    fn route(&self, router: &Matrix, slots: u64) -> Result<Route, CudaError> {
        let Machine { gpu, kernels, .. } = self.machine;
        let rows = self.shape.rows;
        self.router_logits(router)?;
        let route = self.route_of(slots);
        if rows <= FUSED_ROUTE_ROWS_MAX {
            gpu.launch(&kernels.choose_and_group, (1, 1, 1), 1024, &route)?;
        } else {
            gpu.launch(&kernels.choose_experts, (rows.div_ceil(4), 1, 1), 128, &route)?;
            gpu.launch(&kernels.group_rows, (1, 1, 1), 1024, &route)?;
        }
        Ok(route)
    }

    /// What choosing and grouping the rows of the next MoE layer takes. `slots`: the layer's table, 0 where its experts
    /// are elsewhere.
    pub(super) fn route_of(&self, slots: u64) -> Route {
        let Machine { kernels, scratch, config, .. } = self.machine;
        let rows = self.shape.rows;
        let has_many = kernels.many.is_some();
        Route {
            logits: scratch.router_logits.address(),
            chosen: scratch.chosen(self.layers, rows),
            alpha: scratch.alpha.address(),
            slots,
            pass: self.guard,
            few: scratch.few_tiles.address(),
            many: scratch.many_tiles.address(),
            counts: scratch.tile_counts.address(),
            order: scratch.order.address(),
            rows: rows as i32,
            experts: config.num_experts as i32,
            layer: self.layers as i32,
            few_rows: if has_many { few_group_rows_max(rows) as i32 } else { i32::MAX },
            few_tile: kernels.few.tile.1 as i32,
            many_tile: kernels.many.as_ref().map_or(1, |many| many.tile.1 as i32),
        }
    }

    /// h += alpha * relu(x Wi^T) Wo^T by each row's expert.
    pub(super) fn experts(&self, experts: &ExpertPlaces, route: &Route) -> Result<(), CudaError> {
        let Machine { gpu, kernels, scratch, config, .. } = self.machine;
        let rows = self.shape.rows;
        let groups = rows.min(config.num_experts);
        // How many tiles there are only the device knows; so many at most.
        let few = groups + rows / kernels.few.tile.1;
        let many = match (&kernels.many, few_group_rows_max(rows)) {
            (Some(many), few_rows) if rows > few_rows => {
                rows / many.tile.1 + config.num_experts.min(rows / (few_rows + 1))
            }
            _ => 0,
        };
        let grouped = Grouped {
            gpu,
            kernels,
            rows,
            d_model: config.d_model,
            d_ff: config.d_ff,
            x: scratch.x.address(),
            hidden: scratch.hidden.address(),
            out: scratch.h.address(),
            order: route.order,
            alpha: route.alpha,
            slots: experts.slots,
            few: route.few,
            many: route.many,
            counts: route.counts,
            layers: self.layers,
            guard: self.guard,
        };
        grouped.start(few, many)
    }

    /// y = x W^T of all rows of the batch.
    fn product(&self, x: u64, matrix: &Matrix, out: u64, become_: Become) -> Result<(), CudaError> {
        self.product_of(self.shape.rows, x, matrix, out, become_)
    }

    fn product_of(&self, rows: usize, x: u64, w: &Matrix, out: u64, become_: Become) -> Result<(), CudaError> {
        let Machine { gpu, kernels, .. } = self.machine;
        if self.is_done() {
            return Ok(());
        }
        let kernels = match &kernels.many {
            Some(many) if rows > FEW_ROWS_MAX => many,
            _ => &kernels.few,
        };
        let arguments = Product {
            x,
            w: w.address(),
            out,
            rows: rows as i32,
            k: w.inputs as i32,
            outputs: w.outputs as i32,
            layers: self.layers as i32,
            pass: self.guard,
            ..Product::default()
        };
        let function = match become_ {
            Become::Store => &kernels.store,
            Become::Relu => &kernels.relu,
            Become::Add => &kernels.add,
            Become::Logits => &kernels.logits,
        };
        let grid = (w.outputs / kernels.tile.0, rows.div_ceil(kernels.tile.1), 1);
        gpu.launch(function, grid, kernels.threads, &arguments)
    }

    /// Whether an operation here was done by the pass that this one resumes.
    fn is_done(&self) -> bool {
        self.resume.is_some()
    }
}
