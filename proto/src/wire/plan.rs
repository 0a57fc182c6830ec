//! `Plan` and `Release` <-> [`sida_routing::Plan`] and [`PlanId`]. Sent by coordinators, read by expert-nodes.

use sida_routing::{Plan, PlanId};

use super::{Bounds, WireError, length, within};
use crate::v1;

impl v1::Plan {
    /// The plan, if the model has its experts and none is named twice.
    pub fn check(self, bounds: &Bounds) -> Result<Plan, WireError> {
        length("Plan.experts", "experts", self.experts.len(), self.layers.len())?;
        let experts_of_model = bounds.moe_layers.saturating_mul(bounds.num_experts);
        within("Plan.experts (their number)", self.experts.len(), 0, experts_of_model)?;
        let mut seen = vec![false; experts_of_model];
        let mut experts = Vec::with_capacity(self.experts.len());
        for (layer, expert) in self.layers.into_iter().zip(self.experts) {
            let key = bounds.key(("Plan.layers", "Plan.experts"), layer, expert)?;
            let seen = &mut seen[usize::from(key.layer.0) * bounds.num_experts + usize::from(key.expert.0)];
            // A repeated key says nothing new: the first place is its order of use.
            if !std::mem::replace(seen, true) {
                experts.push(key);
            }
        }
        Ok(Plan { id: PlanId(self.plan_id), experts, begins: self.begins })
    }
}

impl From<&Plan> for v1::Plan {
    fn from(plan: &Plan) -> Self {
        Self {
            plan_id: plan.id.0,
            layers: plan.experts.iter().map(|key| key.layer.0.into()).collect(),
            experts: plan.experts.iter().map(|key| key.expert.0.into()).collect(),
            placement_epoch: 0,
            begins: plan.begins,
        }
    }
}

impl From<PlanId> for v1::Release {
    fn from(plan: PlanId) -> Self {
        Self { plan_id: plan.0 }
    }
}

impl From<v1::Release> for PlanId {
    fn from(release: v1::Release) -> Self {
        Self(release.plan_id)
    }
}
