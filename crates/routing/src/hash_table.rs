//! The hash table of SiDA (section 3.1): for each MoE layer and token, the k experts that the predictor
//! holds most likely, with the router probability it predicts for each, and how likely the router is to choose it. Made by
//! a predictor, read by `Plan` (what to preload) and, in `hash` mode, by `Routes` (where the rows go).

use std::ops::Range;

use thiserror::Error;

use crate::{Digest, ExpertId, LayerId};

/// Predicted experts of a run of tokens, for consecutive MoE layers of one stack.
#[derive(Clone, Debug, PartialEq)]
pub struct HashTable {
    /// The model it was predicted for.
    pub model: Digest,
    /// The predictor that made it.
    pub predictor: Digest,
    first_layer: u16,
    layers: usize,
    tokens: usize,
    top_k: usize,
    num_experts: usize,
    /// (layers, tokens, top_k), most likely first.
    /// Invariant: as long as `alphas`, and every id is below the model's number of experts.
    experts: Vec<ExpertId>,
    /// (layers, tokens, top_k), each in [0, 1].
    alphas: Vec<f32>,
    /// (layers, tokens, top_k), each in [0, 1]; empty where nothing is said of them.
    chances: Vec<f32>,
}

/// Why a hash table is refused.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum HashTableError {
    #[error(
        "hash table of {layers} layers x {tokens} tokens x top {top_k} needs {expected} entries, found {experts} experts and {alphas} alphas"
    )]
    Length { layers: usize, tokens: usize, top_k: usize, expected: usize, experts: usize, alphas: usize },
    #[error("hash table names expert {expert}, the model has {num_experts} per layer")]
    Expert { expert: u16, num_experts: usize },
    #[error("hash table holds alpha {alpha}, expected a probability in [0, 1]")]
    Alpha { alpha: f32 },
    #[error("hash table of {expected} entries has {found} chances, expected one each, or none")]
    Chances { expected: usize, found: usize },
    #[error("hash table holds chance {chance}, expected a probability in [0, 1]")]
    Chance { chance: f32 },
    #[error("hash table is for model {found}, this cluster serves {expected}")]
    Model { expected: Digest, found: Digest },
}

/// The extent of a hash table: layers x tokens x k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The first MoE layer it speaks of.
    pub first_layer: LayerId,
    /// How many consecutive MoE layers.
    pub layers: usize,
    /// How many tokens.
    pub tokens: usize,
    /// How many experts per token and layer, most likely first.
    pub top_k: usize,
}

impl HashTable {
    /// Builds a table from `(layers, tokens, top_k)` entries and checks every one of them.
    pub fn new(
        model: Digest,
        predictor: Digest,
        shape: Shape,
        num_experts: usize,
        experts: Vec<ExpertId>,
        alphas: Vec<f32>,
    ) -> Result<Self, HashTableError> {
        let Shape { first_layer, layers, tokens, top_k } = shape;
        let expected = layers.checked_mul(tokens).and_then(|n| n.checked_mul(top_k)).unwrap_or(usize::MAX);
        if experts.len() != expected || alphas.len() != expected {
            return Err(HashTableError::Length {
                layers,
                tokens,
                top_k,
                expected,
                experts: experts.len(),
                alphas: alphas.len(),
            });
        }
        if let Some(&ExpertId(expert)) = experts.iter().find(|e| usize::from(e.0) >= num_experts) {
            return Err(HashTableError::Expert { expert, num_experts });
        }
        if let Some(&alpha) = alphas.iter().find(|a| !(0.0..=1.0).contains(*a)) {
            return Err(HashTableError::Alpha { alpha });
        }
        let (first_layer, chances) = (first_layer.0, Vec::new());
        Ok(Self { model, predictor, first_layer, layers, tokens, top_k, num_experts, experts, alphas, chances })
    }

