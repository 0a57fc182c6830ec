//! An expert-node in this process with room for a part of the experts: the residency machine of a real one, without its
//! clock. What is planned is loaded at once, so that a load that a call needs is one that nobody could have foreseen.

use std::sync::Arc;

use parking_lot::Mutex;
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts, ResidencyReport};
use sida_routing::{
    Plan, PlanId,
    residency::{Access, Residency, ResidencyConfig, ResidencyCounters},
};

use crate::plain_experts::{PlainExperts, experts};

/// The node.
pub(crate) struct SmallExperts {
    experts: Arc<PlainExperts>,
    residency: Mutex<Residency>,
}

impl SmallExperts {
    /// Of the small model, with room for so many of its experts.
    pub(crate) fn new(slots: usize) -> Arc<Self> {
        let residency = Residency::new(ResidencyConfig { slots, layers: 6, num_experts: 64, plans_max: 16 });
        Arc::new(Self { experts: experts(), residency: Mutex::new(residency) })
    }

    /// What was loaded, and why.
    pub(crate) fn counters(&self) -> ResidencyCounters {
        self.residency.lock().counters()
    }
}

impl LocalExperts for SmallExperts {
    fn plan(&self, plan: Plan) {
        let mut residency = self.residency.lock();
        residency.plan(&plan).expect("experts of the model");
        while let Some(load) = residency.next_prefetch() {
            residency.loaded(load.slot);
        }
    }

    fn release(&self, plan: PlanId) {
        self.residency.lock().release(plan);
    }

    fn compute(&self, call: ExpertCall<'_>, out: &mut [f32]) -> Result<CallReport, CallError> {
        let mut residency = self.residency.lock();
        let mut grants = Vec::new();
        let mut pending =
            residency.call(call.layer, call.groups.iter().map(|group| group.expert)).expect("the model's");
        residency.advance(call.layer);
        residency.acquire(&mut pending, usize::MAX, &mut grants);
        assert!(pending.is_empty(), "there is room for all experts of a layer");
        let mut demand_loads = 0;
        for grant in grants {
            if let Access::Load { .. } = grant.access {
                residency.loaded(grant.slot);
                demand_loads += 1;
            }
            residency.unpin(grant.slot);
        }
        drop(residency);
        let report = self.experts.compute(call, out)?;
        Ok(CallReport { hits: report.hits - demand_loads, demand_loads, ..report })
    }

    fn resident_count(&self) -> usize {
        self.residency.lock().resident_slots()
    }

    fn gains_by_plans(&self) -> bool {
        self.residency.lock().gains_by_plans()
    }

    fn residency(&self) -> ResidencyReport {
        ResidencyReport::default()
    }
}
