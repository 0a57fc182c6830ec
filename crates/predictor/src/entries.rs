//! From what a net says of each token to a hash table per sequence.

use std::ops::Range;

use sida_kernels::norm::softmax;
use sida_routing::{Digest, ExpertId, HashTable, LayerId, hash_table::Shape};

use crate::{PredictorError, calibration::Calibration};

/// What tables are made for: one stack of one model by one predictor.
#[derive(Clone, Debug)]
pub(crate) struct Entries<'a> {
    pub(crate) model: Digest,
    pub(crate) predictor: Digest,
    pub(crate) layers: Range<u16>,
    pub(crate) num_experts: usize,
    pub(crate) top_k: usize,
    /// Of alphas, and of chances: one per layer, in order.
    pub(crate) calibrations: [&'a [Calibration]; 2],
}

impl Entries<'_> {
    /// One table per sequence. `entry(row, layer)` gives the experts of one token and the net's probabilities in the n-th MoE
    /// layer of the stack; rows are the sequences' tokens one after another.
    pub(crate) fn tables<'a>(
        &self,
        lengths: impl Iterator<Item = usize>,
        entry: impl Fn(usize, usize) -> (&'a [ExpertId], &'a [f32]),
    ) -> Result<Vec<HashTable>, PredictorError> {
        let layers = self.layers.len();
        let mut first = 0;
        lengths
            .map(|tokens| {
                let mut experts = Vec::with_capacity(layers * tokens * self.top_k);
                let mut alphas = Vec::with_capacity(layers * tokens * self.top_k);
                let mut chances = Vec::with_capacity(layers * tokens * self.top_k);
                let [of_alphas, of_chances] = self.calibrations;
                for (layer, (of_alphas, of_chances)) in of_alphas.iter().zip(of_chances).enumerate() {
                    for row in first..first + tokens {
                        let (e, predicted) = entry(row, layer);
                        experts.extend_from_slice(e);
                        alphas.extend(predicted.iter().map(|&predicted| of_alphas.at(predicted)));
                        chances.extend(predicted.iter().map(|&predicted| of_chances.at(predicted)));
                    }
                }
                first += tokens;
                let shape = Shape { first_layer: LayerId(self.layers.start), layers, tokens, top_k: self.top_k };
                let table = HashTable::new(self.model, self.predictor, shape, self.num_experts, experts, alphas)?;
                Ok(table.with_chances(chances)?)
            })
            .collect()
    }

    /// One table per sequence from logits (rows, layers, experts), which become probabilities in place.
    pub(crate) fn tables_from_logits(
        &self,
        lengths: impl Iterator<Item = usize>,
        mut logits: Vec<f32>,
    ) -> Result<Vec<HashTable>, PredictorError> {
        let (layers, k) = (self.layers.len(), self.top_k);
        softmax(&mut logits, self.num_experts);
        let mut experts = vec![ExpertId(0); logits.len() / self.num_experts * k];
        let mut alphas = vec![0.0; experts.len()];
        for ((row, experts), alphas) in
            logits.chunks_exact(self.num_experts).zip(experts.chunks_exact_mut(k)).zip(alphas.chunks_exact_mut(k))
        {
            top_k(row, experts, alphas);
        }
        self.tables(lengths, |row, layer| {
            let start = (row * layers + layer) * k;
            (&experts[start..start + k], &alphas[start..start + k])
        })
    }
}

/// The largest of `probabilities`, descending; of equal ones the lower id first.
pub fn top_k(probabilities: &[f32], experts: &mut [ExpertId], alphas: &mut [f32]) {
    let k = experts.len();
    let mut filled = 0;
    for (expert, &probability) in probabilities.iter().enumerate() {
        if filled == k && probability <= alphas[k - 1] {
            continue;
        }
        let at = alphas[..filled].partition_point(|&alpha| alpha >= probability);
        filled = (filled + 1).min(k);
        experts[at..filled].rotate_right(1);
        alphas[at..filled].rotate_right(1);
        (experts[at], alphas[at]) = (ExpertId(expert as u16), probability);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The likeliest experts would not be those that are loaded first.
    #[test]
    fn top_k_is_descending_with_the_lower_id_first() {
        let mut experts = [ExpertId(9); 3];
        let mut alphas = [9.0; 3];
        top_k(&[0.1, 0.3, 0.05, 0.3, 0.25], &mut experts, &mut alphas);
        assert_eq!((experts, alphas), ([ExpertId(1), ExpertId(3), ExpertId(4)], [0.3, 0.3, 0.25]));
        top_k(&[0.0, 0.0, 0.0], &mut experts, &mut alphas);
        assert_eq!((experts, alphas), ([ExpertId(0), ExpertId(1), ExpertId(2)], [0.0; 3]));
    }

    /// Alphas would not be probabilities, or a table would mix up layers and tokens.
    #[test]
    fn tables_hold_probabilities_by_layer_and_token() {
        let digest = Digest([0; 32]);
        let calibration = [3, 4].map(|layer| Calibration::none(LayerId(layer)));
        let entries = Entries {
            model: digest,
            predictor: digest,
            layers: 3..5,
            num_experts: 2,
            top_k: 1,
            calibrations: [&calibration; 2],
        };
        // Three tokens in sequences of 1 and 2; token r prefers expert (r + layer) mod 2.
        let logits: Vec<f32> = (0..12).map(|i| if (i / 4 + i / 2 % 2) % 2 == i % 2 { 2.0 } else { -1.0 }).collect();
        let tables = entries.tables_from_logits([1, 2].into_iter(), logits).unwrap();
        assert_eq!(tables.iter().map(|table| table.shape().tokens).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(tables[0].experts(LayerId(4), 0), [ExpertId(1)]);
        assert_eq!(tables[1].experts(LayerId(3), 0), [ExpertId(1)]);
        assert_eq!(tables[1].experts(LayerId(4), 1), [ExpertId(1)]);
        let expected = 1.0 / (1.0 + (-3.0f32).exp());
        assert!((tables[1].alphas(LayerId(3), 1)[0] - expected).abs() < 1e-6);
    }
}
