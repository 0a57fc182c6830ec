//! What an expert-node does for a coordinator, as plain calls: the same seam whether the node lives in this
//! process ([`LocalExperts`], called directly) or behind a lane.

use std::{sync::Arc, time::Duration};

use sida_model::{ResidentExperts, RowsOnDevice};
use sida_routing::{ExpertKey, Group, LayerId, PlacedGroup, Plan, PlanId};
use thiserror::Error;

/// An expert call: rows for experts of one layer.
#[derive(Clone, Copy, Debug)]
pub struct ExpertCall<'a> {
    /// Which MoE layer.
    pub layer: LayerId,
    /// Consecutive rows by expert.
    pub groups: &'a [Group],
    /// The rows, (sum of rows, d_model).
    pub activations: &'a [f32],
}

/// What a call cost on its node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CallReport {
    /// Experts of the call that were resident.
    pub hits: u32,
    /// Experts that had to be loaded first.
    pub demand_loads: u32,
    /// Time spent waiting for loads.
    pub load: Duration,
    /// Time spent computing.
    pub compute: Duration,
}

/// Why an expert-node could not answer a call.
#[derive(Clone, Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum CallError {
    #[error("malformed call: {0}")]
    Malformed(String),
    #[error("cannot load {key}: {reason}")]
    Load { key: ExpertKey, reason: String },
    #[error("cannot compute: {reason}")]
    Device { reason: String },
    #[error("the node is shutting down")]
    ShuttingDown,
}

/// What a node holds and has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResidencyReport {
    /// Bytes of resident experts. Never above `budget_bytes`.
    pub resident_bytes: u64,
    /// Bytes that the node may hold.
    pub budget_bytes: u64,
    /// Slots of one expert each.
    pub slots: u64,
    /// Loads that a call waited for.
    pub demand_loads: u64,
    /// Loads ahead of their use.
    pub prefetch_loads: u64,
    /// Experts dropped for another.
    pub evictions: u64,
    /// Rows computed.
    pub rows: u64,
    /// Resident experts, ascending.
    pub resident: Vec<ExpertKey>,
}

/// An expert-node in this process. Calls block; hints do not.
pub trait LocalExperts: Send + Sync {
    /// Takes a hint.
    fn plan(&self, plan: Plan);
    /// Forgets a hint: its batch is done.
    fn release(&self, plan: PlanId);
    /// Computes the rows of one layer into `out`, (sum of rows, d_model), in the order of the call.
    fn compute(&self, call: ExpertCall<'_>, out: &mut [f32]) -> Result<CallReport, CallError>;
    /// Starts computing these of the rows of a layer, which are grouped on a device, if the experts are on it, too.
    /// `None`: they are not. Waits for loads and not for the results.
    fn compute_beside(
        &self,
        _layer: LayerId,
        _groups: &[PlacedGroup],
        _rows: &RowsOnDevice<'_>,
    ) -> Option<Result<CallReport, CallError>> {
        None
    }
    /// The node's experts, for passes on the device where `rows` are, if they are there, too.
    fn resident_beside(&self, _rows: &RowsOnDevice<'_>) -> Option<Arc<dyn ResidentExperts>> {
        None
    }
    /// How many experts are resident.
    fn resident_count(&self) -> usize;
    /// Whether hints let it compute sooner: not where hardly any expert had to be loaded of late, or each was quickly.
    fn gains_by_plans(&self) -> bool;
    /// What the node holds now.
    fn residency(&self) -> ResidencyReport;
}
