//! A model on a GPU as a [`Backend`]: how a pass begins, goes on from MoE layer to MoE layer, and ends.

use std::sync::Arc;

use sida_kernels::norm::softmax;
use sida_routing::{LayerId, Routes};

use super::{Current, DeviceDense};
use crate::{
    CacheSize, ModelConfig, ModelError, PassedLayer, ResidentExperts, RowsOnDevice, RowsWindow, Spans, Stack,
    backend::{Backend, Beside, MoeRows, NewSequence, Passed, Wanted},
    cuda::{
        pass::BatchShape,
        recorded::Recordings,
        scratch::{LOGIT_ROWS_MAX, NO_TOKEN, Packet},
        sequence::DeviceSequence,
    },
    forward,
};

/// A pass on a GPU.
pub struct DevicePass<'s> {
    pub(super) stack: Stack,
    /// The block that it goes on before.
    pub(super) next: usize,
    spans: Spans,
    sequences: Vec<&'s mut DeviceSequence>,
    /// Experts on the device, if it goes through MoE layers by itself; the layers that it went through so.
    pub(super) experts: Option<Arc<dyn ResidentExperts>>,
    pub(super) layers: Vec<PassedLayer>,
    /// Whether what follows the last block is done, too, and what came of it: the best tokens of the wanted rows.
    pub(super) is_finished: bool,
    pub(super) tokens: Option<Vec<u32>>,
    /// At an MoE layer, what its router chose, and all that it said, (rows, experts), once somebody asked.
    pub(super) choice: Routes,
    pub(super) probabilities: Vec<f32>,
}

/// What a pass on a GPU left, until the next one begins: so many rows, of the encoder its states, of the decoder h after
/// the last block.
#[derive(Debug)]
pub struct DeviceStates {
    rows: usize,
    /// The best tokens of the rows that were wanted with the pass, where it chose them.
    tokens: Option<Vec<u32>>,
}

impl Backend for DeviceDense {
    type Pass<'s> = DevicePass<'s>;
    type States = DeviceStates;
    type Sequence = DeviceSequence;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn cache_size(&self) -> CacheSize {
        CacheSize::new(&self.backbone.spec, self.precision.size())
    }

    fn another(&self) -> Option<Self> {
        None
    }

