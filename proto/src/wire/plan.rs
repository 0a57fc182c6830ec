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

#[cfg(test)]
mod tests {
    use sida_routing::{ExpertId, ExpertKey, LayerId};

    use super::*;

    const BOUNDS: Bounds = Bounds {
        moe_layers: 3,
        num_experts: 4,
        d_model: 4,
        vocab_size: 1000,
        rows_max: 100,
        tokens_max: 50,
        sequences_max: 8,
    };

    #[test]
    fn an_expert_named_again_stays_in_its_first_place() {
        // Broken: experts of a plan would be taken for each other, or be loaded in another order than they are used.
        let (layers, experts) = ((0..3).flat_map(|layer| [layer; 4]), (0..3).flat_map(|_| [3, 0, 2, 1]));
        let mut plan = v1::Plan { plan_id: 4, ..Default::default() };
        (plan.layers, plan.experts) = (layers.collect(), experts.collect());
        let all: Vec<ExpertKey> = (plan.layers.iter().zip(&plan.experts))
            .map(|(&layer, &expert)| ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert as u16) })
            .collect();
        let expected = Plan { id: PlanId(4), experts: all, begins: false };
        assert_eq!(plan.clone().check(&BOUNDS), Ok(expected));
        (plan.layers, plan.experts) = (vec![2, 2, 2], vec![1, 3, 1]);
        let experts: Vec<u16> = plan.clone().check(&BOUNDS).unwrap().experts.iter().map(|key| key.expert.0).collect();
        assert_eq!(experts, [1, 3]);
        plan.layers.push(0);
        assert!(plan.check(&BOUNDS).is_err(), "layers and experts that are not as many");
    }

    #[test]
    fn a_release_names_its_plan() {
        // Broken: a batch that is over would stay planned, and keep experts that nobody will use.
        assert_eq!(PlanId::from(v1::Release::from(PlanId(77))), PlanId(77));
    }
}