    /// The same, and how likely the router is to choose each expert that it names, `(layers, tokens, top_k)`; of none, nothing
    /// is said.
    pub fn with_chances(self, chances: Vec<f32>) -> Result<Self, HashTableError> {
        if !chances.is_empty() && chances.len() != self.experts.len() {
            return Err(HashTableError::Chances { expected: self.experts.len(), found: chances.len() });
        }
        match chances.iter().find(|chance| !(0.0..=1.0).contains(*chance)) {
            Some(&chance) => Err(HashTableError::Chance { chance }),
            None => Ok(Self { chances, ..self }),
        }
    }

    /// Its extent.
    pub fn shape(&self) -> Shape {
        Shape { first_layer: LayerId(self.first_layer), layers: self.layers, tokens: self.tokens, top_k: self.top_k }
    }

    /// Experts that each of its layers has.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The MoE layers it speaks of, in execution order.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> + use<> {
        (self.first_layer..self.first_layer + self.layers as u16).map(LayerId)
    }

    /// The k experts predicted for one token, most likely first.
    /// Panics if the table does not speak of this layer or token: the caller made the batch.
    pub fn experts(&self, layer: LayerId, token: usize) -> &[ExpertId] {
        &self.experts[self.entry(layer, token)]
    }

    /// The router probabilities predicted for [`HashTable::experts`], in the same order.
    pub fn alphas(&self, layer: LayerId, token: usize) -> &[f32] {
        &self.alphas[self.entry(layer, token)]
    }

    /// How likely the router is to choose each of [`HashTable::experts`], in the same order, where that is said. Their sum is how
    /// many of the token's choices are expected to be among them.
    pub fn chances(&self, layer: LayerId, token: usize) -> Option<&[f32]> {
        (!self.chances.is_empty()).then(|| &self.chances[self.entry(layer, token)])
    }

    /// What it says of its last `tokens` tokens, or of all where there are no more.
    #[must_use]
    pub fn last(self, tokens: usize) -> Self {
        let Some(before) = self.tokens.checked_sub(tokens).filter(|&before| before > 0) else { return self };
        let of_layers = 0..self.layers;
        let kept = of_layers.flat_map(|layer| {
            let first = (layer * self.tokens + before) * self.top_k;
            first..first + tokens * self.top_k
        });
        let kept: Vec<usize> = kept.collect();
        let of = |values: &[f32]| kept.iter().filter_map(|&entry| values.get(entry).copied()).collect();
        let (alphas, chances) = (of(&self.alphas), of(&self.chances));
        Self { tokens, experts: kept.iter().map(|&entry| self.experts[entry]).collect(), alphas, chances, ..self }
    }

    /// Every expert of the table as stored: `(layers, tokens, top_k)`.
    pub fn all_experts(&self) -> &[ExpertId] {
        &self.experts
    }

    /// Every alpha of the table as stored: `(layers, tokens, top_k)`.
    pub fn all_alphas(&self) -> &[f32] {
        &self.alphas
    }

    /// Every chance of the table as stored: `(layers, tokens, top_k)`, or none.
    pub fn all_chances(&self) -> &[f32] {
        &self.chances
    }

    /// Refuses a table that was predicted for another model.
    pub fn check_model(&self, expected: Digest) -> Result<(), HashTableError> {
        if self.model == expected { Ok(()) } else { Err(HashTableError::Model { expected, found: self.model }) }
    }

    fn entry(&self, layer: LayerId, token: usize) -> Range<usize> {
        let layer = usize::from(layer.0).checked_sub(usize::from(self.first_layer)).expect("layer of this table");
        assert!(
            layer < self.layers && token < self.tokens,
            "token {token} of layer {layer} is outside {:?}",
            self.shape()
        );
        let start = (layer * self.tokens + token) * self.top_k;
        start..start + self.top_k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { first_layer: LayerId(3), layers: 2, tokens: 2, top_k: 2 };

    fn table(experts: &[u16], alphas: &[f32]) -> Result<HashTable, HashTableError> {
        let experts = experts.iter().copied().map(ExpertId).collect();
        HashTable::new(Digest([1; 32]), Digest([2; 32]), SHAPE, 8, experts, alphas.to_vec())
    }

    /// A token would be sent where another token's prediction says.
    #[test]
    fn entries_are_found_by_layer_and_token() {
        let table = table(&[0, 1, 2, 3, 4, 5, 6, 7], &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).unwrap();
        assert_eq!(table.layers().collect::<Vec<_>>(), [LayerId(3), LayerId(4)]);
        assert_eq!(table.experts(LayerId(3), 1), [ExpertId(2), ExpertId(3)]);
        assert_eq!(table.experts(LayerId(4), 0), [ExpertId(4), ExpertId(5)]);
        assert_eq!(table.alphas(LayerId(4), 1), [0.6, 0.7]);
        assert_eq!(table.all_experts(), [0, 1, 2, 3, 4, 5, 6, 7].map(ExpertId));
        assert_eq!(table.all_alphas(), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
        assert_eq!(table.shape(), SHAPE);
    }

    /// Experts would be loaded, and predictions judged, for tokens that nobody computes.
    #[test]
    fn the_last_tokens_stay_what_they_were() {
        let table = table(&[0, 1, 2, 3, 4, 5, 6, 7], &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).unwrap();
        let table = table.with_chances([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2].to_vec()).unwrap();
        let last = table.clone().last(1);
        assert_eq!(last.shape(), Shape { tokens: 1, ..SHAPE });
        for layer in [3, 4].map(LayerId) {
            assert_eq!(last.experts(layer, 0), table.experts(layer, 1));
            assert_eq!(last.alphas(layer, 0), table.alphas(layer, 1));
            assert_eq!(last.chances(layer, 0), table.chances(layer, 1));
        }
        assert_eq!(table.clone().last(2), table);
        assert_eq!(table.clone().last(3), table);
        assert_eq!(table.last(0).all_experts(), []);
    }

    /// A batch that was put together wrongly would be sent where another layer's or token's prediction says.
    #[test]
    fn there_is_no_entry_outside() {
        let table = table(&[0; 8], &[0.5; 8]).unwrap();
        for (layer, token) in [(2, 0), (5, 0), (3, 2), (4, 2)] {
            let entry = std::panic::catch_unwind(|| table.experts(LayerId(layer), token).len());
            assert!(entry.is_err(), "layer {layer} token {token}");
        }
    }

    /// A malformed table from outside would be used, or bring a node down.
    #[test]
    fn malformed_tables_are_refused() {
        let fine = [0.5; 8];
        assert!(matches!(table(&[0; 7], &fine), Err(HashTableError::Length { expected: 8, experts: 7, .. })));
        assert!(matches!(table(&[0; 8], &fine[..3]), Err(HashTableError::Length { alphas: 3, .. })));
        let unknown = HashTableError::Expert { expert: 8, num_experts: 8 };
        assert_eq!(table(&[0, 1, 2, 3, 4, 5, 6, 8], &fine), Err(unknown));
        for alpha in [1.5, -0.1, f32::NAN, f32::INFINITY] {
            assert!(matches!(table(&[0; 8], &[alpha; 8]), Err(HashTableError::Alpha { .. })), "{alpha}");
        }
        let with_chances = |chances: &[f32]| table(&[0; 8], &fine).unwrap().with_chances(chances.to_vec());
        assert_eq!(with_chances(&[]).unwrap().chances(LayerId(3), 0), None);
        assert_eq!(with_chances(&[0.5; 7]), Err(HashTableError::Chances { expected: 8, found: 7 }));
        assert_eq!(with_chances(&[1.5; 8]), Err(HashTableError::Chance { chance: 1.5 }));
        assert!(with_chances(&[f32::NAN; 8]).is_err());
        let huge = Shape { layers: usize::MAX, tokens: 3, ..SHAPE };
        let refused = HashTable::new(Digest([1; 32]), Digest([2; 32]), huge, 8, vec![], vec![]);
        assert!(matches!(refused, Err(HashTableError::Length { .. })));
    }

    /// Another model's prediction would steer this one.
    #[test]
    fn a_table_for_another_model_is_refused() {
        let table = table(&[0; 8], &[0.5; 8]).unwrap();
        assert_eq!(table.check_model(Digest([1; 32])), Ok(()));
        assert!(matches!(table.check_model(Digest([9; 32])), Err(HashTableError::Model { .. })));
    }
}
