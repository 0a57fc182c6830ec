//! `HashTable` <-> [`sida_routing::HashTable`]. Sent by predictor-nodes, read by coordinators.

use sida_routing::{ExpertId, HashTable, hash_table::Shape};

use super::{Bounds, WireError, digest, length, rows, within};
use crate::v1;

/// Bytes of one expert id.
const ID_BYTES: usize = size_of::<u16>();

impl v1::HashTable {
    /// The table, if it fits a model of these bounds.
    pub fn check(self, bounds: &Bounds) -> Result<HashTable, WireError> {
        let first_layer = bounds.layer("HashTable.first_layer", self.first_layer)?;
        let layers_left = bounds.moe_layers - usize::from(first_layer.0);
        let layers = within("HashTable.layers", self.layers as usize, 1, layers_left)?;
        let tokens = within("HashTable.tokens", self.tokens as usize, 1, bounds.tokens_max)?;
        let top_k = within("HashTable.top_k", self.top_k as usize, 1, bounds.num_experts)?;
        // Each factor is bounded, but by bounds that a 32-bit product may exceed.
        let entries = layers.saturating_mul(tokens).saturating_mul(top_k);
        length("HashTable.experts", "bytes", self.experts.len(), entries.saturating_mul(ID_BYTES))?;
        length("HashTable.alphas", "bytes", self.alphas.len(), entries.saturating_mul(rows::VALUE_BYTES))?;
        if !self.chances.is_empty() {
            length("HashTable.chances", "bytes", self.chances.len(), entries.saturating_mul(rows::VALUE_BYTES))?;
        }
        let id = |bytes: &[u8]| ExpertId(u16::from_le_bytes([bytes[0], bytes[1]]));
        Ok(HashTable::new(
            digest("HashTable.model_digest", &self.model_digest)?,
            digest("HashTable.predictor_digest", &self.predictor_digest)?,
            Shape { first_layer, layers, tokens, top_k },
            bounds.num_experts,
            self.experts.chunks_exact(ID_BYTES).map(id).collect(),
            rows::from_payload(&self.alphas),
        )?
        .with_chances(rows::from_payload(&self.chances))?)
    }
}

impl From<&HashTable> for v1::HashTable {
    fn from(table: &HashTable) -> Self {
        let Shape { first_layer, layers, tokens, top_k } = table.shape();
        Self {
            model_digest: table.model.0.to_vec().into(),
            predictor_digest: table.predictor.0.to_vec().into(),
            first_layer: first_layer.0.into(),
            layers: layers as u32,
            tokens: tokens as u32,
            top_k: top_k as u32,
            experts: table.all_experts().iter().flat_map(|expert| expert.0.to_le_bytes()).collect(),
            alphas: rows::to_payload(table.all_alphas()),
            chances: rows::to_payload(table.all_chances()),
        }
    }
}
