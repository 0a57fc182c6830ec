//! The hash table of SiDA (section 3.1): for each MoE layer and token, the k experts that the predictor
//! holds most likely, with the router probability it predicts for each. Made by a predictor, read by
//! `Plan` (what to preload) and, in `hash` mode, by `Routes` (where the rows go).

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
    /// (layers, tokens, top_k), most likely first.
    /// Invariant: as long as `alphas`, and every id is below the model's number of experts.
    experts: Vec<ExpertId>,
    /// (layers, tokens, top_k), each in [0, 1].
    alphas: Vec<f32>,
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
        Ok(Self { model, predictor, first_layer: first_layer.0, layers, tokens, top_k, experts, alphas })
    }

    /// Its extent.
    pub fn shape(&self) -> Shape {
        Shape { first_layer: LayerId(self.first_layer), layers: self.layers, tokens: self.tokens, top_k: self.top_k }
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

    /// Every expert of the table as stored: `(layers, tokens, top_k)`.
    pub fn all_experts(&self) -> &[ExpertId] {
        &self.experts
    }

    /// Every alpha of the table as stored: `(layers, tokens, top_k)`.
    pub fn all_alphas(&self) -> &[f32] {
        &self.alphas
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
