//! Who waits for a load that another call began.

use sida_routing::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId,
    residency::{Access, Awaited, Residency, ResidencyConfig},
};

#[test]
fn a_ticket_is_for_one_load_only() {
    // Broken: a call takes a later load of another expert into the same slot for the one it waited for.
    let mut residency = Residency::new(ResidencyConfig { slots: 1, layers: 3, num_experts: 6, plans_max: 2 });
    let experts = vec![ExpertKey { layer: LayerId(0), expert: ExpertId(0) }];
    residency.plan(&Plan { id: PlanId(1), experts, begins: false }).expect("a sound plan");
    let load = residency.next_prefetch().expect("a planned expert to load");
    let mut pending = residency.call(LayerId(0), [ExpertId(0)]).expect("a sound call");
    let mut grants = Vec::new();
    residency.acquire(&mut pending, 1, &mut grants);
    let Access::Await(ticket) = grants[0].access else { panic!("{grants:?}") };
    residency.load_failed(load.slot);
    assert_eq!(residency.awaited(ticket), Awaited::Failed);
    let mut other = residency.call(LayerId(0), [ExpertId(1)]).expect("a sound call");
    residency.acquire(&mut other, 1, &mut grants);
    residency.loaded(load.slot);
    assert_eq!(residency.awaited(ticket), Awaited::Failed);
}
