//! A whole model on a GPU: loading it, encoding prompts, and the pass that decoding (`sequence`) shares. The
//! counterpart of [`crate::Reference`], against which it is tested, for batches, with experts within a budget.
//!
//! A call starts one pass and waits for it once; an encoding that would wait for experts is followed layer by layer instead. If an
//! expert was missing, it loads what the layer needs and resumes there. Passes over decoding steps of a shape that was seen before are replayed as a recorded graph: at batch 1 a
//! step is some 170 small kernels, whose launches would take longer than they do.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::result;
use sida_routing::{ExpertId, LayerId, Plan, PlanId, residency::ResidencyCounters};

use super::{
    arguments::Sequence,
    dense::DeviceDense,
    device::Gpu,
    error::{CudaError, failed},
    experts::Experts,
    host_tier::HostTier,
    pass::{BatchShape, Machine, Pass},
    progress::Progress,
    recorded::Recordings,
    scratch::{LOGIT_ROWS_MAX, Packet, Report},
    sequence::DeviceSequence,
    weights,
};
use crate::{
    Checkpoint, ExpertSlot, ExpertStore, ModelConfig, Precision, Spans, Stack, StoredDType,
    forward::{self, Position},
};

/// How a model is put on a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceOptions {
    /// What it computes in.
    pub precision: Precision,
    /// Bytes of experts on the device.
    pub expert_bytes: u64,
    /// Bytes of experts in page-locked memory of the host; the others are read from disk when they are wanted.
    pub host_bytes: u64,
    /// Whether experts in bf16 are packed, if they can be.
    pub packs: bool,
    /// Rows of a batch at most.
    pub rows_max: usize,
    /// Whether steps of a known shape are replayed as graphs.
    pub graphs: bool,
}

/// What became of a pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Passed {
    /// For each MoE layer of the stack, the expert of every row.
    pub experts: Vec<Vec<u16>>,
    /// The best token of each row that was wanted.
    pub tokens: Vec<u32>,
    /// Experts that were missing and had to be loaded.
    pub demand_loads: usize,
    /// How long that took.
    pub load: Duration,
    /// Experts whose uploads were begun while the pass ran, in the place of those that it and others are done with.
    pub loads_beside: usize,
}

/// See the file's head.
#[derive(Debug)]
pub struct DeviceModel {
    pub(super) dense: DeviceDense,
    options: DeviceOptions,
    /// Before the host's, which they come from.
    pub(super) experts: Experts,
    pub(super) host: HostTier,
    progress: Progress,
    graphs: Recordings<(Stack, BatchShape)>,
    /// The plan of the next pass.
    current: Option<PlanId>,
}

