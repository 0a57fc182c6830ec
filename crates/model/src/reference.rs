//! The whole forward pass in one process, one sequence at a time, nothing clever: the oracle that the cluster
//! must equal to the last token, itself held against transformers' outputs in `tests/parity.rs`. Also records
//! routing for the training of predictors.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use sida_kernels::lanes::LANES;
use sida_routing::{Digest, Grouping, LayerId, Routes};

use crate::{
    Backend, Beside, Checkpoint, CpuBackend, CpuSequence, ExpertStore, ModelConfig, ModelError, MoeRows, NewSequence,
    Spans, Stack, generation::penalize_repetition, router,
};

/// A model that answers by itself.
#[derive(Debug)]
pub struct Reference {
    backend: CpuBackend,
    experts: ExpertStore,
    enforce_capacity: bool,
}

/// What one MoE layer decided for the tokens of one call.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutedLayer {
    /// Which layer.
    pub layer: LayerId,
    /// (tokens, experts), row-major: what the router made of them.
    pub probabilities: Vec<f32>,
    /// Where they went; after capacity, where it is enforced.
    pub routes: Routes,
}

impl Reference {
    /// Loads a model's backbone; experts are read as they are needed.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::of_checkpoint(Checkpoint::open(dir)?)
    }

    /// The same of one that is open.
    pub fn of_checkpoint(checkpoint: Arc<Checkpoint>) -> Result<Self, ModelError> {
        let backend = CpuBackend::load(&checkpoint, &mut |_, _| ())?;
        Ok(Self { backend, experts: ExpertStore::open(checkpoint)?, enforce_capacity: false })
    }

    /// Whether tokens beyond `expert_capacity` are dropped, as transformers 4.x and 5.23 do. Off at first.
    pub fn with_enforced_capacity(mut self, enforce: bool) -> Self {
        self.enforce_capacity = enforce;
        self
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        self.backend.config()
    }

    /// Which model it is.
    pub fn digest(&self) -> Digest {
        self.experts.digest()
    }

    /// The encoder's states of one sequence (tokens, d_model), and its routing, one entry per MoE layer.
    pub fn encode(&self, ids: &[u32]) -> Result<(Vec<f32>, Vec<RoutedLayer>), ModelError> {
        let (mut backend, mut values) = (self.backend.clone(), Vec::new());
        let (states, routing) = self.pass(&mut backend, Stack::Encoder, ids, Vec::new())?;
        backend.values(&states, &mut values)?;
        Ok((values, routing))
    }

    /// The states behind the last norm of a model without an encoder: (tokens, d_model).
    pub fn last_hidden(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (mut backend, mut values) = (self.backend.clone(), Vec::new());
        let (states, _) = self.pass(&mut backend, Stack::Decoder, ids, vec![&mut self.start(&[])?])?;
        let states = backend.last_hidden(states)?;
        backend.values(&states, &mut values)?;
        Ok(values)
    }

    /// A sequence's caches before its first token. They grow with it. Without an encoder there are no states.
    pub fn start(&self, encoder_states: &[f32]) -> Result<CpuSequence, ModelError> {
        let new = NewSequence { rows: 0..encoder_states.len() / self.config().d_model, tokens_max: 0 };
        self.backend.start_of(encoder_states, &[new])?.remove(0)
    }

    /// Decodes further tokens of a sequence at once: their logits (tokens, vocab_size) and routing.
    pub fn decode(&self, sequence: &mut CpuSequence, ids: &[u32]) -> Result<(Vec<f32>, Vec<RoutedLayer>), ModelError> {
        let mut backend = self.backend.clone();
        let (states, routing) = self.pass(&mut backend, Stack::Decoder, ids, vec![sequence])?;
        let rows: Vec<usize> = (0..ids.len()).collect();
        Ok((backend.logits(&states, &rows)?, routing))
    }

    /// The logits of a whole target at once: `ids` begin with the start token; row i scores what follows
    /// `ids[i]`.
    pub fn decode_forced(
        &self,
        encoder_states: &[f32],
        ids: &[u32],
    ) -> Result<(Vec<f32>, Vec<RoutedLayer>), ModelError> {
        self.decode(&mut self.start(encoder_states)?, ids)
    }

    /// The answer to one input by the most probable token each time, at most `new_tokens_max` of them and as the model's
    /// [`crate::GenerationConfig`] says; an end token is its last if one was reached.
    pub fn generate_greedy(&self, ids: &[u32], new_tokens_max: usize) -> Result<Vec<u32>, ModelError> {
        let generation = &self.config().generation;
        let tokens_min = generation.tokens_min.min(new_tokens_max);
        let (mut sequence, mut fed) = match self.config().has_encoder() {
            true => (self.start(&self.encode(ids)?.0)?, vec![generation.decoder_start_token_id]),
            false => (self.start(&[])?, ids.to_vec()),
        };
        let mut answer: Vec<u32> = Vec::new();
        let mut seen: BTreeSet<u32> = fed.iter().copied().collect();
        while answer.len() < new_tokens_max && !answer.last().is_some_and(|&last| generation.is_end(last)) {
            let mut logits = self.decode(&mut sequence, &fed)?.0;
            let last = logits.len() - self.config().vocab_size;
            let logits = &mut logits[last..];
            penalize_repetition(logits, seen.iter().copied(), generation.sampling.repetition_penalty);
            generation.token_rule(answer.len(), tokens_min, new_tokens_max).apply(logits);
            let token = greedy(logits);
            answer.push(token);
            seen.insert(token);
            fed = vec![token];
        }
        Ok(answer)
    }

    /// One pass of one sequence, every expert computed here.
    fn pass(
        &self,
        backend: &mut CpuBackend,
        stack: Stack,
        ids: &[u32],
        sequences: Vec<&mut CpuSequence>,
    ) -> Result<(<CpuBackend as Backend>::States, Vec<RoutedLayer>), ModelError> {
        let spans = Spans::new([ids.len()]);
        let mut routing = Vec::new();
        let mut pass = backend.begin(stack, ids, &spans, sequences, Beside::default())?;
        while let Some(layer) = backend.advance(&mut pass)? {
            let probabilities = backend.probabilities(&mut pass)?.to_vec();
            let mut routes = backend.routes(&mut pass)?;
            if self.enforce_capacity {
                router::enforce_capacity(&mut routes, &spans, self.config().expert_capacity);
            }
            if let MoeRows::Host(x) = backend.rows(&mut pass) {
                let output = self.experts.combined(layer, x, &Grouping::new(&routes))?;
                backend.add(&mut pass, &output)?;
            }
            routing.push(RoutedLayer { layer, probabilities, routes });
        }
        Ok((backend.finish(pass)?.states, routing))
    }
}

/// The best token of one row of logits, the lower id where two are equal; 0 where none is above -infinity.
pub fn greedy(logits: &[f32]) -> u32 {
    // The maximum first, a vector at a time; then who has it.
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for chunk in logits.chunks(LANES) {
        for (max, &logit) in maxima.iter_mut().zip(chunk) {
            *max = if logit > *max { logit } else { *max };
        }
    }
    let best = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == best).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another token than the best would be the answer.
    #[test]
    fn greedy_takes_the_first_best() {
        let mut logits: Vec<f32> = (0..37).map(|i| -(i as f32)).collect();
        assert_eq!(greedy(&logits), 0);
        (logits[20], logits[36]) = (5.0, 5.0);
        assert_eq!(greedy(&logits), 20);
        logits[3] = f32::NAN;
        assert_eq!(greedy(&logits), 20);
        assert_eq!(greedy(&[f32::NAN; 3]), 0);
        assert_eq!(greedy(&[]), 0);
    }
}
