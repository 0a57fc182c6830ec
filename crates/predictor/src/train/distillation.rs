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
