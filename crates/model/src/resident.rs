//! Experts that are resident on the device where a pass runs, in the same process. They let the pass go on through MoE
//! layers by itself: it stops only where a router chose an expert that is not there.
//!
//! Implemented by an expert-node, used by a GPU's pass. Known to every build; only a build with the cargo feature `cuda` has
//! slots to name.

use std::{ops::Range, sync::Arc};

use sida_routing::{Group, LayerId};

use crate::ExpertDevice;

/// The experts of one expert-node on one device, as a pass sees them.
///
/// A pass cannot be told that an expert left while it runs. So it holds the layers that it goes through; who decides about
/// slots evicts nothing of them until the next [`ResidentExperts::hold`].
pub trait ResidentExperts: Send + Sync {
    /// Holds the experts of `layers`, and no others any more. Returns where every expert of the model is, unless nothing
    /// changed since `seen` (a version returned before).
    fn hold(&self, layers: Range<u16>, seen: Option<u64>) -> Option<Residents>;
    /// Holds nothing any more.
    fn release(&self);
    /// A pass is through an MoE layer whose rows went to these experts, each named once.
    fn used(&self, layer: LayerId, groups: &[Group]);
    /// Where their slots are.
    fn slots(&self) -> &DeviceSlots;
}

/// Who is where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residents {
    /// Names this state of things.
    pub version: u64,
    /// (MoE layers, experts): the slot of each expert, -1 where it is not resident.
    pub slots: Vec<i32>,
    /// Whether every expert is resident. Then none ever leaves, since there is a slot for each.
    pub is_complete: bool,
}

/// The slots of an [`ExpertDevice`], which live as long as this does.
#[derive(Clone)]
pub struct DeviceSlots {
    #[cfg(feature = "cuda")]
    pub(crate) slots: crate::cuda::Slots,
    /// What the slots are memory of.
    _device: Arc<dyn ExpertDevice>,
}

impl DeviceSlots {
    #[cfg(feature = "cuda")]
    pub(crate) fn new(slots: crate::cuda::Slots, device: Arc<dyn ExpertDevice>) -> Self {
        Self { slots, _device: device }
    }
}

impl std::fmt::Debug for DeviceSlots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceSlots").finish_non_exhaustive()
    }
}
