//! Which experts are in memory: the state machine behind an expert-node's cache. It owns no memory and does
//! no loading; it says what to load into which slot and who leaves, and is told what came of it.
//!
//! SiDA knows the future: the hash tables of the queued batches say which experts come next. So the machine
//! evicts, in this order, what is empty, what no plan names (least worth first, see `worth`), and what is planned
//! (farthest next use first, as in Belady's rule); never what is in use, held or loading. A prefetch takes the
//! nearest planned expert that is missing, and only the place of what no plan names: to take it from something planned
//! would be to load that again, while the layer that is computed is about to leave its slots anyway. (Passes of a GPU
//! may ask for more: see `prefetch`.)
//!
//! A layer may need more experts than there are slots, and even when it does not, holding all of them at once
//! would push out what other layers keep. So a call takes what is resident at once, and loads the rest a
//! few at a time ([`Residency::acquire`] with `loads_max`), giving slots back in between. A call never waits
//! for a slot while it holds one, so any number of calls gets through with two slots.
//!
//! Called by the cache of an expert-node under one lock; no operation depends on the number of slots by
//! more than its logarithm.

mod eviction;
mod grants;
mod placed;
mod plan_queue;
mod plans;
mod prefetch;
mod slow_loads;
mod worth;

use std::ops::Range;

use eviction::{EvictionOrder, Rank};
pub use grants::{
    Access, Awaited, Grant, Load, LoadKind, ResidencyConfig, ResidencyCounters, ResidencyError, SlotId, Ticket,
};
pub use placed::Placed;
use plan_queue::PlanQueue;
pub use prefetch::Room;
use slow_loads::SlowLoads;
use worth::Worth;

use crate::{ExpertId, ExpertKey, LayerId, PlanId};

/// An expert as `layer * num_experts + expert`.
type KeyIndex = usize;

/// The experts that a call has not been given yet.
#[derive(Debug)]
pub struct Pending {
    layer: LayerId,
    /// Position in the call, and the expert.
    wanted: Vec<(usize, KeyIndex)>,
    /// Whether it is counted in `Residency::waiting`.
    waits: bool,
}

impl Pending {
    /// Whether the call has been given everything.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holding {
    Nothing,
    Loading { key: KeyIndex, kind: LoadKind },
    Resident { key: KeyIndex },
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    holding: Holding,
    /// Calls that use it or wait for its load.
    /// Invariant: 0 while it holds nothing.
    pins: u32,
    /// Names the load that filled it, so that a ticket is never taken for that of a later load.
    load: u64,
}

/// The state machine of an expert-node's memory: which expert is in which slot, and who leaves for whom.
#[derive(Debug)]
pub struct Residency {
    config: ResidencyConfig,
    slots: Vec<Slot>,
    /// Where each expert is, resident or loading.
    /// Invariant: `slot_of[key] == Some(slot)` exactly if `slots[slot]` holds `key`.
    slot_of: Vec<Option<SlotId>>,
    /// Experts whose last load failed: not prefetched until a plan names them anew or a call loads them.
    failed: Vec<bool>,
    /// Experts whose last load was quick: not prefetched.
    quick: Vec<bool>,
    /// The last call that named each expert, to find one named twice.
    named_by: Vec<u64>,
    calls: u64,
    plans: PlanQueue,
    /// Invariant: every slot's rank is that of [`Residency::rank`].
    order: EvictionOrder,
    worth: Worth,
    slow_loads: SlowLoads,
    loads: u64,
    /// Calls that wait for a slot. No prefetch starts while there are any.
    waiting: usize,
    /// Layers whose experts stay: see [`Residency::hold`].
    held: Range<u16>,
    resident: usize,
    counters: ResidencyCounters,
}

impl Residency {
    /// Nothing resident, nothing planned.
    pub fn new(config: ResidencyConfig) -> Self {
        let keys = config.layers * config.num_experts;
        let empty = Slot { holding: Holding::Nothing, pins: 0, load: 0 };
        Self {
            config,
            slots: vec![empty; config.slots],
            slot_of: vec![None; keys],
            failed: vec![false; keys],
            quick: vec![false; keys],
            named_by: vec![0; keys],
            calls: 0,
            plans: PlanQueue::new(keys, config.plans_max),
            order: EvictionOrder::new(config.slots),
            worth: Worth::new(keys, config.slots),
            slow_loads: SlowLoads::none(),
            loads: 0,
            waiting: 0,
            held: 0..0,
            resident: 0,
            counters: ResidencyCounters::default(),
        }
    }

    /// Experts of these layers are not evicted until it is called again: a pass goes through them that was told where they
    /// are, and cannot be told that one left.
    pub fn hold(&mut self, layers: Range<u16>) {
        // Layers that the model does not have hold nothing.
        let layers = layers.start.min(self.config.layers as u16)..layers.end.min(self.config.layers as u16);
        let before = std::mem::replace(&mut self.held, layers);
        for layer in before.start.min(self.held.start)..before.end.max(self.held.end) {
            if before.contains(&layer) != self.held.contains(&layer) {
                let first = usize::from(layer) * self.config.num_experts;
                let slots = self.slot_of[first..first + self.config.num_experts].iter().flatten().copied();
                self.reconsider(&slots.collect::<Vec<_>>());
            }
        }
    }

