//! What goes in and out of [`super::Residency`]: slots, orders to load, and experts granted to a call.

use std::fmt;

use thiserror::Error;

use crate::ExpertKey;

/// One of the equal places in expert memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl SlotId {
    /// Its index, from 0.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the machine is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidencyConfig {
    /// Places for one expert each. At least 1; with one, a prefetch and a call wait for each other.
    pub slots: usize,
    /// MoE layers of the model.
    pub layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Plans queued at most; beyond it the last is dropped.
    pub plans_max: usize,
}

/// Why a call or a plan is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ResidencyError {
    #[error("{key} does not exist: the model has {layers} MoE layers of {num_experts} experts")]
    UnknownExpert { key: ExpertKey, layers: usize, num_experts: usize },
    #[error("{key} is named twice")]
    Repeated { key: ExpertKey },
}

/// Why something is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadKind {
    /// A call waits for it.
    Demand,
    /// A plan names it.
    Prefetch,
}

/// An order to load an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What to load.
    pub key: ExpertKey,
    /// Where to. Nobody else touches the slot until [`super::Residency::loaded`] or [`super::Residency::load_failed`].
    pub slot: SlotId,
    /// Who left for it.
    pub evicted: Option<ExpertKey>,
}

/// A load that somebody else is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(super) slot: SlotId,
    pub(super) load: u64,
}

/// What became of the load behind a [`Ticket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// Not done.
    Loading,
    /// Resident and pinned for whoever holds the ticket.
    Loaded,
    /// Not resident, and not pinned: hand the expert to [`super::Residency::again`].
    Failed,
}

/// An expert given to a call. It is pinned until [`super::Residency::unpin`], whichever way it is come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The position of the expert in the call.
    pub group: usize,
    /// Which expert.
    pub key: ExpertKey,
    /// Where it is or will be.
    pub slot: SlotId,
    /// What is to be done before it can be used.
    pub access: Access,
}

/// How a granted expert is come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is there.
    Resident,
    /// The call must load it, in the place of `evicted`.
    Load {
        /// Who left for it.
        evicted: Option<ExpertKey>,
    },
    /// Somebody else is loading it: ask [`super::Residency::awaited`]. Do one's own loads before waiting.
    Await(Ticket),
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidencyCounters {
    /// Loads that a call waited for.
    pub demand_loads: u64,
    /// Loads ahead of their use.
    pub prefetch_loads: u64,
    /// Loads that failed.
    pub failed_loads: u64,
    /// Experts dropped for another.
    pub evictions: u64,
}
