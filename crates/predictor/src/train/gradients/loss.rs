//! What is learnt: the router's choice and its probabilities.

use sida_model::cpu::norm::softmax;
use sida_routing::ExpertId;

/// Truncated distillation plus cross-entropy (SiDA, section 3.3), summed over entries (a token in a layer):
/// `- log q(first) - sum of p(e) log q(e)` over the experts kept, where q is the softmax of the logits. Turns
/// logits (entries, num_experts) into their gradient. The experts' most probable comes first.
pub(in super::super) fn distillation<'a>(
    logits: &mut [f32],
    num_experts: usize,
    kept: impl Iterator<Item = (&'a [ExpertId], &'a [f32])>,
) -> f32 {
    softmax(logits, num_experts);
    let mut loss = 0.0;
    for (row, (experts, probabilities)) in logits.chunks_exact_mut(num_experts).zip(kept) {
        // With the first expert's own share of 1 for the cross-entropy.
        let shares = || {
            let cross_entropy = std::iter::once((experts[0], 1.0));
            cross_entropy.chain(experts.iter().copied().zip(probabilities.iter().copied()))
        };
        let mut total = 0.0;
        for (expert, share) in shares() {
            // Below 1e-20 the loss of one entry would drown all others.
            loss -= share * row[usize::from(expert.0)].max(1e-20).ln();
            total += share;
        }
        row.iter_mut().for_each(|value| *value *= total);
        shares().for_each(|(expert, share)| row[usize::from(expert.0)] -= share);
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::{super::finite_differences::*, *};

    /// Training would go in some other direction than down.
    #[test]
    fn gradient_is_that_of_finite_differences() {
        let logits = values(12, 1);
        let experts: Vec<ExpertId> = [2, 0, 3, 1, 1, 0].map(ExpertId).to_vec();
        let probabilities = [0.6, 0.3, 0.5, 0.2, 0.9, 0.1];
        let run = |logits: &[f32]| {
            let mut logits = logits.to_vec();
            let kept = experts.chunks(2).zip(probabilities.chunks(2));
            (distillation(&mut logits, 4, kept), logits)
        };
        check(&logits, &run(&logits).1, |logits| run(logits).0);
    }
}
