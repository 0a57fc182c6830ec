//! A pass that goes through MoE layers by itself, as far as the experts that its routers choose are resident on its device.
//!
//! The host sends the table of who is where, starts everything up to the end, and waits once. Where an expert is missing,
//! the device notes the layer in the pass's guard, and everything that was started after it does nothing: the pass stands at
//! that layer with its rows as they are before their experts, and the caller has them computed wherever that is possible.
//!
//! Prompts are many rows, which choose most experts of a layer. So where not all fit, their layers are started one by one, each
//! when the one before it runs. Experts of layers that are done are not held any more, so they may leave for experts of later
//! layers; and each layer is told of the experts that came while the ones before it ran.

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaStream;
use sida_routing::{ExpertId, LayerId};

use super::{
    super::{
        buffer::DeviceBuffer,
        device::Gpu,
        error::CudaError,
        grouped::Slots,
        pass::{BatchShape, ExpertPlaces, Machine, Pass},
        progress::Progress,
        recorded::Recordings,
        scratch::{Report, Scratch},
    },
    DeviceDense,
    backend::DevicePass,
};
use crate::{ModelConfig, PassedLayer, ResidentExperts, Stack, forward, spec::FeedForwardSpec};

/// A batch of prompts is recorded once its shape has come so often: few do.
const PROMPT_STARTS: u32 = 16;

/// What passes that go through MoE layers need beside what others do.
#[derive(Debug)]
pub(super) struct Through {
    /// (MoE layers, experts): what the device knows of who is where.
    table: DeviceBuffer<i32>,
    known: Option<Known>,
    progress: Progress,
    /// Whole passes by shape, and whether they are guarded. Prompts have many shapes, which must not push out those of steps.
    prompts: Recordings<(Stack, BatchShape, bool)>,
    steps: Recordings<(Stack, BatchShape, bool)>,
}

/// What the table says.
#[derive(Clone, Debug)]
struct Known {
    slots: Slots,
    version: u64,
    is_complete: bool,
}

/// Layers that are held until this is dropped.
struct Held<'r> {
    experts: &'r dyn ResidentExperts,
    compute: Arc<CudaStream>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // However the pass ended, what was started of it may still read the slots. An error says that nothing does.
        let _ = self.compute.synchronize();
        self.experts.release();
    }
}

impl Through {
    pub(super) fn new(gpu: &Gpu, config: &ModelConfig, scratch: &Scratch) -> Result<Self, CudaError> {
        let layers = [Stack::Encoder, Stack::Decoder].into_iter().map(|stack| config.moe_layers(stack).len());
        Ok(Self {
            table: gpu.allocate("experts", config.moe_layer_count() * config.num_experts)?,
            known: None,
            progress: Progress::new(gpu, scratch, layers.max().unwrap_or(0))?,
            prompts: Recordings::new(PROMPT_STARTS),
            steps: Recordings::new(1),
        })
    }

    /// Brings the table up to date with `layers` held. Returns whether every expert of the model is resident.
    fn hold(&mut self, gpu: &Gpu, experts: &dyn ResidentExperts, layers: Range<u16>) -> Result<bool, CudaError> {
        let slots = &experts.slots().slots;
        if self.known.as_ref().is_some_and(|known| known.slots != *slots) {
            // Recorded passes name the slots of another node.
            self.known = None;
            self.prompts.clear();
            self.steps.clear();
        }
        if let Some(residents) = experts.hold(layers, self.known.as_ref().map(|known| known.version)) {
            gpu.write(self.table.all(), &residents.slots)?;
            let (version, is_complete) = (residents.version, residents.is_complete);
            self.known = Some(Known { slots: slots.clone(), version, is_complete });
        }
        Ok(self.known().is_complete)
    }

    fn known(&self) -> &Known {
        self.known.as_ref().expect("known once layers are held")
    }

    fn graphs(&mut self, are_prompts: bool) -> &mut Recordings<(Stack, BatchShape, bool)> {
        if are_prompts { &mut self.prompts } else { &mut self.steps }
    }
}