impl DeviceModel {
    /// Compiles the kernels and loads the backbone; experts as far as they are pinned in the host's memory, and all of
    /// them onto the device if the budget holds them. `on_progress` gets experts done and experts in all.
    pub fn open(
        gpu: Gpu,
        checkpoint: Arc<Checkpoint>,
        options: DeviceOptions,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, CudaError> {
        let dense = DeviceDense::open(gpu, &checkpoint, options.precision, options.rows_max)?;
        let store = ExpertStore::open(checkpoint)?;
        let slot = ExpertSlot::choose(&store, options.precision, options.packs)?;
        let mut host = HostTier::open(&dense.gpu, store, slot, options.host_bytes)?;
        host.fill(&dense.gpu, on_progress)?;
        Self::with_slab(dense, host, options)
    }

    fn with_slab(dense: DeviceDense, host: HostTier, options: DeviceOptions) -> Result<Self, CudaError> {
        let experts = Experts::new(&dense.gpu, &dense.config, *host.slot(), options.expert_bytes, options.rows_max)?;
        let progress = Progress::new(&dense.gpu, &dense.scratch, dense.config.moe_layers(Stack::Encoder).len())?;
        let mut model = Self { dense, options, experts, host, progress, graphs: Recordings::new(), current: None };
        model.fill_if_all_fit()?;
        Ok(model)
    }

    fn fill_if_all_fit(&mut self) -> Result<(), CudaError> {
        match self.experts.slots() == self.host.experts() {
            true => self.experts.fill(&self.dense.gpu, &mut self.host),
            false => Ok(()),
        }
    }

    /// Drops all experts from the device and goes on with another budget.
    pub fn with_expert_bytes(self, expert_bytes: u64) -> Result<Self, CudaError> {
        self.dense.gpu.enter()?;
        let Self { dense, mut options, host, experts, graphs, .. } = self;
        options.expert_bytes = expert_bytes;
        drop((graphs, experts));
        dense.gpu.finish()?;
        Self::with_slab(dense, host, options)
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.dense.config
    }

    /// Where it is.
    pub fn gpu(&self) -> &Gpu {
        &self.dense.gpu
    }

    /// Bytes of one expert that is not packed, and of all.
    pub fn expert_bytes(&self) -> (u64, u64) {
        let one = self.host.slot().shape().bytes() as u64;
        (one, one * self.host.experts() as u64)
    }

    /// Bytes of one expert on the device.
    pub fn slot_bytes(&self) -> u64 {
        self.host.slot().bytes() as u64
    }

    /// Bytes on the device: backbone, experts, and what passes work in; caches of sequences come on top.
    pub fn bytes(&self) -> (u64, u64, u64) {
        (self.dense.bytes().0, self.experts.bytes(), self.dense.scratch.bytes())
    }

    /// What was loaded and dropped since the budget was set.
    pub fn counters(&self) -> ResidencyCounters {
        self.experts.counters()
    }

    /// Queues what a batch will probably use. A plan is a hint: it costs or saves time and changes no output.
    pub fn plan(&mut self, plan: &Plan) -> Result<(), CudaError> {
        self.experts.plan(plan)
    }

    /// Forgets a plan: its batch is done.
    pub fn release(&mut self, plan: PlanId) {
        self.experts.release(plan);
        self.current = self.current.filter(|&current| current != plan);
    }

    /// Drops all experts from the device; the budget stays.
    pub fn evict_experts(&mut self) {
        if self.experts.is_complete() {
            // Passes that were recorded then do not look for what is missing.
            self.graphs.clear();
        }
        self.experts.evict_all();
    }

    /// Names the plan of the batch whose passes follow.
    pub fn begin_batch(&mut self, plan: Option<PlanId>) {
        self.current = plan;
    }

    /// Encodes prompts: `spans` cuts `ids` into sequences. The states stay on the device, for [`DeviceModel::states`]
    /// and [`DeviceModel::start`], until the next pass.
    pub fn encode(&mut self, ids: &[u32], spans: &Spans) -> Result<Passed, CudaError> {
        self.pass(Stack::Encoder, ids, spans, &DeviceDense::prompts(spans), &[])
    }

    /// Sequences before their first token: see [`crate::Backend::start`].
    pub fn start(&mut self, spans: &Spans) -> Result<Vec<DeviceSequence>, CudaError> {
        self.dense.start_sequences(spans)
    }

    /// Decodes the new tokens of each sequence, and computes logits and best token of the rows `wanted`, at most
    /// [`LOGIT_ROWS_MAX`]. Advances the sequences.
    pub fn decode(
        &mut self,
        ids: &[u32],
        spans: &Spans,
        sequences: &mut [&mut DeviceSequence],
        wanted: &[u32],
    ) -> Result<Passed, CudaError> {
        let described = self.dense.describe(spans, sequences)?;
        let limit = LOGIT_ROWS_MAX.min(spans.rows());
        if wanted.len() > limit || wanted.iter().any(|&row| row as usize >= spans.rows()) {
            return Err(CudaError::TooManyRows { rows: wanted.len(), limit });
        }
        let passed = self.pass(Stack::Decoder, ids, spans, &described, wanted)?;
        for (sequence, range) in sequences.iter_mut().zip(spans.ranges()) {
            sequence.advance(range.len());
        }
        Ok(passed)
    }

    /// The states that the last pass over prompts left: (rows, d_model), row-major.
    pub fn states(&self, rows: usize) -> Result<Vec<f32>, CudaError> {
        let mut bytes = Vec::new();
        self.read_states(rows, &mut bytes)?;
        Ok(self.options.precision.stored().widen(&bytes))
    }

    /// As [`DeviceModel::states`], in the model's precision as they lie on the device, into memory that is kept.
    pub fn read_states(&self, rows: usize, into: &mut Vec<u8>) -> Result<(), CudaError> {
        self.dense.read_states(rows, into)
    }

    /// Puts states (rows, d_model) back where [`DeviceModel::encode`] leaves them.
    pub fn put_states(&mut self, states: &[f32]) -> Result<(), CudaError> {
        self.dense.check_rows(states.len() / self.dense.config.d_model)?;
        self.dense.gpu.enter()?;
        let mut bytes = Vec::with_capacity(states.len() * 4);
        weights::convert(StoredDType::F32, weights::plain_bytes(states), self.options.precision, &mut bytes);
        self.dense.gpu.write(self.dense.scratch.x.address(), &bytes)
    }

    /// The logits of the first `rows` rows that the last pass was asked for: (rows, vocab_size).
    pub fn logits(&self, rows: usize) -> Result<Vec<f32>, CudaError> {
        self.dense.read_logits(rows)
    }

    /// Starts a pass, waits for it, and resumes it as often as an expert was missing.
    pub(super) fn pass(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: &[Sequence],
        wanted: &[u32],
    ) -> Result<Passed, CudaError> {
        self.dense.check_batch(ids, spans)?;
        self.dense.gpu.enter()?;
        let shape = BatchShape::of(spans, wanted.len());
        let packet = Packet::plan(&self.dense.scratch, shape.rows, shape.sequences, shape.wanted);
        packet.send(&self.dense.gpu, ids, sequences, wanted)?;
        let layers = self.dense.config.moe_layers(stack);
        let mut passed = Passed::default();
        // What is decoded comes through the decoder's layers again with every token: no pass is done with them.
        let follows = stack == Stack::Encoder && !layers.is_empty() && self.experts.is_behind(self.current, &layers)?;
        if !follows {
            self.experts.begin_pass(&self.dense.gpu, &mut self.host, self.current)?;
        }
        let (mut resume, mut done) = (None, 0);
        loop {
            let report = match follows {
                true => self.follow_pass(shape, packet, resume, &mut done, &mut passed.loads_beside)?,
                false => {
                    self.start_pass(stack, shape, packet, resume)?;
                    Report::read(&self.dense.gpu, &self.dense.scratch, layers.len(), shape.rows)?
                }
            };
            let Some(stopped) = report.stopped_at() else {
                passed.experts = (0..layers.len()).map(|layer| report.chosen(layer, shape.rows)).collect();
                passed.tokens = report.tokens(shape.wanted);
                self.used(stack, done..layers.len(), &report, shape.rows)?;
                return Ok(passed);
            };
            let begun = Instant::now();
            // What is behind the pass may leave for what it waits for.
            self.used(stack, done..stopped, &report, shape.rows)?;
            done = stopped;
            let experts = distinct(&report.chosen(stopped, shape.rows));
            let layer = LayerId(layers.start + stopped as u16);
            passed.demand_loads += self.experts.demand(&self.dense.gpu, &mut self.host, layer, &experts)?;
            passed.load += begun.elapsed();
            resume = Some(stopped);
        }
    }

    /// Starts an encoding's pass layer by layer, one ahead of what is computed, so that experts come just before each layer and
    /// leave right after it. `done` MoE layers are behind it. Returns when it stopped or is through the last of them.
    fn follow_pass(
        &mut self,
        shape: BatchShape,
        packet: Packet,
        resume: Option<usize>,
        done: &mut usize,
        loads_beside: &mut usize,
    ) -> Result<Report, CudaError> {
        self.clear_guard()?;
        let current = self.current;
        let (Position::Block(mut block) | Position::FeedForward(mut block)) = self.position(Stack::Encoder, resume);
        let Self { dense, experts, host, progress, .. } = self;
        let DeviceDense { gpu, scratch, backbone, .. } = &*dense;
        let weights = &backbone.encoder;
        let layers = dense.config.moe_layers(Stack::Encoder);
        let layer = |index: usize| LayerId(layers.start + index as u16);
        let machine = Machine { experts: Some(experts.places()), ..dense.machine() };
        let mut pass = Pass::new(machine, shape, packet, resume.unwrap_or(0));
        if resume.is_none() {
            experts.come_to(gpu, host, current, layer(0), 0..0)?;
            forward::embed(&mut pass, weights)?;
        }
        for index in *done..layers.len() {
            let moe = dense.config.moe_block(layer(index)).1;
            while block <= moe {
                if resume.is_none_or(|resumed| resumed != index || block != moe) {
                    forward::attend(&mut pass, weights, &weights.blocks[block], block)?;
                }
                forward::feed_forward(&mut pass, &weights.blocks[block])?;
                block += 1;
            }
            progress.tell(gpu, scratch, index, shape.rows)?;
            if index > *done {
                let report = progress.wait(*done, shape.rows)?;
                if report.stopped_at().is_some() {
                    return Ok(report);
                }
                experts.used(layer(*done), &distinct(&report.chosen(*done, shape.rows)), true)?;
                *done += 1;
            }
            if index + 1 < layers.len() {
                let running = layer(*done).0..layer(index).0 + 1;
                *loads_beside += experts.come_to(gpu, host, current, layer(index + 1), running)?;
            }
        }
        forward::advance(&mut pass, weights, Position::Block(block))?;
        forward::finish(&mut pass, weights)?;
        let report = progress.wait(*done, shape.rows)?;
        if report.stopped_at().is_none() {
            experts.used(layer(*done), &distinct(&report.chosen(*done, shape.rows)), true)?;
            *done += 1;
            *loads_beside += experts.go_on(gpu, host)?;
        }
        Ok(report)
    }

    /// Tells the experts that a pass is done with MoE layers of its stack.
    fn used(&mut self, stack: Stack, layers: Range<usize>, report: &Report, rows: usize) -> Result<(), CudaError> {
        let first = self.dense.config.moe_layers(stack).start;
        for index in layers {
            let layer = LayerId(first + index as u16);
            // What a batch decodes uses the decoder's layers again at every token.
            self.experts.used(layer, &distinct(&report.chosen(index, rows)), stack == Stack::Encoder)?;
        }
        Ok(())
    }

    /// Starts all operations of a pass, recorded ones at once.
    fn start_pass(
        &mut self,
        stack: Stack,
        shape: BatchShape,
        packet: Packet,
        resume: Option<usize>,
    ) -> Result<(), CudaError> {
        self.experts.settle(&self.dense.gpu, self.dense.config.moe_layers(stack))?;
        self.clear_guard()?;
        if resume.is_some() || !self.options.graphs {
            return self.run(stack, shape, packet, resume);
        }
        let mut graphs = std::mem::replace(&mut self.graphs, Recordings::new());
        let started = graphs.start(&self.dense.gpu, (stack, shape), || self.run(stack, shape, packet, None));
        self.graphs = graphs;
        started
    }

    fn clear_guard(&self) -> Result<(), CudaError> {
        let stream = self.dense.gpu.compute.cu_stream();
        // SAFETY: the report begins with the guard.
        unsafe { result::memset_d8_async(self.dense.scratch.guard(), 0x7f, 4, stream) }
            .map_err(failed("cuMemsetD8Async"))
    }

    fn run(&self, stack: Stack, shape: BatchShape, packet: Packet, resume: Option<usize>) -> Result<(), CudaError> {
        let mut pass = Pass::new(self.machine(), shape, packet, resume.unwrap_or(0));
        let backbone = &self.dense.backbone;
        let weights = backbone.stack(stack);
        if resume.is_none() {
            forward::embed(&mut pass, weights)?;
        }
        forward::advance(&mut pass, weights, self.position(stack, resume))?;
        match stack {
            Stack::Encoder => forward::finish(&mut pass, weights),
            Stack::Decoder if shape.wanted == 0 => Ok(()),
            Stack::Decoder => forward::head(&mut pass, weights, &backbone.head),
        }
    }

    /// Where a pass begins that resumes at an MoE layer of its stack.
    fn position(&self, stack: Stack, resume: Option<usize>) -> Position {
        let first = self.dense.config.moe_layers(stack).start;
        let block = |layer: usize| self.dense.config.moe_block(LayerId(first + layer as u16)).1;
        resume.map_or(Position::Block(0), |layer| Position::FeedForward(block(layer)))
    }

    pub(super) fn machine(&self) -> Machine<'_> {
        Machine { experts: Some(self.experts.places()), ..self.dense.machine() }
    }
}

/// Each expert once, ascending.
pub fn distinct(chosen: &[u16]) -> Vec<ExpertId> {
    let mut seen = vec![false; chosen.iter().max().map_or(0, |&most| usize::from(most) + 1)];
    chosen.iter().for_each(|&expert| seen[usize::from(expert)] = true);
    (0..seen.len()).filter(|&expert| seen[expert]).map(|expert| ExpertId(expert as u16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An expert would be asked for twice, which residency refuses, or not at all.
    #[test]
    fn experts_are_named_once() {
        assert_eq!(distinct(&[3, 0, 3, 7, 0]), [ExpertId(0), ExpertId(3), ExpertId(7)]);
        assert!(distinct(&[]).is_empty());
    }
}
