//! The feed-forward of a block, where a model is cut: dense ones are computed here, MoE layers stop at the
//! gate, and whoever runs the model sends the rows to the experts and adds what comes back.

use candle_core::Tensor;
use sida_routing::{LayerId, Routes};

use crate::{
    ModelError, RouterKind, Stack,
    elementwise::{add_to, relu},
    linear::Linear,
    loader::Loader,
    names,
    norm::Norm,
    pieces,
    router::{self, Router},
    tensor_rows::{from_rows, rows},
};

/// What a block does after attention.
#[derive(Debug)]
pub enum FeedForward {
    /// The same matrices for every token.
    Dense(DenseFeedForward),
    /// Experts, chosen per token.
    Moe(MoeGate),
}

impl FeedForward {
    /// Loads a block's. `layer` is its id if it is sparse.
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        stack: Stack,
        block: usize,
        layer: Option<LayerId>,
    ) -> Result<Self, ModelError> {
        let norm = loader.norm(&names::feed_forward_norm(stack, block))?;
        let config = loader.checkpoint.config();
        let (d_model, d_ff, num_experts, kind) = (config.d_model, config.d_ff, config.num_experts, config.router);
        Ok(match layer {
            None => Self::Dense(DenseFeedForward {
                norm,
                wi: loader.linear(&names::dense(stack, block, "wi"), d_ff, d_model)?,
                wo: loader.linear(&names::dense(stack, block, "wo"), d_model, d_ff)?,
            }),
            Some(id) => Self::Moe(MoeGate { id, norm, router: Router::load(loader, stack, block)?, kind, num_experts }),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.wi.bytes() + dense.wo.bytes(),
            Self::Moe(gate) => gate.router.bytes(),
        }
    }
}

/// A feed-forward without experts.
#[derive(Debug)]
pub struct DenseFeedForward {
    norm: Norm,
    /// (d_ff, d_model)
    wi: Linear,
    /// (d_model, d_ff)
    wo: Linear,
}

impl DenseFeedForward {
    /// `h + relu(norm(h) Wi^T) Wo^T`: h (n, d_model) -> (n, d_model)
    pub fn forward(&self, h: &Tensor) -> Result<Tensor, ModelError> {
        let d_model = h.dim(1)?;
        let mut h = rows(h, <[f32]>::to_vec)?;
        pieces::by_row(&mut h, d_model, |h| self.apply(h));
        Ok(from_rows(h, d_model)?)
    }

    /// As [`DenseFeedForward::forward`], in place and by the calling thread as far as products do not split themselves.
    pub(crate) fn apply(&self, h: &mut [f32]) {
        let mut hidden = self.wi.product(&self.norm.apply(h)); // (n, d_ff)
        relu(&mut hidden);
        add_to(h, &self.wo.product(&hidden));
    }
}

/// The backbone's side of an MoE layer: what goes to the experts, and where. The layer's output is
/// `h + sum of weight * expert(normed(h))` over a token's routes; that sum is the caller's.
#[derive(Debug)]
pub struct MoeGate {
    id: LayerId,
    norm: Norm,
    router: Router,
    kind: RouterKind,
    num_experts: usize,
}

impl MoeGate {
    /// Which MoE layer it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// What the router and the experts see: h (n, d_model) -> x (n, d_model)
    pub fn normed(&self, h: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.norm.forward(h)?)
    }

    /// The router's probabilities of normed x (n, d_model): (n, experts), row-major, float32.
    pub fn probabilities(&self, x: &Tensor) -> Result<Vec<f32>, ModelError> {
        self.router.probabilities(x)
    }

    /// The router's choice for normed x. Enforces no capacity.
    pub fn route(&self, x: &Tensor) -> Result<Routes, ModelError> {
        Ok(router::routes(&self.kind, &self.probabilities(x)?, self.num_experts))
    }
}