    /// Opens a call of distinct experts of one layer. Nothing is granted yet, and no plan advances.
    pub fn call(
        &mut self,
        layer: LayerId,
        experts: impl IntoIterator<Item = ExpertId>,
    ) -> Result<Pending, ResidencyError> {
        let keys = self.indices(experts.into_iter().map(|expert| ExpertKey { layer, expert }))?;
        Ok(Pending { layer, wanted: keys.into_iter().enumerate().collect(), waits: false })
    }

    /// Grants, into `grants`, every pending expert that is resident or loading, and at most `loads_max` loads
    /// of the others, as long as there is a slot that nobody uses. What is left stays in `pending` for another
    /// round; when a round grants nothing, the call must wait for an unpin or a finished load.
    pub fn acquire(&mut self, pending: &mut Pending, loads_max: usize, grants: &mut Vec<Grant>) {
        let layer = pending.layer;
        // What is there first, so that a load of this call cannot evict what it also needs.
        pending.wanted.retain(|&(group, index)| {
            let Some(slot) = self.slot_of[index] else { return true };
            let access = self.pin(slot);
            self.note_use(index);
            grants.push(Grant { group, key: self.key(layer, index), slot, access });
            false
        });
        let mut granted = 0;
        while granted < loads_max.min(pending.wanted.len()) {
            let Some((slot, _)) = self.order.first() else { break };
            let (group, index) = pending.wanted[granted];
            let evicted = self.start_load(index, slot, LoadKind::Demand);
            self.note_use(index);
            self.slots[slot.index()].pins = 1;
            grants.push(Grant { group, key: self.key(layer, index), slot, access: Access::Load { evicted } });
            granted += 1;
        }
        pending.wanted.drain(..granted);
        self.count_waiting(pending, !pending.wanted.is_empty());
    }

    /// Puts back a granted expert whose load, by somebody else, failed: this call will load it itself.
    pub fn again(&mut self, pending: &mut Pending, grant: &Grant) {
        pending.wanted.push((grant.group, self.index_of(grant.key)));
    }

    /// Ends a call that was not given everything. What it was given must be unpinned as ever.
    pub fn abandon(&mut self, mut pending: Pending) {
        self.count_waiting(&mut pending, false);
    }

    /// What became of somebody else's load.
    pub fn awaited(&self, ticket: Ticket) -> Awaited {
        let slot = &self.slots[ticket.slot.index()];
        match slot.holding {
            _ if slot.load != ticket.load => Awaited::Failed,
            Holding::Loading { .. } => Awaited::Loading,
            Holding::Resident { .. } => Awaited::Loaded,
            Holding::Nothing => Awaited::Failed,
        }
    }

    /// The load into this slot is done. Whoever demanded or awaits it holds its pin.
    pub fn loaded(&mut self, slot: SlotId) {
        let Holding::Loading { key, kind } = self.slots[slot.index()].holding else {
            panic!("slot {slot} was not loading: {:?}", self.slots[slot.index()]);
        };
        self.slots[slot.index()].holding = Holding::Resident { key };
        self.failed[key] = false;
        self.resident += 1;
        match kind {
            LoadKind::Demand => self.counters.demand_loads += 1,
            LoadKind::Prefetch => self.counters.prefetch_loads += 1,
        }
        self.rank(slot);
    }

    /// The load into this slot failed: it is empty, and every pin of it is void.
    pub fn load_failed(&mut self, slot: SlotId) {
        let Holding::Loading { key, .. } = self.slots[slot.index()].holding else {
            panic!("slot {slot} was not loading: {:?}", self.slots[slot.index()]);
        };
        let slot_state = &mut self.slots[slot.index()];
        (slot_state.holding, slot_state.pins) = (Holding::Nothing, 0);
        self.slot_of[key] = None;
        self.failed[key] = true;
        self.counters.failed_loads += 1;
        self.rank(slot);
    }

    /// A call is done with a granted expert.
    pub fn unpin(&mut self, slot: SlotId) {
        let pins = &mut self.slots[slot.index()].pins;
        *pins = pins.checked_sub(1).expect("a slot is unpinned by who pinned it");
        if *pins == 0 {
            self.rank(slot);
        }
    }

    /// Slots whose expert is resident.
    pub fn resident_slots(&self) -> usize {
        self.resident
    }

