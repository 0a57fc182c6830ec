//! Plans as they come, advance and go: what each changes of the order in which experts leave.

use super::{KeyIndex, PlanId, Residency, ResidencyError, Slot, SlotId};
use crate::{LayerId, Plan};

impl Residency {
    /// Queues a plan: before all others if its batch begins, else behind them. A plan of the same name is replaced;
    /// beyond the limit of plans the last is dropped. A plan with an error changes nothing.
    pub fn plan(&mut self, plan: &Plan) -> Result<(), ResidencyError> {
        let keys = self.indices(plan.experts.iter().copied())?;
        for &key in &keys {
            if std::mem::take(&mut self.failed[key]) {
                self.plans.search_again(key);
            }
        }
        let experts = plan.experts.iter().map(|key| key.layer).zip(keys).collect();
        let (slots, slot_of) = (&self.slots, &self.slot_of);
        let mut moved = Vec::new();
        let changed = |key| collect_movable(slots, slot_of, key, &mut moved);
        self.plans.push(plan.id, experts, plan.begins, changed);
        self.reconsider(&moved);
        Ok(())
    }

    /// Forgets a plan: its batch is done. Unknown names are ignored (the plan was dropped, or is over).
    pub fn release(&mut self, id: PlanId) {
        let (slots, slot_of) = (&self.slots, &self.slot_of);
        let mut moved = Vec::new();
        self.plans.remove(id, |key| collect_movable(slots, slot_of, key, &mut moved));
        self.reconsider(&moved);
    }

    /// A batch is at this layer: its step of the plans is over, and the steps before it. See `plan_queue` for
    /// which plan that is.
    pub fn advance(&mut self, layer: LayerId) {
        let (slots, slot_of) = (&self.slots, &self.slot_of);
        let mut moved = Vec::new();
        self.plans.advance(layer, |key| collect_movable(slots, slot_of, key, &mut moved));
        self.reconsider(&moved);
    }
}

/// Notes the slot of an expert whose next use changed, unless it is in use: that will be ranked when it is not.
fn collect_movable(slots: &[Slot], slot_of: &[Option<SlotId>], key: KeyIndex, moved: &mut Vec<SlotId>) {
    if let Some(slot) = slot_of[key]
        && slots[slot.index()].pins == 0
    {
        moved.push(slot);
    }
}
