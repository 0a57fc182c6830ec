//! What is learnt: the router's choice and its probabilities.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::log_softmax;

use super::record::StackRecording;

/// Truncated distillation plus cross-entropy (SiDA, section 3.3), summed over entries (a token in a layer), in nats:
/// `- log q(first) - sum of p(e) log q(e)` over the experts kept, where q is the softmax of the logits. Logits and
/// [`targets`] are (entries, num_experts).
pub(super) fn distillation(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    (targets * log_softmax(logits, D::Minus1)?)?.sum_all()?.neg()
}

/// What the log probabilities of each entry are weighted with: the kept probabilities, and 1 more for the most
/// probable expert. Entries are those of the sequences of a batch one after another.
pub(super) fn targets(recorded: &StackRecording, batch: &[usize], num_experts: usize) -> Result<Tensor> {
    let experts = batch.iter().flat_map(|&index| recorded.experts[index].chunks_exact(recorded.kept));
    let probabilities = batch.iter().flat_map(|&index| recorded.probabilities[index].chunks_exact(recorded.kept));
    let mut targets = Vec::new();
    for (experts, probabilities) in experts.zip(probabilities) {
        let start = targets.len();
        targets.resize(start + num_experts, 0.0);
        targets[start + usize::from(experts[0].0)] += 1.0;
        for (expert, probability) in experts.iter().zip(probabilities) {
            targets[start + usize::from(expert.0)] += probability;
        }
    }
    let entries = targets.len() / num_experts;
    Tensor::from_vec(targets, (entries, num_experts), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use sida_routing::ExpertId;

    use super::{super::finite_differences::*, *};

    /// Something else would be learnt than the router's choice and its probabilities, or in another direction.
    #[test]
    fn is_cross_entropy_and_distillation_and_goes_down() {
        let recorded = StackRecording {
            embedding: Vec::new(),
            d_model: 0,
            kept: 2,
            sequences: vec![vec![0], vec![0, 0]],
            experts: vec![[2, 0].map(ExpertId).to_vec(), [3, 1, 1, 0].map(ExpertId).to_vec()],
            probabilities: vec![vec![0.6, 0.3], vec![0.5, 0.2, 0.9, 0.1]],
            inputs: Vec::new(),
        };
        let logits = values(&[3, 4], 1);
        // The second sequence first.
        let loss = || distillation(&logits, &targets(&recorded, &[1, 0], 4).unwrap()).unwrap();
        check(&[&logits], loss);
        let rows: Vec<Vec<f32>> = logits.to_vec2().unwrap();
        let log_q =
            |row: usize, expert: usize| rows[row][expert] - rows[row].iter().map(|logit| logit.exp()).sum::<f32>().ln();
        let first_row = 1.5 * log_q(0, 3) + 0.2 * log_q(0, 1);
        let expected = -(first_row + 1.9 * log_q(1, 1) + 0.1 * log_q(1, 0) + 1.6 * log_q(2, 2) + 0.3 * log_q(2, 0));
        let found = loss().to_scalar::<f32>().unwrap();
        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
    }
}
