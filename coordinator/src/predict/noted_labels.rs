//! What the routers choose for one prompt, noted layer by layer while it is encoded, for predictor-nodes that learn.

use std::ops::Range;

use sida_predictor::entries::top_k;
use sida_routing::{ExpertId, Labels, LabelsExtent, LayerId};

/// Experts that are kept of each token and layer, as many as `sida train-predictor` keeps.
const KEPT: usize = 8;

/// Bytes of what is told of a token, of a stack of so many MoE layers.
pub(crate) fn token_bytes(layers: usize, num_experts: usize) -> usize {
    size_of::<u32>() + layers * KEPT.min(num_experts) * (size_of::<u16>() + size_of::<f32>())
}

/// The layers so far.
pub(crate) struct NotedLabels {
    num_experts: usize,
    /// The encoder's MoE layers.
    layers: Range<u16>,
    /// Of each of the layers that was noted: (rows, kept).
    noted: Vec<(Vec<ExpertId>, Vec<f32>)>,
}

impl NotedLabels {
    pub(crate) fn new(layers: Range<u16>, num_experts: usize) -> Self {
        Self { num_experts, noted: Vec::with_capacity(layers.len()), layers }
    }

    /// Notes the router's `probabilities` (rows, experts) at a layer.
    pub(crate) fn note(&mut self, layer: LayerId, probabilities: &[f32]) {
        // Layers come in order, or what was noted is of no use and never becomes labels.
        if usize::from(layer.0) == usize::from(self.layers.start) + self.noted.len() {
            let (rows, kept) = (probabilities.chunks_exact(self.num_experts), KEPT.min(self.num_experts));
            let mut experts = vec![ExpertId(0); rows.len() * kept];
            let mut likeliest = vec![0.0; experts.len()];
            let entries = experts.chunks_exact_mut(kept).zip(likeliest.chunks_exact_mut(kept));
            rows.zip(entries).for_each(|(row, (experts, likeliest))| top_k(row, experts, likeliest));
            self.noted.push((experts, likeliest));
        }
    }

    /// The labels of these tokens; `None` where a pass went through a layer without asking here, or a router gave what is no
    /// probability.
    pub(crate) fn of(self, tokens: &[u32]) -> Option<Labels> {
        let Self { num_experts, layers, noted } = self;
        let (layers, kept) = (layers.len(), KEPT.min(num_experts));
        if noted.len() != layers {
            return None;
        }
        let entries = (0..tokens.len()).flat_map(|token| noted.iter().map(move |noted| (token, noted)));
        let (mut experts, mut probabilities) = (Vec::new(), Vec::new());
        for (token, (of_experts, of_probabilities)) in entries {
            let entry = token * kept..(token + 1) * kept;
            experts.extend_from_slice(of_experts.get(entry.clone())?);
            probabilities.extend_from_slice(of_probabilities.get(entry)?);
        }
        Labels::new(tokens.to_vec(), LabelsExtent { layers, num_experts, kept }, experts, probabilities).ok()
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

    /// Half of a prompt's layers, or what a broken model gives, would be learnt.
    #[test]
    fn what_is_not_whole_is_nothing() {
        let mut half = NotedLabels::new(0..2, 2);
        half.note(LayerId(1), &[0.75, 0.25]);
        half.note(LayerId(0), &[0.75, 0.25]);
        assert_eq!(half.of(&[8]), None);
        let mut broken = NotedLabels::new(0..1, 2);
        broken.note(LayerId(0), &[f32::NAN, f32::NAN]);
        assert_eq!(broken.of(&[8]), None);
    }
}
