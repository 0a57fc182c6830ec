//! A linear layer in training.

use candle_core::{Result, Tensor, Var};

/// `x W + b`, or several of them at once.
pub(super) struct Linear {
    /// (.., inputs, outputs)
    pub(super) weights: Var,
    /// (.., 1, outputs)
    pub(super) bias: Var,
}

impl Linear {
    /// x (.., n, inputs) -> (.., n, outputs).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weights)?.broadcast_add(&self.bias)
    }
}
