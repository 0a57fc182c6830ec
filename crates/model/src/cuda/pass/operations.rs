//! The operations of the forward on a GPU: each is a kernel or a few that are started.

use sida_routing::LayerId;

use super::{
    super::{
        arguments::{Attention, Best, Embed, Heads, Share},
        error::CudaError,
        ways::{self, LongWay},
        weights::{Device, Matrix, Vector},
    },
    BatchShape, Become, Machine, Pass,
};
use crate::{
    backbone::{Matrices, Router, Shared},
    forward::{Operations, Rows},
    rotary,
    spec::{AttentionSpec, Keys, QkNorm, Rotary},
};

/// Up to so many rows one block chooses and groups; with more, choosing is spread over the device.
const FUSED_ROUTE_ROWS_MAX: usize = 256;

/// Blocks that group rows by expert: each reads all choices, and writes its share.
const GROUPING_BLOCKS_MAX: usize = 16;

/// Threads of such a block: as many as a model on a device may have experts.
const GROUPING_THREADS_MAX: usize = 1024;

/// `HEAD_WARPS` of heads.cu.
const HEADS_AT_ONCE: usize = 8;

impl Pass<'_> {
    /// How caches of several runs are attended to. No expert has made anything of this layer yet, so what runs of keys make lies
    /// where that will be.
    fn long_way(&self, spec: &AttentionSpec) -> LongWay {
        let Machine { gpu, scratch, .. } = self.machine;
        let BatchShape { sequences, longest, runs, .. } = self.shape;
        let parts_max = scratch.each.len() / (spec.head_dim + 2);
        let heads = (spec.heads, spec.heads / spec.kv_heads);
        ways::of_long_caches(longest, sequences, heads, runs, parts_max, gpu.description().multiprocessors)
    }
}

/// What no model has that was let onto a device (see `weights::check`).
fn unsupported<T>(what: &'static str) -> Result<T, CudaError> {
    Err(CudaError::Unsupported { what, found: "one".to_owned(), expected: "none" })
}

