//! The residency machine in a world that knows only what it was told: each thing that can happen is done to both, and what the
//! machine says is checked against a slow restatement of its rules.

use std::collections::{BTreeMap, BTreeSet};

use sida_routing::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId,
    residency::{Access, Awaited, Grant, Pending, Residency, ResidencyConfig, Room, SlotId},
};

pub(crate) const LAYERS: u16 = 3;
pub(crate) const EXPERTS: u16 = 6;

/// What happens to the machine.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Plan(u64, Vec<(u16, u16)>, bool),
    Release(u64),
    Call(u16, BTreeSet<u16>),
    Acquire(usize, usize),
    FinishLoad(usize, Outcome),
    UseOne(usize),
    Prefetch,
    PrefetchWithin(usize, Room),
    Hold(u16, u16),
}

/// How a load ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Quick,
    Slow,
    Failed,
}

#[derive(Debug)]
pub(crate) struct Call {
    pending: Pending,
    /// Granted and not yet given back.
    held: Vec<Grant>,
    /// Whether its last round left something over.
    waits: bool,
}

#[derive(Debug)]
pub(crate) struct Queued {
    id: u64,
    pub(crate) keys: Vec<ExpertKey>,
}

/// The machine and what the world knows about it.
pub(crate) struct World {
    pub(crate) machine: Residency,
    slots: usize,
    plans_max: usize,
    /// What each slot holds, by what the machine said.
    pub(crate) memory: BTreeMap<SlotId, ExpertKey>,
    pub(crate) loading: Vec<SlotId>,
    /// Plans with the experts of the steps that are ahead, restated without positions.
    pub(crate) plans: Vec<Queued>,
    /// Experts whose last load failed and that no plan named since.
    failed: BTreeSet<ExpertKey>,
    /// Experts whose last load was quick.
    quick: BTreeSet<ExpertKey>,
    /// How often each expert was granted, a grant counting half after `8 * slots` further ones.
    used: BTreeMap<ExpertKey, f64>,
    calls: Vec<Call>,
    /// Layers whose experts stay.
    held: std::ops::Range<u16>,
}

impl World {
    pub(crate) fn new(slots: usize, plans_max: usize) -> Self {
        let config = ResidencyConfig { slots, layers: LAYERS.into(), num_experts: EXPERTS.into(), plans_max };
        Self {
            machine: Residency::new(config),
            slots,
            plans_max,
            memory: BTreeMap::new(),
            loading: Vec::new(),
            plans: Vec::new(),
            failed: BTreeSet::new(),
            quick: BTreeSet::new(),
            used: BTreeMap::new(),
            calls: Vec::new(),
            held: 0..0,
        }
    }

    /// How far ahead an expert is planned.
    fn next_use(&self, key: ExpertKey) -> Option<usize> {
        self.plans.iter().flat_map(|plan| &plan.keys).position(|&k| k == key)
    }

    fn pinned(&self, slot: SlotId) -> bool {
        self.calls.iter().flat_map(|call| &call.held).any(|grant| grant.slot == slot)
    }

    /// How readily an expert leaves, the larger the sooner.
    fn rank(&self, key: ExpertKey) -> (bool, u64) {
        match self.next_use(key) {
            Some(at) => (false, at as u64),
            None => (true, u64::MAX - self.used.get(&key).map_or(0, |worth| worth.to_bits())),
        }
    }

    /// The resident experts that may leave, the first to leave last.
    fn leaving(&self) -> Vec<(SlotId, ExpertKey)> {
        let mut free: Vec<_> = self
            .memory
            .iter()
            .map(|(&slot, &key)| (slot, key))
            .filter(|&(slot, key)| {
                !self.loading.contains(&slot) && !self.pinned(slot) && !self.held.contains(&key.layer.0)
            })
            .collect();
        free.sort_by_key(|&(_, key)| self.rank(key));
        free
    }

    fn start(&mut self, key: ExpertKey, slot: SlotId, evicted: Option<ExpertKey>) {
        let empty = (0..self.slots as u32).map(SlotId).find(|s| !self.memory.contains_key(s));
        match empty {
            Some(_) => {
                assert_eq!(evicted, None, "something left although a slot was empty");
                assert!(!self.memory.contains_key(&slot), "a full slot was taken for an empty one");
            }
            None => {
                let left = evicted.expect("every slot was full");
                assert_eq!(self.memory[&slot], left);
                // Among those that were never used, any may.
                let expected = self.leaving().last().map(|&(_, key)| self.rank(key));
                assert_eq!(Some(self.rank(left)), expected, "the wrong one left");
            }
        }
        assert!(!self.memory.values().any(|&k| k == key), "{key} is in memory twice");
        self.memory.insert(slot, key);
        self.loading.push(slot);
    }

    fn note_use(&mut self, key: ExpertKey) {
        let decay = (-1.0 / (8 * self.slots) as f64).exp2();
        self.used.values_mut().for_each(|worth| *worth *= decay);
        *self.used.entry(key).or_default() += 1.0;
    }

