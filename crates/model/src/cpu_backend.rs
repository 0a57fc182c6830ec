//! The dense part of a model on the processor: passes over plain rows, by the thread that owns them. A batch of prompts is
//! cut into a piece per thread, and the threads meet once per MoE layer.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use sida_kernels::elementwise::add_to;
use sida_routing::{LayerId, Routes};

use crate::{
    Backbone, CacheSize, Checkpoint, GivenUp, ModelConfig, ModelError, Spans, Stack, StillWanted,
    backbone::FeedForward,
    backend::{Backend, Beside, MoeRows, NewSequence, Passed},
    cpu_operations::{CpuOperations, Scratch},
    forward,
    kv_cache::{self, CpuSequence},
    loader::Host,
    pieces, router,
};

/// Weights in the host's memory, and a thread's way to them.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    config: ModelConfig,
    backbone: Arc<Backbone<Host>>,
}

/// A pass on the processor.
#[derive(Debug)]
pub struct CpuPass<'s> {
    stack: Stack,
    /// The block that it goes on before. At an MoE layer, that of the layer is behind it.
    next: usize,
    spans: Spans,
    sequences: Vec<&'s mut CpuSequence>,
    /// (rows, d_model): the hidden states.
    h: Vec<f32>,
    /// (rows, d_model): at an MoE layer, what goes to the experts.
    x: Vec<f32>,
    /// (rows, experts): at an MoE layer, what its router makes of x, once somebody asked.
    probabilities: Vec<f32>,
    scratch: Scratch,
    still_wanted: StillWanted<'s>,
}

/// What a pass on the processor left: of the encoder its states, of the decoder h after the last block, both
/// (tokens, d_model).
#[derive(Debug)]
pub struct CpuStates(Vec<f32>);

impl CpuBackend {
    /// Copies the weights into memory, in the dtype they are stored in. `on_progress` gets bytes done and bytes in all.
    pub fn load(checkpoint: &Checkpoint, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        let backbone = Arc::new(Backbone::load(checkpoint, on_progress)?);
        Ok(Self { config: checkpoint.config().clone(), backbone })
    }

    /// The feed-forward of the block that a pass is at.
    fn moe_block(&self, pass: &CpuPass<'_>) -> Option<&FeedForward<Host>> {
        let block = pass.next.checked_sub(1)?;
        Some(&self.backbone.stack(pass.stack).blocks[block].feed_forward)
    }

    /// As [`Backend::start`], of plain rows.
    pub fn start_of(
        &self,
        states: &[f32],
        sequences: &[NewSequence],
    ) -> Result<Vec<Result<CpuSequence, ModelError>>, ModelError> {
        let all = states.len() / self.config.d_model;
        check("encoder states [values]", all * self.config.d_model, states.len())?;
        for NewSequence { rows, .. } in sequences {
            check("rows of an input, their last", rows.end.min(all), rows.end)?;
        }
        let mut cross: Vec<_> = sequences.iter().map(|_| Ok(Vec::new())).collect();
        let mut values = Vec::new();
        for block in &self.backbone.decoder.blocks {
            let Some(input) = &block.cross else { continue };
            input.keys_values.product(states, &mut values); // (rows, 2 kv_inner)
            let width = 2 * input.attention.spec.kv_inner();
            for (cross, NewSequence { rows, .. }) in cross.iter_mut().zip(sequences) {
                let Ok(blocks) = cross else { continue };
                match copied(&values[rows.start * width..rows.end * width]) {
                    Ok(own) => blocks.push(own),
                    Err(error) => *cross = Err(error),
                }
            }
        }
        let start = |(cross, new): (Result<_, ModelError>, &NewSequence)| {
            CpuSequence::new(&self.backbone.spec.decoder, cross?, new.tokens_max)
        };
        Ok(cross.into_iter().zip(sequences).map(start).collect())
    }
}

impl Backend for CpuBackend {
    type Pass<'s> = CpuPass<'s>;
    type States = CpuStates;
    type Sequence = CpuSequence;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn cache_size(&self) -> CacheSize {
        CacheSize::new(&self.backbone.spec, size_of::<f32>())
    }

    fn another(&self) -> Option<Self> {
        Some(self.clone())
    }