impl DeviceDense {
    /// As [`crate::Backend::advance`], through MoE layers all of whose chosen experts are resident. Behind the last block what
    /// follows it is computed, too. Waits for the device.
    pub(super) fn advance_through(
        &mut self,
        pass: &mut DevicePass<'_>,
        experts: &dyn ResidentExperts,
    ) -> Result<Option<LayerId>, CudaError> {
        self.gpu.enter()?;
        let sparse = self.sparse_blocks(pass.stack);
        let first = sparse.iter().filter(|&&block| block < pass.next).count();
        let held = Held { experts, compute: self.gpu.compute.clone() };
        let ended = match self.are_prompts(pass.stack) {
            true => self.read_through(pass, first, &sparse, experts),
            false => {
                let is_complete = self.hold(pass.stack, experts, 0..sparse.len())?;
                self.start_at_once(pass, first, &sparse, experts, !is_complete)
            }
        };
        drop(held);
        let stopped = ended?;
        pass.next = stopped.map_or(self.backbone.spec.stack(pass.stack).blocks.len(), |at| sparse[at] + 1);
        pass.probabilities.clear();
        pass.is_finished = stopped.is_none();
        match stopped {
            None => Ok(None),
            Some(at) => {
                pass.choice = self.choice(at)?;
                Ok(Some(self.layer_of(pass.stack, at)))
            }
        }
    }

    /// Whether the current pass reads prompts, and is not a step that adds a token to each of its sequences.
    fn are_prompts(&self, stack: Stack) -> bool {
        stack == Stack::Encoder || self.current.shape.longest > 1
    }

    /// Prompts: all at once where every expert is resident, else layer by layer. Returns the MoE layer of the stack that they
    /// stopped at.
    fn read_through(
        &mut self,
        pass: &mut DevicePass<'_>,
        first: usize,
        sparse: &[usize],
        experts: &dyn ResidentExperts,
    ) -> Result<Option<usize>, CudaError> {
        match self.hold(pass.stack, experts, first..sparse.len().min(first + 1))? {
            true => self.start_at_once(pass, first, sparse, experts, false),
            false => self.start_layer_by_layer(pass, first, sparse, experts),
        }
    }

    /// Starts everything that is left, before which `first` MoE layers are, and waits. `is_guarded`: an expert may be missing.
    fn start_at_once(
        &mut self,
        pass: &mut DevicePass<'_>,
        first: usize,
        sparse: &[usize],
        experts: &dyn ResidentExperts,
        is_guarded: bool,
    ) -> Result<Option<usize>, CudaError> {
        if is_guarded {
            self.clear_guard()?;
        }
        let (stack, from) = (pass.stack, pass.next);
        if from == 0 {
            let are_prompts = self.are_prompts(stack);
            let mut graphs = std::mem::replace(self.through.graphs(are_prompts), Recordings::new(0));
            let key = (stack, self.current.shape, is_guarded);
            let started = graphs.start(&self.gpu, key, || self.start_rest(stack, 0, 0, is_guarded));
            *self.through.graphs(are_prompts) = graphs;
            started?;
        } else {
            self.start_rest(stack, from, first, is_guarded)?;
        }
        let report = self.read_report(sparse.len())?;
        // Nobody writes the guard of a pass that has none.
        let stopped = report.stopped_at().filter(|_| is_guarded);
        for layer in first..stopped.unwrap_or(sparse.len()) {
            self.note_passed(pass, layer, &report, experts);
        }
        pass.tokens = stopped.is_none().then(|| report.tokens(self.current.shape.wanted));
        Ok(stopped)
    }

    /// As [`DeviceDense::start_at_once`], each layer started when the one before it runs. The pass stays guarded to its end, also
    /// where the last missing expert comes meanwhile: the layer that runs may have stopped for it.
    fn start_layer_by_layer(
        &mut self,
        pass: &mut DevicePass<'_>,
        first: usize,
        sparse: &[usize],
        experts: &dyn ResidentExperts,
    ) -> Result<Option<usize>, CudaError> {
        self.clear_guard()?;
        let (stack, choices) = (pass.stack, self.choices());
        let (mut from, mut done) = (pass.next, first);
        for (layer, &block) in sparse.iter().enumerate().skip(first) {
            if layer > first {
                self.hold(stack, experts, done..layer + 1)?;
            }
            self.start_blocks(stack, from, layer, Some(layer + 1), true)?;
            from = block + 1;
            self.through.progress.tell(&self.gpu, &self.scratch, layer, choices)?;
            if layer > first {
                let report = self.through.progress.wait(done, choices)?;
                if report.stopped_at().is_some() {
                    // What was started meanwhile must not run on while experts move.
                    self.gpu.finish()?;
                    return Ok(report.stopped_at());
                }
                self.note_passed(pass, done, &report, experts);
                done += 1;
            }
        }
        self.start_rest(stack, from, sparse.len(), true)?;
        let report = self.read_report(sparse.len())?;
        let stopped = report.stopped_at();
        pass.tokens = stopped.is_none().then(|| report.tokens(self.current.shape.wanted));
        for layer in done..stopped.unwrap_or(sparse.len()) {
            self.note_passed(pass, layer, &report, experts);
        }
        Ok(stopped)
    }

