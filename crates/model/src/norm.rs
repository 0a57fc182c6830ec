//! The norm before every attention and feed-forward, and after each stack.

use candle_core::{Result, Tensor};

use crate::{
    cpu::norm::rms_norm,
    tensor_rows::{from_rows, rows},
};

/// A T5 norm: `w * x / sqrt(mean(x^2) + epsilon)`, in float32 whatever the weights are stored in.
#[derive(Debug)]
pub struct Norm {
    /// (d)
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    /// A norm of rows as wide as `weight`.
    pub fn new(weight: Vec<f32>, epsilon: f32) -> Self {
        Self { weight, epsilon }
    }

    /// x (n, d) -> (n, d)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        from_rows(rows(x, |x| self.apply(x))?, self.weight.len())
    }

    /// As [`Norm::forward`], of plain rows.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        rms_norm(x, &self.weight, self.epsilon, &mut y);
        y
    }
}