    fn begin<'s>(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: Vec<&'s mut CpuSequence>,
        Beside { still_wanted, .. }: Beside<'s>,
    ) -> Result<CpuPass<'s>, ModelError> {
        self.backbone.check_ids(ids)?;
        check("tokens of all sequences [rows]", spans.rows(), ids.len())?;
        let expected = if stack == Stack::Decoder { spans.len() } else { 0 };
        check("decoder states [sequences]", expected, sequences.len())?;
        let values = spans.rows() * self.config.d_model;
        let mut pass = CpuPass {
            stack,
            next: 0,
            spans: spans.clone(),
            sequences,
            h: vec![0.0; values],
            x: vec![0.0; values],
            probabilities: Vec::new(),
            scratch: Scratch::default(),
            still_wanted,
        };
        forward::embed(&mut pass.operations(&self.backbone, ids), self.backbone.stack(stack))?;
        Ok(pass)
    }

    fn advance(&mut self, pass: &mut CpuPass<'_>) -> Result<Option<LayerId>, ModelError> {
        let (backbone, weights) = (&*self.backbone, self.backbone.stack(pass.stack));
        let blocks = backbone.spec.stack(pass.stack);
        let moe = blocks.next_moe(pass.next);
        let from = std::mem::replace(&mut pass.next, moe.map_or(blocks.blocks.len(), |(block, _)| block + 1));
        pass.probabilities.clear();
        if pass.sequences.is_empty() {
            let CpuPass { spans, h, x, scratch, still_wanted, .. } = pass;
            let still_wanted = *still_wanted;
            let is_given_up = AtomicBool::new(false);
            pieces::by_sequence(h, x, self.config.d_model, spans, scratch, |h, x, spans, scratch| {
                let (spec, sequences) = (&backbone.spec, &mut [][..]);
                let is_piece = true;
                let mut ops = CpuOperations { spec, ids: &[], spans, sequences, h, x, scratch, is_piece, still_wanted };
                if let Err(GivenUp) = forward::advance(&mut ops, weights, from) {
                    is_given_up.store(true, Ordering::Relaxed);
                }
            });
            if is_given_up.into_inner() {
                return Err(GivenUp.into());
            }
        } else {
            forward::advance(&mut pass.operations(backbone, &[]), weights, from)?;
        }
        Ok(moe.map(|(_, layer)| layer))
    }

    fn routes(&mut self, pass: &mut CpuPass<'_>) -> Result<Routes, ModelError> {
        let (top_k, num_experts, is_normalised) =
            (self.config.top_k, self.config.num_experts, self.config.is_normalised());
        Ok(router::routes(top_k, is_normalised, self.probabilities(pass)?, num_experts))
    }

    fn probabilities<'p>(&mut self, pass: &'p mut CpuPass<'_>) -> Result<&'p [f32], ModelError> {
        if pass.probabilities.is_empty()
            && let Some(FeedForward::Moe { router, .. }) = self.moe_block(pass)
        {
            router.probabilities(&pass.x, &mut pass.probabilities);
        }
        Ok(&pass.probabilities)
    }

    fn rows<'p>(&'p mut self, pass: &'p mut CpuPass<'_>) -> MoeRows<'p> {
        MoeRows::Host(&pass.x)
    }

    fn add(&mut self, pass: &mut CpuPass<'_>, out: &[f32]) -> Result<(), ModelError> {
        check("results of experts [values]", pass.h.len(), out.len())?;
        add_to(&mut pass.h, out);
        Ok(())
    }

    fn finish(&mut self, mut pass: CpuPass<'_>) -> Result<Passed<CpuStates>, ModelError> {
        for (sequence, range) in pass.sequences.iter_mut().zip(pass.spans.ranges()) {
            sequence.advance(range.len());
        }
        let states = match pass.stack {
            Stack::Encoder => {
                forward::finish(&mut pass.operations(&self.backbone, &[]), self.backbone.stack(Stack::Encoder))?;
                pass.x
            }
            Stack::Decoder => pass.h,
        };
        Ok(Passed { states: CpuStates(states), layers: Vec::new() })
    }

    fn join(&mut self, parts: Vec<CpuStates>) -> Result<CpuStates, ModelError> {
        let mut parts = parts.into_iter();
        let mut all = parts.next().map_or_else(Vec::new, |CpuStates(first)| first);
        parts.for_each(|CpuStates(part)| all.extend_from_slice(&part));
        Ok(CpuStates(all))
    }

    fn values<'b>(&mut self, states: &CpuStates, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], ModelError> {
        buffer.clear();
        buffer.extend_from_slice(&states.0);
        Ok(buffer)
    }

    fn means(&mut self, states: &CpuStates, spans: &Spans) -> Result<Vec<f32>, ModelError> {
        let d = self.config().d_model;
        let mut means = vec![0.0; spans.len() * d];
        for (mean, rows) in means.chunks_exact_mut(d).zip(spans.ranges()) {
            let count = rows.len() as f32;
            for row in states.0[rows.start * d..rows.end * d].chunks_exact(d) {
                mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
            mean.iter_mut().for_each(|sum| *sum /= count);
        }
        Ok(means)
    }

    fn last_hidden(&mut self, states: CpuStates) -> Result<CpuStates, ModelError> {
        let h = states.0;
        let rows = Spans::new([h.len() / self.config.d_model]);
        let mut pass = CpuPass::of_states(Stack::Decoder, rows, h);
        forward::finish(&mut pass.operations(&self.backbone, &[]), &self.backbone.decoder)?;
        Ok(CpuStates(pass.x))
    }

    fn start(
        &mut self,
        states: Option<&CpuStates>,
        sequences: &[NewSequence],
    ) -> Result<Vec<Result<CpuSequence, ModelError>>, ModelError> {
        self.start_of(states.map_or(&[], |states| &states.0), sequences)
    }

    fn fork(&self, sequence: &CpuSequence) -> Result<CpuSequence, ModelError> {
        sequence.fork()
    }

    fn fork_prefix(&self, sequence: &CpuSequence, tokens: usize, tokens_max: usize) -> Result<CpuSequence, ModelError> {
        sequence.fork_prefix(tokens, tokens_max)
    }

    fn trim(&self, sequence: &mut CpuSequence) -> u64 {
        sequence.trim();
        sequence.bytes().0
    }

    fn logits(&mut self, states: &CpuStates, rows: &[usize]) -> Result<Vec<f32>, ModelError> {
        let d_model = self.config.d_model;
        let h = gather(&states.0, d_model, rows);
        let mut pass = CpuPass::of_states(Stack::Decoder, Spans::single_tokens(rows.len()), h);
        let Backbone { decoder, head, .. } = &*self.backbone;
        forward::head(&mut pass.operations(&self.backbone, &[]), decoder, head)?;
        Ok(pass.scratch.logits)
    }
}