impl Operations for Pass<'_> {
    type Memory = Device;
    type Error = CudaError;

    fn embed(&mut self, embedding: &Matrix) -> Result<(), CudaError> {
        let Machine { kernels, scratch, .. } = self.machine;
        let (table, d) = (embedding.address(), embedding.inputs as i32);
        let arguments = Embed { table, ids: self.packet.ids(), h: scratch.h.address(), d };
        self.machine.launch(kernels.embed_in(embedding.layout)?, (self.shape.rows, 1, 1), 256, &arguments)
    }

    fn norm(&mut self, weight: &Vector) -> Result<(), CudaError> {
        match self.uncombined.take() {
            Some(chosen) => self.combine(chosen, Some(weight)),
            None => self.norm_rows(weight, None, 1.0),
        }
    }

    fn project(&mut self, weight: &Matrix, bias: Option<&Vector>) -> Result<(), CudaError> {
        let (scratch, bias) = (self.machine.scratch, bias.map_or(0, Vector::address));
        self.heads = Heads { bias, queries: i32::from(bias != 0), limit: f32::INFINITY, ..Heads::default() };
        self.product(scratch.x.address(), weight, scratch.qkv.address(), Become::Store)
    }

    fn norm_heads(&mut self, spec: &AttentionSpec, [q, k]: &[Vector; 2]) -> Result<(), CudaError> {
        let together = i32::from(spec.qk_norm == QkNorm::Rows);
        self.heads = Heads { q_norm: q.address(), k_norm: k.address(), together, queries: 1, ..self.heads };
        Ok(())
    }

    fn clip(&mut self, limit: f32) -> Result<(), CudaError> {
        self.heads = Heads { limit, queries: 1, ..self.heads };
        Ok(())
    }

    fn rotate(&mut self, _: &AttentionSpec, rotary: &Rotary) -> Result<(), CudaError> {
        let turns = self.machine.turns.iter().find(|turns| turns.rotary == *rotary);
        let turns = turns.expect("those of all blocks were put on the device");
        let (frequencies, factor) = (turns.frequencies.address(), rotary::factor(rotary));
        self.heads = Heads { frequencies, factor, queries: 1, ..self.heads };
        Ok(())
    }

    fn attend(&mut self, spec: &AttentionSpec, block: usize, bias: Option<&Vector>) -> Result<(), CudaError> {
        let Machine { kernels, scratch, config, .. } = self.machine;
        let (q, sequences) = (scratch.qkv.address(), self.packet.sequences());
        let with_keys = spec.inner() + 2 * spec.kv_inner();
        let (function, width, bias) = match spec.keys {
            Keys::Rows => (&kernels.attend_own_rows, with_keys, bias.map_or(0, Vector::address)),
            Keys::Cache => (&kernels.attend_cache, with_keys, bias.map_or(0, Vector::address)),
            Keys::Input => (&kernels.attend_input, spec.inner(), 0),
        };
        match spec.keys {
            Keys::Cache => {
                let heads = Heads {
                    rows: q,
                    sequences,
                    epsilon: config.layer_norm_epsilon as f32,
                    stride: width as i32,
                    heads: spec.heads as i32,
                    kv_heads: spec.kv_heads as i32,
                    block: block as i32,
                    layers: self.layers as i32,
                    pass: self.guard,
                    ..self.heads
                };
                // A row whose heads are normed together is one block's: others would read what it has normed.
                let blocks = match self.heads.together {
                    0 => (spec.heads + 2 * spec.kv_heads).div_ceil(HEADS_AT_ONCE),
                    _ => 1,
                };
                let grid = (self.shape.sequences, self.shape.longest.min(512), blocks);
                self.machine.launch(&kernels.place_heads, grid, 32 * HEADS_AT_ONCE as u32, &heads)?;
            }
            Keys::Rows | Keys::Input if self.heads.queries == 0 => {}
            Keys::Rows | Keys::Input => return unsupported("heads that are normed or turned, without a cache"),
        }
        // Caches of one run are attended to as everything is.
        let long = kernels.long.as_ref().filter(|_| spec.keys == Keys::Cache && self.shape.runs > 1);
        let way = long.map(|long| (long, self.long_way(spec)));
        let parts = if matches!(way, Some((_, LongWay::Runs))) { scratch.each.address() } else { 0 };
        let arguments = Attention {
            q,
            out: scratch.attended.address(),
            sequences,
            bias,
            q_stride: width as i32,
            inner: spec.inner() as i32,
            kv_inner: spec.kv_inner() as i32,
            group: (spec.heads / spec.kv_heads) as i32,
            scale: spec.scale,
            window: spec.window.and_then(|window| i32::try_from(window).ok()).unwrap_or(i32::MAX),
            reach: config.relative_attention_max_distance as i32,
            block: block as i32,
            layers: self.layers as i32,
            pass: self.guard,
            parts,
            runs: self.shape.runs as i32,
        };
        let BatchShape { sequences, longest, runs, .. } = self.shape;
        let (heads, groups) = ((spec.heads, sequences, longest.div_ceil(kernels.queries)), (spec.kv_heads, sequences));
        match way {
            None => self.machine.launch(function, heads, 128, &arguments),
            Some((long, LongWay::Heads)) => self.machine.launch(&long.attend, heads, 128, &arguments),
            Some((long, LongWay::Groups)) => self.machine.launch(&long.step, (groups.0, groups.1, 1), 128, &arguments),
            Some((long, LongWay::Runs)) => {
                self.machine.launch(&long.step, (groups.0, groups.1, runs), 128, &arguments)?;
                self.machine.launch(&long.join, (spec.heads, sequences, 1), spec.head_dim as u32, &arguments)
            }
        }
    }

    fn add_output(&mut self, weight: &Matrix, bias: Option<&Vector>) -> Result<(), CudaError> {
        if bias.is_some() {
            return unsupported("a bias of attention's output");
        }
        let scratch = self.machine.scratch;
        self.product(scratch.attended.address(), weight, scratch.h.address(), Become::Add)
    }

    fn feed_forward(&mut self, matrices: &Matrices<Device>) -> Result<(), CudaError> {
        let scratch = self.machine.scratch;
        self.start_hidden(matrices)?;
        self.product(scratch.hidden.address(), &matrices.wo, scratch.h.address(), Become::Add)
    }

    fn shared(&mut self, Shared { matrices, gate }: &Shared<Device>) -> Result<(), CudaError> {
        let Some(gate) = gate else { return self.feed_forward(matrices) };
        let Machine { kernels, scratch, config, .. } = self.machine;
        // No expert has made anything of this layer yet.
        let y = scratch.each.address();
        self.start_hidden(matrices)?;
        self.product(scratch.hidden.address(), &matrices.wo, y, Become::Logits)?;
        let arguments = Share {
            h: scratch.h.address(),
            y,
            x: scratch.x.address(),
            gate: gate.address(),
            d: config.d_model as i32,
            layers: self.layers as i32,
            pass: self.guard,
        };
        self.machine.launch(&kernels.add_share, (self.shape.rows, 1, 1), 128, &arguments)
    }

    /// With experts beside the pass the rows are also grouped, and what is nowhere is noted in the guard.
    fn route(&mut self, layer: LayerId, router: &Router<Device>) -> Result<(), CudaError> {
        let Machine { kernels, experts, config, .. } = self.machine;
        let rows = self.shape.rows;
        self.router_logits(&router.classifier)?;
        let route = self.route_of(experts.map_or(0, |experts| experts.table_of(layer)));
        if experts.is_some() && rows <= FUSED_ROUTE_ROWS_MAX {
            let choices = rows * config.top_k;
            // The fewer threads there are, the sooner they have met.
            let (kernel, threads) = match choices <= self.one_tile_rows_max().min(32) {
                true => (&kernels.choose_and_group_few, 32 * rows),
                false => (&kernels.choose_and_group, config.num_experts.next_multiple_of(32).max(32 * rows)),
            };
            return self.machine.launch(kernel, (1, 1, 1), threads.min(GROUPING_THREADS_MAX) as u32, &route);
        }
        self.machine.launch(&kernels.choose_experts, (rows.div_ceil(4), 1, 1), 128, &route)?;
        match experts {
            Some(_) => {
                let blocks = (rows * config.top_k / 1024).clamp(1, GROUPING_BLOCKS_MAX);
                self.machine.launch(&kernels.group_rows, (blocks, 1, 1), GROUPING_THREADS_MAX as u32, &route)
            }
            None => Ok(()),
        }
    }

    fn experts(&mut self, layer: LayerId) -> Result<Rows, CudaError> {
        let Some(experts) = self.machine.experts else { return Ok(Rows::Leave) };
        self.layers += 1;
        self.start_experts(layer, &experts)?;
        // The host looks at the layer before it goes on, as if rows had left.
        Ok(if self.pause == Some(self.layers) { Rows::Leave } else { Rows::Stay })
    }

    fn norm_wanted(&mut self, weight: &Vector, scale: f32) -> Result<(), CudaError> {
        self.norm_rows(weight, Some(self.packet.wanted()), scale)
    }

    /// And the best token of each row, but for the one that is banned for it.
    fn logits(&mut self, weight: &Matrix) -> Result<(), CudaError> {
        let Machine { kernels, scratch, .. } = self.machine;
        let (x, logits, tokens) = (scratch.x.address(), scratch.logits.address(), scratch.tokens().address());
        self.product_of(self.shape.wanted, x, weight, logits, Become::Logits)?;
        let arguments = Best { logits, tokens, banned: self.packet.banned(), vocab: weight.outputs as i32 };
        self.machine.launch(&kernels.best, (self.shape.wanted, 1, 1), 1024, &arguments)
    }
}
