//! Where experts are loaded from. A node loads from its model's [`ExpertStore`]; tests bring sources of their own, to
//! make loads slow or fail.

use sida_model::{ExpertShape, ExpertStore, ModelError};
use sida_routing::{Digest, ExpertKey, LayerId};

/// Experts of one model, outside of expert memory.
pub trait ExpertSource: Send + Sync {
    /// The shape of the largest: slots have room for it.
    fn shape(&self) -> &ExpertShape;
    /// The shape of those of a layer.
    fn shape_of(&self, _layer: LayerId) -> &ExpertShape {
        self.shape()
    }
    /// MoE layers of the model.
    fn layers(&self) -> usize;
    /// The model they are of.
    fn model(&self) -> Digest;
    /// Which experts of that model they are, where several are known that differ in them alone.
    fn experts(&self) -> Option<Digest> {
        None
    }
    /// Experts per layer.
    fn num_experts(&self) -> usize;
    /// Fills the beginning of `slot`, which has the bytes of the largest expert.
    fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError>;
}

impl ExpertSource for ExpertStore {
    fn shape(&self) -> &ExpertShape {
        ExpertStore::shape(self)
    }

    fn shape_of(&self, layer: LayerId) -> &ExpertShape {
        ExpertStore::shape_of(self, layer)
    }

    fn layers(&self) -> usize {
        self.config().moe_layer_count()
    }

    fn model(&self) -> Digest {
        self.digest()
    }

    fn experts(&self) -> Option<Digest> {
        Some(self.experts_digest())
    }

    fn num_experts(&self) -> usize {
        self.config().num_experts
    }

    fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        ExpertStore::load(self, key, slot)
    }
}
