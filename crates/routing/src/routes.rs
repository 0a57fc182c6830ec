//! Where each row of an MoE layer goes and by how much its result is scaled: what a router, or the hash
//! table, decided for the tokens of a batch.

use crate::ExpertId;

/// The experts chosen for each token of one MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// Experts per token (Switch: 1).
    pub top_k: usize,
    /// (tokens, top_k). `None`: the token was dropped by expert capacity and gets nothing from this layer.
    pub experts: Vec<Option<ExpertId>>,
    /// (tokens, top_k): the factor of each expert's output.
    pub weights: Vec<f32>,
}

impl Routes {
    /// How many tokens it routes.
    pub fn tokens(&self) -> usize {
        self.experts.len() / self.top_k
    }
}
