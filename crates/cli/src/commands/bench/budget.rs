//! A budget beside the experts that the measured method uses. Flags give budgets as shares of all experts, since a cluster
//! serves every method; but an encoding never uses the decoder's. Made by `bench`, printed by [`super::report`].

use std::fmt;

use serde::Serialize;

use super::workload::Method;
use crate::{byte_size, coordinator_client::ModelFacts};

/// What the expert-nodes of a subject may hold, of what the method uses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Budget {
    /// Memory for experts, over all nodes.
    pub(crate) bytes: u64,
    /// So many of the used experts fit at once. Packed ones are more than their share of bytes.
    pub(crate) experts: u64,
    /// Experts that the method uses.
    pub(crate) used_experts: u64,
    /// Their bytes, as the model stores them.
    pub(crate) used_bytes: u64,
    /// Of those bytes, the share that there is memory for: at most 1.
    pub(crate) share: f64,
}

impl Budget {
    /// `bytes` in `slots` of an expert each, for a method of `model`.
    pub(crate) fn of(method: Method, model: &ModelFacts, bytes: u64, slots: u64) -> Self {
        let layers = match method {
            // Without an encoder the decoder makes the states.
            Method::Encode if model.encoder_moe_layers > 0 => model.encoder_moe_layers,
            Method::Encode => model.moe_layers,
            Method::Generate | Method::Chat | Method::Score => model.moe_layers,
        } as u64;
        let used_experts = layers * model.num_experts as u64;
        let used_bytes = model.experts_bytes / (model.moe_layers as u64).max(1) * layers;
        let share = if used_bytes > 0 { (bytes as f64 / used_bytes as f64).min(1.0) } else { 1.0 };
        Self { bytes, experts: slots.min(used_experts), used_experts, used_bytes, share }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, experts, used_experts, share, .. } = *self;
        write!(f, "{}, {:.0}% ({experts} of {used_experts})", byte_size::shown(bytes), 100.0 * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoding_uses_the_encoders_experts() {
        // Broken: 20% of all experts, which is 40% of those that an encoding can use, would be told as 20%.
        let experts_bytes = 1536 << 20;
        let model =
            ModelFacts { name: "m".into(), moe_layers: 12, encoder_moe_layers: 6, num_experts: 128, experts_bytes };
        let told = |method, bytes, slots| Budget::of(method, &model, bytes, slots).to_string();
        assert_eq!(told(Method::Encode, experts_bytes / 5, 307), "307.2 MiB, 40% (307 of 768)");
        assert_eq!(told(Method::Generate, experts_bytes / 5, 307), "307.2 MiB, 20% (307 of 1536)");
        assert_eq!(told(Method::Score, experts_bytes / 5, 409), "307.2 MiB, 20% (409 of 1536)");
        assert_eq!(told(Method::Encode, experts_bytes, 1536), "1.5 GiB, 100% (768 of 768)");
        let dense = ModelFacts { moe_layers: 0, encoder_moe_layers: 0, experts_bytes: 0, ..model.clone() };
        assert_eq!(Budget::of(Method::Encode, &dense, 1024, 2).to_string(), "1.0 KiB, 100% (0 of 0)");
    }
}
