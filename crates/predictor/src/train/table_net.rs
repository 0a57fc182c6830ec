//! Learns the table: counts which experts each token id activated.

use sida_model::Stack;
use sida_routing::ExpertId;

use super::Recording;
use crate::{entries::top_k, table::StackTable};

/// How much the layer-wide frequencies count against those of the token, in tokens seen: they order the
/// experts of rare tokens and break ties.
const PRIOR_TOKENS: f32 = 0.1;

/// The table of one stack.
pub(super) fn learn(recording: &Recording, stack: Stack, k: usize) -> StackTable {
    let (vocab_size, num_experts) = (recording.shape.vocab_size, recording.shape.num_experts);
    let layers = recording.shape.layers(stack).len();
    let mut table =
        StackTable { experts: vec![ExpertId(0); vocab_size * layers * k], alphas: vec![0.0; vocab_size * layers * k] };
    // A layer at a time, so that the counts of a large vocabulary fit into memory.
    for layer in 0..layers {
        let counts = Counts::of(recording, stack, layer);
        let mut likelihood = vec![0.0; num_experts];
        let mut ignored = vec![0.0; k];
        for token in 0..vocab_size {
            for (expert, likelihood) in likelihood.iter_mut().enumerate() {
                *likelihood = counts.chosen[token * num_experts + expert] + PRIOR_TOKENS * counts.frequency[expert];
            }
            let start = (token * layers + layer) * k;
            let experts = &mut table.experts[start..start + k];
            top_k(&likelihood, experts, &mut ignored);
            for (alpha, &expert) in table.alphas[start..start + k].iter_mut().zip(&*experts) {
                *alpha = counts.alpha(token, expert);
            }
        }
    }
    table
}

/// What the tokens of one layer did.
struct Counts {
    num_experts: usize,
    /// (vocabulary, experts): how often the expert was the token's first.
    chosen: Vec<f32>,
    /// (vocabulary, experts): sum of its probability when it was.
    probability: Vec<f32>,
    /// (experts): share of all tokens.
    frequency: Vec<f32>,
    /// Mean probability of the chosen expert over all tokens.
    mean: f32,
}

impl Counts {
    fn of(recording: &Recording, stack: Stack, layer: usize) -> Self {
        let (vocab_size, num_experts) = (recording.shape.vocab_size, recording.shape.num_experts);
        let layers = recording.shape.layers(stack).len();
        let recorded = recording.of_stack(stack);
        let (mut chosen, mut probability) = (vec![0.0; vocab_size * num_experts], vec![0.0; vocab_size * num_experts]);
        let mut frequency = vec![0.0; num_experts];
        for ((tokens, experts), probabilities) in
            recorded.sequences.iter().zip(&recorded.experts).zip(&recorded.probabilities)
        {
            for (n, &token) in tokens.iter().enumerate() {
                let first = (n * layers + layer) * recorded.kept;
                let expert = usize::from(experts[first].0);
                chosen[token as usize * num_experts + expert] += 1.0;
                probability[token as usize * num_experts + expert] += probabilities[first];
                frequency[expert] += 1.0;
            }
        }
        let total: f32 = frequency.iter().sum::<f32>().max(1.0);
        frequency.iter_mut().for_each(|count| *count /= total);
        let mean = probability.iter().sum::<f32>() / total;
        Self { num_experts, chosen, probability, frequency, mean }
    }

    fn alpha(&self, token: usize, expert: ExpertId) -> f32 {
        let at = token * self.num_experts + usize::from(expert.0);
        let alpha = if self.chosen[at] > 0.0 { self.probability[at] / self.chosen[at] } else { self.mean };
        alpha.clamp(0.0, 1.0)
    }
}
