//! Loads ahead of their use, by the queued plans: the nearest planned expert that is missing is next.
//!
//! How far ahead to load, and at whose cost, depends on who uses the slots. Calls that go layer by layer give slots
//! back as they go, so a prefetch takes only what no plan names ([`Residency::next_prefetch`]). With many plans queued nearly
//! everything in memory is planned by somebody: then what is used later leaves for the batches that are next, and nothing is
//! loaded for those behind them, for what is loaded early is chosen with less knowledge of what comes after it
//! ([`Residency::next_prefetch_within`]).

use super::{KeyIndex, Load, LoadKind, Rank, Residency, SlotId, plan_queue::Missing};

/// What a prefetch may take the place of, when no slot is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// What no plan names.
    Unplanned,
    /// Else what is used farthest ahead, if that is after the layer for which it leaves (Belady's rule): for passes that are
    /// loaded for layer by layer, just before each is used.
    UsedAfterLayer,
}

impl Residency {
    /// Starts the next prefetch: the nearest planned expert that is missing, unless a call waits for a slot,
    /// or everything in memory is in use or planned.
    pub fn next_prefetch(&mut self) -> Option<Load> {
        self.next_prefetch_within(usize::MAX, Room::Unplanned)
    }

    /// As [`Residency::next_prefetch`], for the first `plans` plans only, and in the place of what `room` says.
    pub fn next_prefetch_within(&mut self, plans: usize, room: Room) -> Option<Load> {
        let (index, slot) = self.choose_prefetch(plans, room)?;
        let evicted = self.start_load(index, slot, LoadKind::Prefetch);
        Some(Load { key: self.key_of(index), slot, evicted })
    }

    /// Whether [`Residency::next_prefetch`] would start one.
    pub fn wants_prefetch(&mut self) -> bool {
        self.wants_prefetch_within(usize::MAX, Room::Unplanned)
    }

    /// Whether [`Residency::next_prefetch_within`] would start one.
    pub fn wants_prefetch_within(&mut self, plans: usize, room: Room) -> bool {
        self.choose_prefetch(plans, room).is_some()
    }

    fn choose_prefetch(&mut self, plans: usize, room: Room) -> Option<(KeyIndex, SlotId)> {
        if self.waiting > 0 {
            return None;
        }
        let (slot, rank) = self.order.first().filter(|(_, rank)| room != Room::Unplanned || !rank.is_planned())?;
        let missing = self.first_missing(plans)?;
        let has_room = match room {
            _ if !rank.is_planned() => true,
            Room::Unplanned => false,
            Room::UsedAfterLayer => rank >= Rank::planned(missing.step_end),
        };
        has_room.then_some((missing.key, slot))
    }

    fn first_missing(&mut self, plans: usize) -> Option<Missing> {
        let (slot_of, failed, quick) = (&self.slot_of, &self.failed, &self.quick);
        self.plans.first_missing(plans, |key| slot_of[key].is_some() || failed[key] || quick[key])
    }
}
