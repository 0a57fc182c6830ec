//! What the routers choose for one prompt, noted layer by layer while it is read, for predictor-nodes that learn. A decoder may read
//! it in several passes, some of its tokens in each.

use std::ops::Range;

use sida_predictor::entries::top_k;
use sida_routing::{ExpertId, Labels, LabelsExtent, LayerId};

/// Experts that are kept of each token and layer, as many as `sida train-predictor` keeps.
const KEPT: usize = 8;

/// Bytes of what is told of a token, of a stack of so many MoE layers.
pub(crate) fn token_bytes(layers: usize, num_experts: usize) -> usize {
    size_of::<u32>() + layers * KEPT.min(num_experts) * (size_of::<u16>() + size_of::<f32>())
}

/// What was noted so far.
pub(crate) struct NotedLabels {
    num_experts: usize,
    /// The MoE layers of the stack that reads prompts.
    layers: Range<u16>,
    /// Of each of these: (rows, kept).
    noted: Vec<(Vec<ExpertId>, Vec<f32>)>,
}

impl NotedLabels {
    pub(crate) fn new(layers: Range<u16>, num_experts: usize) -> Self {
        Self { num_experts, noted: vec![Default::default(); layers.len()], layers }
    }

    /// Notes the router's `probabilities` (rows, experts) at a layer, for the tokens behind those that were noted there before.
    pub(crate) fn note(&mut self, layer: LayerId, probabilities: &[f32]) {
        let (rows, kept) = (probabilities.chunks_exact(self.num_experts), KEPT.min(self.num_experts));
        let noted = layer.0.checked_sub(self.layers.start).and_then(|at| self.noted.get_mut(usize::from(at)));
        let Some((experts, likeliest)) = noted else { return };
        let before = experts.len();
        experts.resize(before + rows.len() * kept, ExpertId(0));
        likeliest.resize(experts.len(), 0.0);
        let entries = experts[before..].chunks_exact_mut(kept).zip(likeliest[before..].chunks_exact_mut(kept));
        rows.zip(entries).for_each(|(row, (experts, likeliest))| top_k(row, experts, likeliest));
    }

    /// The labels of these tokens; `None` where a pass went through a layer without asking here, or through one twice, or a router
    /// gave what is no probability.
    pub(crate) fn of(self, tokens: &[u32]) -> Option<Labels> {
        let Self { num_experts, layers, noted } = self;
        let kept = KEPT.min(num_experts);
        if noted.iter().any(|(experts, _)| experts.len() != tokens.len() * kept) {
            return None;
        }
        let (mut experts, mut probabilities) = (Vec::new(), Vec::new());
        for token in 0..tokens.len() {
            let entry = token * kept..(token + 1) * kept;
            for (of_experts, of_probabilities) in &noted {
                experts.extend_from_slice(&of_experts[entry.clone()]);
                probabilities.extend_from_slice(&of_probabilities[entry.clone()]);
            }
        }
        Labels::new(tokens.to_vec(), LabelsExtent { layers: layers.len(), num_experts, kept }, experts, probabilities)
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A net would learn another token's experts, or another layer's.
    #[test]
    fn labels_are_by_token_and_layer() {
        let mut noted = NotedLabels::new(2..4, 2);
        noted.note(LayerId(2), &[0.75, 0.25, 0.125, 0.875]);
        noted.note(LayerId(3), &[0.5, 0.5, 0.25, 0.75]);
        let labels = noted.of(&[8, 9]).unwrap();
        let experts: Vec<u16> = labels.experts().iter().map(|expert| expert.0).collect();
        assert_eq!((labels.tokens(), &experts[..]), (&[8, 9][..], &[0, 1, 0, 1, 1, 0, 1, 0][..]));
        assert_eq!(labels.probabilities(), [0.75, 0.25, 0.5, 0.5, 0.875, 0.125, 0.75, 0.25]);
    }

    /// A long prompt would never be learnt from, or a token by another one's experts.
    #[test]
    fn a_prompt_may_come_in_parts() {
        let mut noted = NotedLabels::new(0..2, 2);
        for row in [[0.75, 0.25], [0.125, 0.875]] {
            (0..2).for_each(|layer| noted.note(LayerId(layer), &row));
        }
        let labels = noted.of(&[8, 9]).unwrap();
        assert_eq!(labels.probabilities(), [0.75, 0.25, 0.75, 0.25, 0.875, 0.125, 0.875, 0.125]);
    }

    /// Half of a prompt's layers, or what a broken model gives, would be learnt.
    #[test]
    fn what_is_not_whole_is_nothing() {
        let mut half = NotedLabels::new(0..2, 2);
        half.note(LayerId(1), &[0.75, 0.25]);
        // Of another stack.
        half.note(LayerId(2), &[0.75, 0.25]);
        assert_eq!(half.of(&[8]), None);
        let mut twice = NotedLabels::new(0..1, 2);
        (0..2).for_each(|_| twice.note(LayerId(0), &[0.75, 0.25]));
        assert_eq!(twice.of(&[8]), None);
        let mut broken = NotedLabels::new(0..1, 2);
        broken.note(LayerId(0), &[f32::NAN, f32::NAN]);
        assert_eq!(broken.of(&[8]), None);
    }
}
