//! Where experts are loaded from. A node loads from its model's [`ExpertStore`]; tests bring sources of their own, to
//! make loads slow or fail.

use sida_model::{ExpertShape, ExpertStore, ModelError};
use sida_routing::{Digest, ExpertKey};

/// Experts of one model, outside of expert memory.
pub trait ExpertSource: Send + Sync {
    /// The shape all of them share.
    fn shape(&self) -> &ExpertShape;
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
    /// Fills `slot`, which has the bytes of one expert.
    fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError>;
}

impl ExpertSource for ExpertStore {
    fn shape(&self) -> &ExpertShape {
        ExpertStore::shape(self)
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