impl<'s> CpuPass<'s> {
    /// A pass that begins with h as another one left it.
    fn of_states(stack: Stack, spans: Spans, h: Vec<f32>) -> Self {
        let (x, scratch) = (vec![0.0; h.len()], Scratch::default());
        let (sequences, probabilities, still_wanted) = (Vec::new(), Vec::new(), StillWanted::default());
        Self { stack, next: 0, spans, sequences, h, x, probabilities, scratch, still_wanted }
    }

    fn operations<'p>(&'p mut self, backbone: &'p Backbone<Host>, ids: &'p [u32]) -> CpuOperations<'p, 's> {
        let Self { spans, sequences, h, x, scratch, still_wanted, .. } = self;
        let (spec, is_piece, still_wanted) = (&backbone.spec, false, *still_wanted);
        CpuOperations { spec, ids, spans, sequences, h, x, scratch, is_piece, still_wanted }
    }
}

/// The rows of `h` (tokens, d_model) at `wanted`.
fn gather(h: &[f32], d_model: usize, wanted: &[usize]) -> Vec<f32> {
    wanted.iter().flat_map(|row| &h[row * d_model..][..d_model]).copied().collect()
}

/// A copy of `values` in memory of its own, or an error where there is none.
fn copied(values: &[f32]) -> Result<Vec<f32>, ModelError> {
    let mut memory = kv_cache::reserved(values.len())?;
    memory.extend_from_slice(values);
    Ok(memory)
}

fn check(what: &'static str, expected: usize, found: usize) -> Result<(), ModelError> {
    match expected == found {
        true => Ok(()),
        false => Err(ModelError::Shape { what, expected: vec![expected], found: vec![found] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence would be continued from another one's logits.
    #[test]
    fn rows_are_the_wanted_ones() {
        let h: Vec<f32> = (0..8).map(|v| v as f32).collect();
        assert_eq!(gather(&h, 2, &[1, 3]), [2.0, 3.0, 6.0, 7.0]);
    }
}
