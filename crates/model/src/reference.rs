//! The whole forward pass in one process, one sequence at a time, nothing clever: the oracle that the cluster
//! must equal to the last token, itself held against transformers' outputs in `tests/parity.rs`. Also records
//! routing for the training of predictors.

use std::path::Path;

use candle_core::Tensor;
use sida_routing::{Digest, ExpertKey, Grouping, LayerId, Routes};

use crate::{
    Backbone, Checkpoint, DecoderState, ExpertStore, FeedForward, ModelConfig, ModelError, MoeGate, Spans, Stack,
    cpu::lanes::LANES,
    elementwise::add,
    expert::ExpertScratch,
    router,
    tensor_rows::{from_rows, rows},
};

/// A model that answers by itself.
#[derive(Debug)]
pub struct Reference {
    backbone: Backbone,
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
        let checkpoint = Checkpoint::open(dir)?;
        let backbone = Backbone::load(&checkpoint, &mut |_, _| ())?;
        Ok(Self { backbone, experts: ExpertStore::open(checkpoint)?, enforce_capacity: false })
    }

    /// Whether tokens beyond `expert_capacity` are dropped, as transformers 4.x and 5.23 do. Off at first.
    pub fn with_enforced_capacity(mut self, enforce: bool) -> Self {
        self.enforce_capacity = enforce;
        self
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        self.backbone.config()
    }

    /// Which model it is.
    pub fn digest(&self) -> Digest {
        self.experts.digest()
    }

    /// The encoder's states of one sequence (tokens, d_model), and its routing, one entry per MoE layer.
    pub fn encode(&self, ids: &[u32]) -> Result<(Tensor, Vec<RoutedLayer>), ModelError> {
        let spans = Spans::new([ids.len()]);
        let mut routing = Vec::new();
        let mut h = self.backbone.embed(Stack::Encoder, ids)?;
        for layer in self.backbone.encoder().layers() {
            h = layer.attend(&h, &spans)?;
            h = self.feed_forward(layer.feed_forward(), &h, &spans, &mut routing)?;
        }
        Ok((self.backbone.encoder().finish(&h)?, routing))
    }

    /// A sequence's decoder state before its first token.
    pub fn start(&self, encoder_states: &Tensor) -> Result<DecoderState, ModelError> {
        self.backbone.decoder().start(encoder_states)
    }

    /// Decodes further tokens of a sequence at once: their logits (tokens, vocab_size) and routing.
    pub fn decode(&self, state: &mut DecoderState, ids: &[u32]) -> Result<(Tensor, Vec<RoutedLayer>), ModelError> {
        let spans = Spans::new([ids.len()]);
        let mut routing = Vec::new();
        let mut h = self.backbone.embed(Stack::Decoder, ids)?;
        for layer in self.backbone.decoder().layers() {
            h = layer.attend(&h, &mut [&mut *state], &spans)?;
            h = self.feed_forward(layer.feed_forward(), &h, &spans, &mut routing)?;
        }
        state.advance(ids.len());
        Ok((self.backbone.logits(&self.backbone.decoder().finish(&h)?)?, routing))
    }

    /// The logits of a whole target at once: `ids` begin with the start token; row i scores what follows
    /// `ids[i]`.
    pub fn decode_forced(
        &self,
        encoder_states: &Tensor,
        ids: &[u32],
    ) -> Result<(Tensor, Vec<RoutedLayer>), ModelError> {
        self.decode(&mut self.start(encoder_states)?, ids)
    }

    /// The most probable answer to one input, token by token, at most `new_tokens_max`; the end token is its
    /// last if it was reached.
    pub fn generate_greedy(&self, ids: &[u32], new_tokens_max: usize) -> Result<Vec<u32>, ModelError> {
        let (encoder_states, _) = self.encode(ids)?;
        let mut state = self.start(&encoder_states)?;
        let mut answer = Vec::new();
        let mut token = self.config().decoder_start_token_id;
        while answer.len() < new_tokens_max && answer.last() != Some(&self.config().eos_token_id) {
            let (logits, _) = self.decode(&mut state, &[token])?;
            token = rows(&logits, greedy)?;
            answer.push(token);
        }
        Ok(answer)
    }

    fn feed_forward(
        &self,
        feed_forward: &FeedForward,
        h: &Tensor,
        spans: &Spans,
        routing: &mut Vec<RoutedLayer>,
    ) -> Result<Tensor, ModelError> {
        match feed_forward {
            FeedForward::Dense(dense) => dense.forward(h),
            FeedForward::Moe(gate) => {
                let x = gate.normed(h)?;
                let routed = self.route(gate, &x, spans)?;
                let output = self.experts(gate.id(), &x, &routed.routes)?;
                routing.push(routed);
                Ok(add(h, &output)?)
            }
        }
    }

    fn route(&self, gate: &MoeGate, x: &Tensor, spans: &Spans) -> Result<RoutedLayer, ModelError> {
        let probabilities = gate.probabilities(x)?;
        let mut routes = router::routes(&self.config().router, &probabilities, self.config().num_experts);
        if self.enforce_capacity {
            router::enforce_capacity(&mut routes, spans, self.config().expert_capacity);
        }
        Ok(RoutedLayer { layer: gate.id(), probabilities, routes })
    }

    /// The weighted sum of each token's experts: x (n, d_model) -> (n, d_model)
    fn experts(&self, layer: LayerId, x: &Tensor, routes: &Routes) -> Result<Tensor, ModelError> {
        let d_model = self.config().d_model;
        let shape = self.experts.shape();
        let grouping = Grouping::new(routes);
        let (mut slot, mut scratch) = (vec![0; shape.bytes()], ExpertScratch::default());
        let mut output = vec![0.0; x.elem_count()];
        rows(x, |x| -> Result<(), ModelError> {
            let mut first_row = 0;
            for group in &grouping.groups {
                let tokens = &grouping.tokens[first_row..first_row + group.rows as usize];
                let own: Vec<f32> =
                    tokens.iter().flat_map(|&token| &x[token as usize * d_model..][..d_model]).copied().collect();
                let mut results = vec![0.0; own.len()];
                self.experts.load(ExpertKey { layer, expert: group.expert }, &mut slot)?;
                shape.forward(&slot, &own, &mut results, &mut scratch);
                grouping.combine(first_row, &results, d_model, &mut output);
                first_row += tokens.len();
            }
            Ok(())
        })??;
        Ok(from_rows(output, d_model)?)
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
