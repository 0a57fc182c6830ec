//! Loads that no batch asks for: experts that a placement gives to this node, so that it has them before it is asked
//! for them. They take only room that nobody misses.

use super::{Holding, Load, LoadKind, Residency, SlotId};
use crate::ExpertKey;

/// What can be done for a placement now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// This load was started.
    Load(Load),
    /// Something is missing, and calls that wait for a slot go first.
    Busy,
    /// Nothing is missing that there is room for.
    Done,
}

impl Residency {
    /// Starts the load of the next expert of `placed` (ascending) that is missing: into an empty slot, or into that of
    /// an expert which neither a plan nor the placement names, the longest unused first.
    pub fn next_placed(&mut self, placed: &[ExpertKey]) -> Placed {
        let missing = placed
            .iter()
            .map(|&key| self.index_of(key))
            .find(|&index| self.slot_of.get(index).is_some_and(Option::is_none) && !self.failed[index]);
        let Some(index) = missing else { return Placed::Done };
        if self.waiting > 0 {
            return Placed::Busy;
        }
        let Some(slot) = self.room(placed) else { return Placed::Done };
        let evicted = self.start_load(index, slot, LoadKind::Prefetch);
        Placed::Load(Load { key: self.key_of(index), slot, evicted })
    }

    /// A slot that nobody misses: empty, or of an expert that is not placed here.
    fn room(&self, placed: &[ExpertKey]) -> Option<SlotId> {
        let is_stray = |slot: &SlotId| match self.slots[slot.index()].holding {
            Holding::Resident { key } => placed.binary_search(&self.key_of(key)).is_err(),
            Holding::Nothing | Holding::Loading { .. } => true,
        };
        let slots = (0..self.slots.len() as u32).map(SlotId);
        slots.filter(|&slot| self.order.rank(slot).is_free()).filter(is_stray).max_by_key(|&slot| self.order.rank(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExpertId, LayerId, Plan, PlanId, residency::ResidencyConfig};

    fn key(layer: u16, expert: u16) -> ExpertKey {
        ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) }
    }

    fn residency(slots: usize) -> Residency {
        Residency::new(ResidencyConfig { slots, layers: 2, num_experts: 4, plans_max: 4 })
    }

    /// Loads all there is room for; the experts loaded.
    fn filled(residency: &mut Residency, placed: &[ExpertKey]) -> Vec<ExpertKey> {
        let mut loaded = Vec::new();
        while let Placed::Load(load) = residency.next_placed(placed) {
            residency.loaded(load.slot);
            loaded.push(load.key);
        }
        loaded
    }

    #[test]
    fn what_is_placed_fills_empty_room_only_once() {
        // Broken: a new holder would be asked for experts that it has not loaded, or would load them for ever.
        let mut residency = residency(3);
        let placed = [key(0, 1), key(0, 2), key(1, 0), key(1, 3)];
        assert_eq!(filled(&mut residency, &placed), placed[..3]);
        assert_eq!(residency.next_placed(&placed), Placed::Done);
        assert_eq!(filled(&mut residency, &[key(9, 9)]), []);
    }

    #[test]
    fn strays_make_room_and_planned_experts_do_not() {
        // Broken: a placement would throw out what the next batch needs.
        let mut residency = residency(3);
        assert_eq!(filled(&mut residency, &[key(0, 0), key(0, 1), key(0, 2)]).len(), 3);
        residency.plan(&Plan { id: PlanId(1), experts: vec![key(0, 1)], begins: false }).unwrap();
        let placed = [key(0, 2), key(1, 0), key(1, 1)];
        assert_eq!(filled(&mut residency, &placed), [key(1, 0)]);
        let resident: Vec<_> = residency.resident().map(|(key, _)| key).collect();
        assert_eq!(resident, [key(0, 1), key(0, 2), key(1, 0)]);
    }

    #[test]
    fn the_stray_least_worth_goes_and_none_that_is_in_use_or_held() {
        // Broken: a placement would throw out what is used most, or rows would be computed with another expert's weights.
        let mut residency = residency(4);
        let all = [key(0, 0), key(0, 1), key(0, 2), key(1, 3)];
        assert_eq!(filled(&mut residency, &all).len(), 4);
        let mut grants = Vec::new();
        for (layer, expert) in [(0, 1), (0, 2), (0, 0), (0, 0), (0, 2), (0, 0), (1, 3)] {
            let mut call = residency.call(LayerId(layer), [ExpertId(expert)]).unwrap();
            residency.acquire(&mut call, 0, &mut grants);
        }
        let placed = [key(0, 1), key(1, 0), key(1, 1), key(1, 2)];
        assert_eq!(residency.next_placed(&placed), Placed::Done, "all are in use");
        grants.drain(..).for_each(|grant| residency.unpin(grant.slot));
        residency.hold(1..2);
        assert_eq!(filled(&mut residency, &placed[..3]), placed[1..3]);
        let resident: Vec<_> = residency.resident().map(|(key, _)| key).collect();
        assert_eq!(resident, [key(0, 1), key(1, 0), key(1, 1), key(1, 3)], "2 and then 0 left, 3 is held");
        assert_eq!(residency.next_placed(&placed), Placed::Done);
        residency.hold(0..0);
        assert_eq!(filled(&mut residency, &placed), [key(1, 2)]);
    }

    #[test]
    fn calls_go_first() {
        // Broken: a call would wait behind loads that nobody waits for.
        let mut residency = residency(2);
        let mut held = residency.call(LayerId(0), [ExpertId(0), ExpertId(1)]).unwrap();
        let (mut grants, mut none) = (Vec::new(), Vec::new());
        residency.acquire(&mut held, 2, &mut grants);
        let mut waiting = residency.call(LayerId(0), [ExpertId(2)]).unwrap();
        residency.acquire(&mut waiting, 1, &mut none);
        assert_eq!(residency.next_placed(&[key(1, 0)]), Placed::Busy);
        residency.abandon(waiting);
        assert_eq!(residency.next_placed(&[key(1, 0)]), Placed::Done);
    }
}