    /// Starts the blocks from `from` on, before which `layers` MoE layers are, and what follows the last.
    fn start_rest(&self, stack: Stack, from: usize, layers: usize, is_guarded: bool) -> Result<(), CudaError> {
        let mut pass = self.start_blocks(stack, from, layers, None, is_guarded)?;
        match stack {
            Stack::Encoder => forward::finish(&mut pass, self.backbone.stack(stack)),
            Stack::Decoder if self.current.shape.wanted == 0 => Ok(()),
            Stack::Decoder => forward::head(&mut pass, &self.backbone.decoder, &self.backbone.head),
        }
    }

    /// Starts the blocks from `from` on, up to where `pause` MoE layers are behind the pass.
    fn start_blocks(
        &self,
        stack: Stack,
        from: usize,
        layers: usize,
        pause: Option<usize>,
        is_guarded: bool,
    ) -> Result<Pass<'_>, CudaError> {
        let (slots, table) = (&self.through.known().slots, self.through.table.address());
        let places = ExpertPlaces { table, layer_bytes: self.config.num_experts * 4, slots, may_miss: is_guarded };
        let machine = Machine { experts: Some(places), ..self.machine() };
        let mut pass = Pass::new(machine, self.current.shape, self.current.packet, layers).pausing_after(pause);
        let weights = self.backbone.stack(stack);
        if from == 0 {
            forward::embed(&mut pass, weights)?;
        }
        forward::advance(&mut pass, weights, from)?;
        pass.settle()?;
        Ok(pass)
    }

    /// Holds these MoE layers of a stack, and no others any more. Returns whether every expert of the model is resident.
    fn hold(&mut self, stack: Stack, experts: &dyn ResidentExperts, layers: Range<usize>) -> Result<bool, CudaError> {
        let layers = self.layer_of(stack, layers.start).0..self.layer_of(stack, layers.end).0;
        self.through.hold(&self.gpu, experts, layers)
    }

    fn note_passed(&self, pass: &mut DevicePass<'_>, layer: usize, report: &Report, experts: &dyn ResidentExperts) {
        let chosen = report.chosen(layer, self.choices()).into_iter().map(ExpertId).collect();
        let passed = PassedLayer { layer: self.layer_of(pass.stack, layer), experts: chosen };
        experts.used(passed.layer, &passed.groups());
        pass.layers.push(passed);
    }

    /// Reads the report after all that was started, through page-locked memory.
    fn read_report(&mut self, layers: usize) -> Result<Report, CudaError> {
        let bytes = Report::bytes(layers, self.choices());
        let host = &mut self.exchange.host()?[..bytes];
        // SAFETY: the buffer is this object's, and is touched again after `finish` below only.
        unsafe { self.gpu.start_reading(self.scratch.report.all(), host) }?;
        self.gpu.finish()?;
        Ok(Report::of(host.to_vec(), 0))
    }

    /// Of all rows of the current pass.
    fn choices(&self) -> usize {
        self.current.shape.rows * self.config.top_k
    }

    fn clear_guard(&self) -> Result<(), CudaError> {
        self.gpu.fill(self.scratch.report.first(4), 0x7f)
    }

    /// The blocks of a stack that have experts, ascending.
    fn sparse_blocks(&self, stack: Stack) -> Vec<usize> {
        let blocks = self.backbone.spec.stack(stack).blocks.iter().enumerate();
        let sparse = blocks.filter(|(_, block)| matches!(block.feed_forward, FeedForwardSpec::Moe { .. }));
        sparse.map(|(number, _)| number).collect()
    }

    /// The MoE layer of the model that is layer `at` of a stack.
    fn layer_of(&self, stack: Stack, at: usize) -> LayerId {
        LayerId(self.config.moe_layers(stack).start + at as u16)
    }
}