    fn begin<'s>(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: Vec<&'s mut DeviceSequence>,
        // A pass takes milliseconds here: it is not looked whether it is still wanted.
        Beside { wanted, experts, .. }: Beside<'s>,
    ) -> Result<DevicePass<'s>, ModelError> {
        self.check_batch(ids, spans)?;
        self.gpu.enter()?;
        let described = match stack {
            Stack::Encoder => Self::prompts(spans),
            Stack::Decoder => self.describe(spans, &sequences)?,
        };
        let wanted = if wanted.len() <= LOGIT_ROWS_MAX { wanted } else { &[] };
        let shape = BatchShape::of(spans, &described, wanted.len());
        let packet = Packet::plan(&self.scratch, shape.rows, shape.sequences, shape.wanted);
        packet.send(&self.gpu, &self.scratch, ids, &described, wanted)?;
        self.current = Current { shape, packet };
        Ok(DevicePass {
            stack,
            next: 0,
            spans: spans.clone(),
            sequences,
            experts,
            layers: Vec::new(),
            choice: Routes { top_k: self.config.top_k, experts: Vec::new(), weights: Vec::new() },
            is_finished: false,
            tokens: None,
            probabilities: Vec::new(),
        })
    }

    fn advance(&mut self, pass: &mut DevicePass<'_>) -> Result<Option<LayerId>, ModelError> {
        if let Some(experts) = pass.experts.clone() {
            return Ok(self.advance_through(pass, &*experts)?);
        }
        self.gpu.enter()?;
        let (spec, from) = (self.backbone.spec.stack(pass.stack), pass.next);
        let moe = spec.next_moe(from);
        let end = moe.map_or(spec.blocks.len(), |(block, _)| block + 1);
        let shape = self.current.shape;
        let mut steps = std::mem::replace(&mut self.steps, Recordings::new(0));
        let start = || {
            let weights = self.backbone.stack(pass.stack);
            if from == 0 {
                forward::embed(&mut self.pass(), weights)?;
            }
            forward::advance(&mut self.pass(), weights, from).map(drop)
        };
        let started = match pass.stack == Stack::Encoder || shape.longest > 1 || from == end {
            // Prompts are seldom of the same lengths again.
            true => start(),
            false => steps.start(&self.gpu, (from, shape), start),
        };
        self.steps = steps;
        started?;
        pass.next = end;
        pass.probabilities.clear();
        if moe.is_some() {
            pass.choice = self.choice(0)?;
        }
        Ok(moe.map(|(_, layer)| layer))
    }

    fn routes(&mut self, pass: &mut DevicePass<'_>) -> Result<Routes, ModelError> {
        Ok(pass.choice.clone())
    }

    /// The softmax is taken here: the device takes it of the largest only.
    fn probabilities<'p>(&mut self, pass: &'p mut DevicePass<'_>) -> Result<&'p [f32], ModelError> {
        if pass.probabilities.is_empty() {
            self.gpu.enter()?;
            pass.probabilities = vec![0.0; self.current.shape.rows * self.config.num_experts];
            self.gpu.read(self.scratch.router_logits.all(), &mut pass.probabilities)?;
            softmax(&mut pass.probabilities, self.config.num_experts);
        }
        Ok(&pass.probabilities)
    }

    fn rows<'p>(&'p mut self, _: &'p mut DevicePass<'_>) -> MoeRows<'p> {
        MoeRows::Device(RowsOnDevice { dense: self })
    }

    fn add(&mut self, _: &mut DevicePass<'_>, out: &[f32]) -> Result<(), ModelError> {
        Ok(self.add_rows(out)?)
    }

    fn finish(&mut self, mut pass: DevicePass<'_>) -> Result<Passed<DeviceStates>, ModelError> {
        self.gpu.enter()?;
        if pass.stack == Stack::Encoder && !pass.is_finished {
            forward::finish(&mut self.pass(), self.backbone.stack(Stack::Encoder))?;
        }
        for (sequence, range) in pass.sequences.iter_mut().zip(pass.spans.ranges()) {
            sequence.advance(range.len());
        }
        if !pass.is_finished {
            // What the host takes back next is ordered after this; what it was given is not written before.
            self.gpu.finish()?;
        }
        Ok(Passed { states: DeviceStates { rows: pass.spans.rows(), tokens: pass.tokens }, layers: pass.layers })
    }

    fn join(&mut self, mut parts: Vec<DeviceStates>) -> Result<DeviceStates, ModelError> {
        let (expected, found) = (vec![1], vec![parts.len()]);
        parts.pop().filter(|_| found == expected).ok_or(ModelError::Shape {
            what: "passes of a batch on a device",
            expected,
            found,
        })
    }

    fn values<'b>(&mut self, states: &DeviceStates, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], ModelError> {
        let values = states.rows * self.config.d_model;
        if buffer.len() < values {
            buffer.resize(values, 0.0);
        }
        self.write_states(&mut buffer[..values])?;
        Ok(&buffer[..values])
    }

    fn means(&mut self, states: &DeviceStates, spans: &Spans) -> Result<Vec<f32>, ModelError> {
        assert_eq!((spans.rows(), spans.len()), (states.rows, self.current.shape.sequences), "spans of another pass");
        Ok(self.read_means(spans.len())?)
    }

    fn last_hidden(&mut self, states: DeviceStates) -> Result<DeviceStates, ModelError> {
        self.gpu.enter()?;
        forward::finish(&mut self.pass(), &self.backbone.decoder)?;
        self.gpu.finish()?;
        Ok(states)
    }

    fn start(
        &mut self,
        states: Option<&DeviceStates>,
        sequences: &[NewSequence],
    ) -> Result<Vec<Result<DeviceSequence, ModelError>>, ModelError> {
        let started = self.start_sequences(states.map_or(0, |states| states.rows), sequences)?;
        Ok(started.into_iter().map(|sequence| sequence.map_err(ModelError::from)).collect())
    }

    fn fork(&self, sequence: &DeviceSequence) -> Result<DeviceSequence, ModelError> {
        Ok(self.fork_sequence(sequence)?)
    }

    fn fork_prefix(
        &self,
        sequence: &DeviceSequence,
        tokens: usize,
        tokens_max: usize,
    ) -> Result<DeviceSequence, ModelError> {
        Ok(self.fork_sequence_prefix(sequence, tokens, tokens_max)?)
    }

    fn trim(&self, sequence: &mut DeviceSequence) -> u64 {
        // The pool takes whole buffers back, and another one would have to be there for a copy.
        sequence.own_bytes()
    }

    fn logits(&mut self, _: &DeviceStates, rows: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (rows, vocab_size) = (rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), self.config.vocab_size);
        let mut all = vec![0.0; rows.len() * vocab_size];
        for (rows, values) in rows.chunks(LOGIT_ROWS_MAX).zip(all.chunks_mut(LOGIT_ROWS_MAX * vocab_size)) {
            self.start_head(&rows.iter().map(|&row| Wanted { row, banned: None }).collect::<Vec<_>>())?;
            self.gpu.read(self.scratch.logits.all(), values)?;
        }
        Ok(all)
    }

    /// What would be the first of the largest logits is chosen on the device, by the pass itself if these rows were wanted with
    /// it and it went through to its end.
    fn best_tokens(
        &mut self,
        states: &DeviceStates,
        wanted: &[Wanted],
    ) -> Option<Result<Vec<Option<u32>>, ModelError>> {
        let tokens = match &states.tokens {
            Some(tokens) if tokens.len() == wanted.len() => Ok(tokens.clone()),
            _ => self.compute_best_tokens(wanted),
        };
        let is_one = |&token: &u32| token != NO_TOKEN;
        let best = |tokens: Vec<u32>| tokens.into_iter().map(|token| Some(token).filter(is_one)).collect();
        Some(tokens.map(best).map_err(ModelError::from))
    }

    fn device(&mut self) -> Option<RowsOnDevice<'_>> {
        Some(RowsOnDevice { dense: self })
    }

    fn rows_window(&self) -> Option<Result<RowsWindow, ModelError>> {
        let shared = self.shared_rows().map_err(ModelError::from);
        Some(shared.map(|shared| RowsWindow { shared: Arc::new(shared) }))
    }
}
