//! `ResidencyResponse` <-> [`Residency`]. Sent by expert-nodes, read by coordinators and shown by `sida status`.

use std::collections::BTreeMap;

use sida_routing::{Digest, ExpertKey, NodeId};

use super::{Bounds, WireError, digest, within};
use crate::v1;

/// The longest name of a node.
pub const NODE_NAME_BYTES_MAX: usize = 260;

/// What a node holds and has done. Field by field that of `sida_cluster::experts::ResidencyReport`, whose crate
/// this one does not know, with the names of node and model.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Residency {
    pub node: NodeId,
    pub model: Digest,
    /// Which experts of it they are, if that is known.
    pub experts: Option<Digest>,
    pub resident_bytes: u64,
    pub budget_bytes: u64,
    pub slots: u64,
    pub demand_loads: u64,
    pub prefetch_loads: u64,
    pub evictions: u64,
    pub rows: u64,
    /// Resident experts, ascending, each once.
    pub resident: Vec<ExpertKey>,
}

impl v1::ResidencyResponse {
    /// The report, if it speaks of a model of these bounds.
    pub fn check(self, bounds: &Bounds) -> Result<Residency, WireError> {
        within("ResidencyResponse.node (bytes)", self.node.len(), 1, NODE_NAME_BYTES_MAX)?;
        within("ResidencyResponse.layers", self.layers.len(), 0, bounds.moe_layers)?;
        let mut resident = Vec::new();
        for v1::ResidentExperts { layer, experts } in self.layers {
            within("ResidentExperts.experts (their number)", experts.len(), 0, bounds.num_experts)?;
            for expert in experts {
                resident.push(bounds.key(("ResidentExperts.layer", "ResidentExperts.experts"), layer, expert)?);
            }
        }
        resident.sort_unstable();
        resident.dedup();
        Ok(Residency {
            node: self.node.into(),
            model: digest("ResidencyResponse.model_digest", &self.model_digest)?,
            experts: match self.experts_digest.is_empty() {
                true => None,
                false => Some(digest("ResidencyResponse.experts_digest", &self.experts_digest)?),
            },
            resident_bytes: self.resident_bytes,
            budget_bytes: self.budget_bytes,
            slots: self.slots,
            demand_loads: self.demand_loads,
            prefetch_loads: self.prefetch_loads,
            evictions: self.evictions,
            rows: self.rows,
            resident,
        })
    }
}

impl From<&Residency> for v1::ResidencyResponse {
    fn from(residency: &Residency) -> Self {
        let mut layers: BTreeMap<u16, Vec<u32>> = BTreeMap::new();
        for key in &residency.resident {
            layers.entry(key.layer.0).or_default().push(key.expert.0.into());
        }
        Self {
            node: residency.node.to_string(),
            model_digest: residency.model.0.to_vec().into(),
            experts_digest: residency.experts.map(|digest| digest.0.to_vec().into()).unwrap_or_default(),
            resident_bytes: residency.resident_bytes,
            budget_bytes: residency.budget_bytes,
            slots: residency.slots,
            demand_loads: residency.demand_loads,
            prefetch_loads: residency.prefetch_loads,
            evictions: residency.evictions,
            rows: residency.rows,
            layers: layers
                .into_iter()
                .map(|(layer, experts)| v1::ResidentExperts { layer: layer.into(), experts })
                .collect(),
        }
    }
}