    /// Resident experts, ascending, and whether a plan names them.
    pub fn resident(&self) -> impl Iterator<Item = (ExpertKey, bool)> + '_ {
        self.slot_of.iter().enumerate().filter_map(|(index, slot)| {
            let Holding::Resident { .. } = self.slots[(*slot)?.index()].holding else { return None };
            Some((self.key_of(index), self.plans.next_use(index).is_some()))
        })
    }

    /// Plans queued and not over.
    pub fn plans(&self) -> usize {
        self.plans.len()
    }

    /// What happened since the start.
    pub fn counters(&self) -> ResidencyCounters {
        self.counters
    }

    /// Names the set of resident experts: another number whenever one came or left.
    pub fn version(&self) -> u64 {
        let ResidencyCounters { demand_loads, prefetch_loads, evictions, .. } = self.counters;
        demand_loads + prefetch_loads + evictions
    }

    /// Where every expert is, in order of layer and expert; `None` where it is not resident.
    pub fn resident_slots_by_expert(&self) -> impl Iterator<Item = Option<SlotId>> + '_ {
        let resident = |slot: SlotId| matches!(self.slots[slot.index()].holding, Holding::Resident { .. });
        self.slot_of.iter().map(move |slot| slot.filter(|&slot| resident(slot)))
    }

    /// Whether every expert is resident. Then none ever leaves, for there is nothing left to load.
    pub fn is_complete(&self) -> bool {
        self.resident == self.slot_of.len()
    }

    /// What it was made for.
    pub fn config(&self) -> ResidencyConfig {
        self.config
    }

    /// Pins a slot that holds or loads what a call wants.
    fn pin(&mut self, slot: SlotId) -> Access {
        self.order.set(slot, Rank::HELD);
        let held = &mut self.slots[slot.index()];
        held.pins += 1;
        match held.holding {
            Holding::Loading { .. } => Access::Await(Ticket { slot, load: held.load }),
            _ => Access::Resident,
        }
    }

    /// Evicts what the slot holds and begins to load into it.
    fn start_load(&mut self, index: KeyIndex, slot: SlotId, kind: LoadKind) -> Option<ExpertKey> {
        let evicted = match self.slots[slot.index()].holding {
            Holding::Nothing => None,
            Holding::Resident { key } => {
                debug_assert_eq!(self.slots[slot.index()].pins, 0, "an expert in use is never evicted");
                self.slot_of[key] = None;
                if !self.quick[key] {
                    self.plans.search_again(key);
                }
                self.resident -= 1;
                self.counters.evictions += 1;
                Some(self.key_of(key))
            }
            Holding::Loading { .. } => panic!("slot {slot} is loading and was taken for another load"),
        };
        self.loads += 1;
        let holding = Holding::Loading { key: index, kind };
        self.slots[slot.index()] = Slot { holding, pins: 0, load: self.loads };
        self.slot_of[index] = Some(slot);
        self.order.set(slot, Rank::HELD);
        evicted
    }

    fn note_use(&mut self, index: KeyIndex) {
        self.worth.used(index);
        self.slow_loads.used();
    }

    /// Brings a slot's place in the order of eviction up to date.
    fn rank(&mut self, slot: SlotId) {
        let state = &self.slots[slot.index()];
        let rank = match state.holding {
            Holding::Nothing => Rank::EMPTY,
            Holding::Resident { key } if state.pins == 0 && !self.is_held(key) => match self.plans.next_use(key) {
                Some(at) => Rank::planned(at),
                None => Rank::unplanned(self.worth.of(key)),
            },
            _ => Rank::HELD,
        };
        self.order.set(slot, rank);
    }

    fn is_held(&self, key: KeyIndex) -> bool {
        self.held.contains(&((key / self.config.num_experts) as u16))
    }

    /// The next use of what these slots hold is another than it was.
    fn reconsider(&mut self, slots: &[SlotId]) {
        for &slot in slots {
            self.rank(slot);
        }
    }

    fn count_waiting(&mut self, pending: &mut Pending, waits: bool) {
        self.waiting = self.waiting + usize::from(waits) - usize::from(pending.waits);
        pending.waits = waits;
    }

    /// The dense indices of distinct experts that exist.
    fn indices(&mut self, experts: impl IntoIterator<Item = ExpertKey>) -> Result<Vec<KeyIndex>, ResidencyError> {
        self.calls += 1;
        let ResidencyConfig { layers, num_experts, .. } = self.config;
        experts
            .into_iter()
            .map(|key| {
                if usize::from(key.layer.0) >= layers || usize::from(key.expert.0) >= num_experts {
                    return Err(ResidencyError::UnknownExpert { key, layers, num_experts });
                }
                let index = self.index_of(key);
                if std::mem::replace(&mut self.named_by[index], self.calls) == self.calls {
                    return Err(ResidencyError::Repeated { key });
                }
                Ok(index)
            })
            .collect()
    }

    fn index_of(&self, key: ExpertKey) -> KeyIndex {
        usize::from(key.layer.0) * self.config.num_experts + usize::from(key.expert.0)
    }

    fn key_of(&self, index: KeyIndex) -> ExpertKey {
        let layer = LayerId((index / self.config.num_experts) as u16);
        self.key(layer, index)
    }

    fn key(&self, layer: LayerId, index: KeyIndex) -> ExpertKey {
        ExpertKey { layer, expert: ExpertId((index - usize::from(layer.0) * self.config.num_experts) as u16) }
    }
}
