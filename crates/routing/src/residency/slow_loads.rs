//! How frequent loads are that are worth beginning early. Where hardly any expert has to be loaded, or each is loaded quickly,
//! plans gain nothing, so that nothing need be predicted for them. Judged by what happened of late, loads ahead among it: what
//! a plan saves a call from must not speak against plans. Loads for a placement are not: nobody asked for them. Owned by [`super::Residency`].

use super::{Holding, LoadKind, Residency};
use crate::ExpertKey;

/// A use, or a load, counts a third as much after so many further ones.
const MEMORY: f64 = 256.0;
/// Above this share among all uses and slow loads, slow loads are frequent. A short text uses a hundred experts in a model of six
/// MoE layers, and one slow load takes about as long as its prediction.
const FREQUENT: f64 = 0.01;

/// Of what happened of late, how much was a slow load, and how much a use.
#[derive(Debug)]
pub(super) struct SlowLoads {
    /// From 0 to 1.
    share: f64,
}

impl SlowLoads {
    /// Of nothing. Three slow loads in a row are frequent: a cold node says so within its first call.
    pub(super) fn none() -> Self {
        Self { share: 0.0 }
    }

    /// A call was given an expert.
    pub(super) fn used(&mut self) {
        self.share -= self.share / MEMORY;
    }

    /// An expert was loaded, and not quickly.
    pub(super) fn loaded(&mut self) {
        self.share += (1.0 - self.share) / MEMORY;
    }

    pub(super) fn share(&self) -> f64 {
        self.share
    }

    pub(super) fn are_frequent(&self) -> bool {
        self.share > FREQUENT
    }
}

impl Residency {
    /// Whether the load of this expert, which is under way, was a quick one: so short that to have another thread do
    /// it ahead gains nothing. It is prefetched again once a load of it takes long.
    pub fn note_pace(&mut self, key: ExpertKey, quick: bool) {
        let index = self.index_of(key);
        self.quick[index] = quick;
        let holding = self.slot_of[index].map(|slot| self.slots[slot.index()].holding);
        // Neither a call nor a plan asked for what is loaded for a placement.
        let is_asked_for = matches!(holding, Some(Holding::Loading { kind: LoadKind::Demand, .. }))
            || self.plans.next_use(index).is_some();
        if !quick && is_asked_for {
            self.slow_loads.loaded();
        }
    }

    /// Whether loads that are not quick are so frequent that plans are of use: none where hardly any expert had to be loaded
    /// of late, or each was quickly.
    pub fn gains_by_plans(&self) -> bool {
        self.slow_loads.are_frequent()
    }

    /// The share of slow loads among uses and slow loads of late, from 0 to 1; 0 where there were none yet.
    pub fn slow_load_share(&self) -> f64 {
        self.slow_loads.share()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ExpertId, LayerId, Plan, PlanId,
        residency::{Access, Placed, ResidencyConfig},
    };

    /// After so many uses, one in `every` of which a slow load came before.
    fn after(uses: usize, every: usize) -> SlowLoads {
        let mut loads = SlowLoads::none();
        for use_ in 1..=uses {
            if use_ % every == 0 {
                loads.loaded();
            }
            loads.used();
        }
        loads
    }

    #[test]
    fn one_in_fifty_is_frequent_and_one_in_five_hundred_is_not() {
        // Broken: loads that a busy processor held up count for a cache that is short of room; or the other way round.
        assert!(after(20_000, 50).are_frequent());
        assert!(!after(20_000, 500).are_frequent());
    }

    #[test]
    fn a_few_slow_loads_bring_plans_and_many_uses_end_them() {
        // Broken: a cold node, or one whose files left the page cache, goes on without plans; or plans are made for ever where they
        // gain nothing, as after all was loaded in the background.
        for mut loads in [SlowLoads::none(), after(100_000, usize::MAX)] {
            assert!(!loads.are_frequent());
            (0..3).for_each(|_| loads.loaded());
            assert!(loads.are_frequent());
            (0..10_000).for_each(|_| loads.loaded());
            (0..600).for_each(|_| loads.used());
            assert!(loads.are_frequent());
            (0..700).for_each(|_| loads.used());
            assert!(!loads.are_frequent());
        }
    }

    #[test]
    fn a_node_gains_by_plans_where_its_loads_take_long() {
        // Broken: a node whose experts load in no time asks for predictions for ever; or one that waits for each does without.
        let mut residency = Residency::new(ResidencyConfig { slots: 2, layers: 1, num_experts: 4, plans_max: 1 });
        let mut uses = |count: u16, is_quick: bool| {
            for expert in (0..count).map(|use_| ExpertId(use_ % 4)) {
                let mut call = residency.call(LayerId(0), [expert]).unwrap();
                let mut grants = Vec::new();
                residency.acquire(&mut call, 1, &mut grants);
                assert!(matches!(grants[0].access, Access::Load { .. }), "the last four uses were of others");
                residency.note_pace(grants[0].key, is_quick);
                residency.loaded(grants[0].slot);
                residency.unpin(grants[0].slot);
            }
            residency.gains_by_plans()
        };
        assert!(!uses(4, true));
        assert!(uses(4, false), "four in a row took long");
        assert!(!uses(300, true));
        assert!(uses(1_300, false));
    }

    #[test]
    fn loads_for_a_placement_say_nothing_and_those_of_a_plan_do() {
        // Broken: a node that loads what is placed on it has everything predicted, for ever if it is hardly asked; or plans that
        // save every wait end themselves.
        let all: Vec<ExpertKey> =
            (0..4).map(|expert| ExpertKey { layer: LayerId(0), expert: ExpertId(expert) }).collect();
        let residency = || Residency::new(ResidencyConfig { slots: 4, layers: 1, num_experts: 4, plans_max: 1 });
        let (mut placed, mut planned) = (residency(), residency());
        while let Placed::Load(load) = placed.next_placed(&all) {
            placed.note_pace(load.key, false);
            placed.loaded(load.slot);
        }
        planned.plan(&Plan { id: PlanId(1), experts: all, begins: false }).unwrap();
        while let Some(load) = planned.next_prefetch() {
            planned.note_pace(load.key, false);
            planned.loaded(load.slot);
        }
        assert_eq!((placed.resident_slots(), placed.gains_by_plans()), (4, false));
        assert_eq!((planned.resident_slots(), planned.gains_by_plans()), (4, true));
    }
}