    pub(crate) fn plan(&mut self, id: u64, keys: &[(u16, u16)], begins: bool) {
        let mut experts: Vec<ExpertKey> = Vec::new();
        for &(layer, expert) in keys {
            let key = ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
            if !experts.contains(&key) {
                experts.push(key);
            }
        }
        self.machine.plan(&Plan { id: PlanId(id), experts: experts.clone(), begins }).expect("a sound plan");
        experts.iter().for_each(|key| _ = self.failed.remove(key));
        self.plans.retain(|plan| plan.id != id);
        if !experts.is_empty() && self.plans_max > 0 {
            let at = if begins { 0 } else { self.plans.len() };
            self.plans.insert(at, Queued { id, keys: experts });
            self.plans.truncate(self.plans_max);
        }
        assert_eq!(self.machine.plans(), self.plans.len());
    }

    pub(crate) fn call(&mut self, layer: u16, experts: &BTreeSet<u16>) {
        let layer = LayerId(layer);
        let pending = self.machine.call(layer, experts.iter().map(|&e| ExpertId(e))).expect("a sound call");
        self.machine.advance(layer);
        let next = self.plans.iter().position(|plan| plan.keys[0].layer == layer);
        let found = next.or_else(|| self.plans.iter().position(|plan| plan.keys.iter().any(|k| k.layer == layer)));
        if let Some(at) = found {
            let keys = &mut self.plans[at].keys;
            let start = keys.iter().position(|k| k.layer == layer).expect("the step of the layer");
            let end = keys[start..].iter().position(|k| k.layer != layer).map_or(keys.len(), |n| start + n);
            keys.drain(..end);
            if keys.is_empty() {
                self.plans.remove(at);
            }
        }
        self.calls.push(Call { pending, held: Vec::new(), waits: false });
    }

    pub(crate) fn acquire(&mut self, call: usize, loads_max: usize) {
        let mut grants = Vec::new();
        let before: BTreeMap<SlotId, ExpertKey> = self.memory.clone();
        self.machine.acquire(&mut self.calls[call].pending, loads_max, &mut grants);
        let loads = grants.iter().filter(|g| matches!(g.access, Access::Load { .. })).count();
        assert!(loads <= loads_max);
        for grant in grants {
            match grant.access {
                Access::Load { evicted } => self.start(grant.key, grant.slot, evicted),
                Access::Resident | Access::Await(_) => {
                    assert_eq!(before.get(&grant.slot), Some(&grant.key));
                    let loading = self.loading.contains(&grant.slot);
                    assert_eq!(matches!(grant.access, Access::Await(_)), loading);
                }
            }
            self.note_use(grant.key);
            self.calls[call].held.push(grant);
        }
        self.calls[call].waits = !self.calls[call].pending.is_empty();
        if self.calls[call].waits && loads < loads_max {
            assert!(self.leaving().is_empty() && self.memory.len() == self.slots, "a free slot was withheld");
        }
    }

    pub(crate) fn finish_load(&mut self, load: usize, outcome: Outcome) {
        let slot = self.loading.remove(load);
        let key = self.memory[&slot];
        if let Outcome::Quick | Outcome::Slow = outcome {
            let quick = matches!(outcome, Outcome::Quick);
            self.machine.note_pace(key, quick);
            self.machine.loaded(slot);
            self.failed.remove(&key);
            if quick {
                self.quick.insert(key)
            } else {
                self.quick.remove(&key)
            };
            return;
        }
        self.machine.load_failed(slot);
        self.failed.extend(self.memory.remove(&slot));
        for call in &mut self.calls {
            for grant in call.held.extract_if(.., |grant| grant.slot == slot).collect::<Vec<_>>() {
                if let Access::Await(ticket) = grant.access {
                    assert_eq!(self.machine.awaited(ticket), Awaited::Failed);
                }
                self.machine.again(&mut call.pending, &grant);
            }
        }
    }

    /// A call is done with one of its experts, unless it waits for that one.
    pub(crate) fn use_one(&mut self, call: usize) {
        let loading = &self.loading;
        let call = &mut self.calls[call];
        if let Some(at) = call.held.iter().position(|g| !loading.contains(&g.slot)) {
            let grant = call.held.remove(at);
            if let Access::Await(ticket) = grant.access {
                assert_eq!(self.machine.awaited(ticket), Awaited::Loaded);
            }
            self.machine.unpin(grant.slot);
        }
    }

    /// The nearest expert of the first `plans` plans that is missing, and the place of its plan.
    fn nearest_missing(&self, plans: usize) -> Option<(usize, ExpertKey)> {
        let is_missing = |key: &ExpertKey| {
            !self.memory.values().any(|k| k == key) && !self.failed.contains(key) && !self.quick.contains(key)
        };
        let mut near = self.plans.iter().take(plans).enumerate();
        near.find_map(|(at, plan)| Some((at, *plan.keys.iter().find(|&key| is_missing(key))?)))
    }

    /// What the rules say is prefetched now for the first `plans` plans.
    fn expected_prefetch(&self, plans: usize, room: Room) -> Option<ExpertKey> {
        if self.calls.iter().any(|call| call.waits) {
            return None;
        }
        let (at, key) = self.nearest_missing(plans)?;
        let before: usize = self.plans[..at].iter().map(|plan| plan.keys.len()).sum();
        let keys = &self.plans[at].keys;
        let first = keys.iter().position(|&k| k == key).unwrap();
        let layer_over = before + first + keys[first..].iter().take_while(|k| k.layer == key.layer).count();
        let may_leave = |&(_, leaves): &(SlotId, ExpertKey)| match self.next_use(leaves) {
            None => true,
            Some(next) => match room {
                Room::Unplanned => false,
                Room::UsedAfterLayer => next >= layer_over,
            },
        };
        let makes_room = self.memory.len() < self.slots || self.leaving().last().is_some_and(may_leave);
        makes_room.then_some(key)
    }

    pub(crate) fn prefetch(&mut self) {
        let expected = self.expected_prefetch(usize::MAX, Room::Unplanned);
        assert_eq!(self.machine.wants_prefetch(), expected.is_some());
        let load = self.machine.next_prefetch();
        assert_eq!(load.map(|load| load.key), expected, "another prefetch than the rules say");
        if let Some(load) = load {
            self.start(load.key, load.slot, load.evicted);
        }
    }

    /// Whether one was started.
    pub(crate) fn prefetch_within(&mut self, plans: usize, room: Room) -> bool {
        let expected = self.expected_prefetch(plans, room);
        assert_eq!(self.machine.wants_prefetch_within(plans, room), expected.is_some());
        let load = self.machine.next_prefetch_within(plans, room);
        assert_eq!(load.map(|load| load.key), expected, "another prefetch than the rules say");
        if let Some(load) = load {
            self.start(load.key, load.slot, load.evicted);
        }
        load.is_some()
    }

    fn hold(&mut self, layers: std::ops::Range<u16>) {
        self.machine.hold(layers.clone());
        self.held = layers;
    }

    fn check(&self) {
        assert!(self.memory.len() <= self.slots, "the budget is exceeded");
        let loading: BTreeSet<_> = self.loading.iter().map(|slot| self.memory[slot]).collect();
        let resident: BTreeSet<_> = self.memory.values().copied().filter(|k| !loading.contains(k)).collect();
        let told: BTreeMap<_, _> = self.machine.resident().collect();
        assert_eq!(resident, told.keys().copied().collect());
        assert_eq!(self.machine.resident_slots(), resident.len());
        // A pass would look for an expert where another is, or not at all.
        let config = self.machine.config();
        let by_expert = self.machine.resident_slots_by_expert().zip((0..config.layers).flat_map(|layer| {
            (0..config.num_experts)
                .map(move |expert| ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert as u16) })
        }));
        for (slot, key) in by_expert {
            let expected = self.memory.iter().find(|(slot, k)| **k == key && !self.loading.contains(slot));
            assert_eq!(slot, expected.map(|(slot, _)| *slot), "{key}");
        }
        assert_eq!(self.machine.is_complete(), resident.len() == config.layers * config.num_experts);
        told.iter().for_each(|(&key, &planned)| assert_eq!(planned, self.next_use(key).is_some()));
        for grant in self.calls.iter().flat_map(|call| &call.held) {
            assert_eq!(self.memory.get(&grant.slot), Some(&grant.key), "an expert in use was evicted");
        }
    }

    pub(crate) fn apply(&mut self, step: Step) {
        match step {
            Step::Plan(id, keys, begins) => self.plan(id, &keys, begins),
            Step::Release(id) => {
                self.machine.release(PlanId(id));
                self.plans.retain(|plan| plan.id != id);
            }
            Step::Call(layer, experts) if self.calls.len() < 4 => self.call(layer, &experts),
            Step::Acquire(call, loads) if call < self.calls.len() => self.acquire(call, loads),
            Step::FinishLoad(load, outcome) if load < self.loading.len() => self.finish_load(load, outcome),
            Step::UseOne(call) if call < self.calls.len() => self.use_one(call),
            Step::Prefetch => self.prefetch(),
            Step::PrefetchWithin(plans, room) => _ = self.prefetch_within(plans, room),
            Step::Hold(first, end) => self.hold(first..end),
            _ => {}
        }
        for at in (0..self.calls.len()).rev() {
            if self.calls[at].held.is_empty() && self.calls[at].pending.is_empty() {
                self.calls.remove(at);
            }
        }
        self.check();
    }

    /// Lets every call come to its end, giving slots back as it goes.
    pub(crate) fn drain(&mut self) {
        let mut rounds = 0;
        self.hold(0..0);
        while !self.calls.is_empty() {
            rounds += 1;
            assert!(rounds < 1000, "calls do not come to an end: {:?}", self.calls);
            (0..self.calls.len()).for_each(|call| self.acquire(call, 2));
            while !self.loading.is_empty() {
                self.finish_load(0, Outcome::Slow);
            }
            for call in 0..self.calls.len() {
                while !self.calls[call].held.is_empty() {
                    self.use_one(call);
                }
            }
            self.calls.retain(|call| !call.pending.is_empty());
            self.check();
        }
    }
}
