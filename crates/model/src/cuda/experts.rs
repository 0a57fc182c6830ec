//! Experts on the device: one slab of equal slots within the budget, a table that tells kernels where each expert is, and
//! uploads on streams of their own. Who is where is decided by [`sida_routing::residency`].
//!
//! The table is what a pass sees of all this, and it does not change while a pass runs. Before one starts, what plans
//! ask for is begun ([`Experts::begin_pass`]): an expert that leaves is out of the table from then on, so its slot can
//! be filled while the pass computes. Experts of the pass's own plan enter the table at once, and the pass waits for their
//! uploads; those of later plans enter it before a later pass, when they are there or its plan names them: a pass never
//! waits for what another one will use.
//!
//! Uploads go one after the other in the order of use. What the next batch lacks is begun while this one is computed; what
//! comes after it only as far as the link would be idle else, for the later it is chosen, the more is known of what is
//! used again. Many plans may be queued: they tell who can leave.
//!
//! Where the next batches lack experts, the pass of an encoding, which goes through each layer once, is followed layer by layer
//! (see `followed`): each is started when the one before it runs, with its own part of the table. So experts come just
//! before they are used, in the place of those that the pass is done with, and few are loaded that left too early.
//!
//! Invariant: no upload is begun into a slot that a running pass could still read. Passes are started and ended by one thread.
//! What leaves is out of the table before a pass, or a layer of one that is followed, is started; experts of a layer that runs
//! are held.

mod followed;

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use sida_routing::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId,
    residency::{Access, Load, Residency, ResidencyConfig, ResidencyCounters, Room, SlotId},
};

use super::{
    device::{DeviceMemory, Gpu},
    error::CudaError,
    grouped::Slots,
    host_tier::HostTier,
    uploads::Uploads,
    weights::plain_bytes,
};
use crate::{ExpertSlot, ModelConfig, Urgency};

/// Uploads for later plans on their way. What a pass of a millisecond hides is about 6 experts of 9 MiB; more would only queue,
/// and be wanted by then or not.
const AHEAD_MAX: usize = 16;
/// Plans that get what they lack at the cost of later ones: that of the pass, and the next.
const NEXT_PLANS: usize = 2;
/// Fewer uploads than these leave the link idle while a pass is computed, so the plans that follow the next get theirs,
/// in the place of what no plan names. So a batch that lacks many finds some of them loaded.
const BUSY_UPLOADS: usize = 4;
/// Plans that are looked at then.
const EARLY_PLANS: usize = 4;
/// Plans queued; beyond it the oldest is dropped.
const PLANS_MAX: usize = 64;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Experts {
    num_experts: usize,
    slot: ExpertSlot,
    slots: usize,
    /// Before the slab, so that they end before it goes.
    uploads: Uploads,
    slab: DeviceMemory,
    /// (MoE layers, experts) of i32: the slot of each, -1: nowhere.
    table: DeviceMemory,
    mirror: Vec<i32>,
    /// Of each layer, whether its part changed since it was sent.
    is_dirty: Vec<bool>,
    residency: Residency,
    /// Uploads for later plans, begun and not yet in the table, in the order of their stream.
    ahead: Vec<Load>,
    /// Layers and slots that were entered into the table while their uploads run: to be waited for by a pass through them.
    awaited: Vec<(LayerId, SlotId)>,
    plans: Plans,
}

impl Experts {
    /// Takes a slab of at most `budget` bytes. A layer of `rows_max` rows must fit.
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        slot: ExpertSlot,
        budget: u64,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        let (layers, num_experts) = (config.moe_layer_count(), config.num_experts);
        let slots = (budget / slot.bytes() as u64).min((layers * num_experts) as u64) as usize;
        let needed = num_experts.min(rows_max);
        if slots < needed {
            return Err(CudaError::BudgetTooSmall { bytes: budget, slots, needed });
        }
        let slab = gpu.allocate("experts", slots * slot.bytes())?;
        let table = gpu.allocate("experts", layers * num_experts * 4)?;
        let uploads = Uploads::new(gpu, (slab.address(), slots), slot.bytes())?;
        Ok(Self {
            num_experts,
            slot,
            slots,
            uploads,
            slab,
            table,
            mirror: vec![-1; layers * num_experts],
            is_dirty: vec![true; layers],
            residency: Residency::new(ResidencyConfig { slots, layers, num_experts, plans_max: PLANS_MAX }),
            ahead: Vec::new(),
            awaited: Vec::new(),
            plans: HashMap::new(),
        })
    }

    /// Bytes of the slab.
    pub(super) fn bytes(&self) -> u64 {
        self.slab.bytes() as u64
    }

    /// Experts it holds at most.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// Whether every expert of the model is in the table, so that no pass can miss one.
    pub(super) fn is_complete(&self) -> bool {
        self.residency.resident_slots() == self.mirror.len()
    }

    /// What was loaded and dropped since the start.
    pub(super) fn counters(&self) -> ResidencyCounters {
        self.residency.counters()
    }

    /// What a pass is told of all this.
    pub(super) fn places(&self) -> ExpertPlaces {
        ExpertPlaces {
            table: self.table.address(),
            layer_bytes: self.num_experts * 4,
            slots: Slots::new(self.slab.address(), &self.slot),
            may_miss: !self.is_complete(),
        }
    }

    /// Queues what a batch will probably use.
    pub(super) fn plan(&mut self, plan: &Plan) -> Result<(), CudaError> {
        if self.plans.len() == PLANS_MAX
            && let Some(&oldest) = self.plans.keys().min()
        {
            self.release(oldest);
        }
        self.residency.plan(plan).map_err(refused)?;
        self.plans.insert(plan.id, plan.experts.iter().copied().collect());
        Ok(())
    }

    /// Forgets a plan.
    pub(super) fn release(&mut self, plan: PlanId) {
        self.residency.release(plan);
        self.plans.remove(&plan);
    }

    /// Every expert leaves. No pass may be running.
    pub(super) fn evict_all(&mut self) {
        for load in std::mem::take(&mut self.ahead) {
            self.enter(load.key, load.slot);
        }
        let mut left = Vec::with_capacity(self.residency.resident_slots());
        self.residency.evict_all(|key| left.push(key));
        left.into_iter().for_each(|key| self.leave(key));
        self.awaited.clear();
    }

    /// Loads everything that fits, in order of layer and expert.
    pub(super) fn fill(&mut self, gpu: &Gpu, host: &mut HostTier) -> Result<(), CudaError> {
        for index in 0..self.slots {
            let layer = LayerId((index / self.num_experts) as u16);
            self.demand(gpu, host, layer, &[ExpertId((index % self.num_experts) as u16)])?;
        }
        gpu.finish()
    }

    /// Uploads what is resident once more, as demands are, and waits. Returns how many.
    pub(super) fn upload_again(&self, gpu: &Gpu, host: &mut HostTier) -> Result<usize, CudaError> {
        let mut uploads = 0;
        for (place, &slot) in self.mirror.iter().enumerate() {
            let (layer, expert) = (place / self.num_experts, place % self.num_experts);
            let key = ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert as u16) };
            let Ok(slot) = u32::try_from(slot) else { continue };
            self.begin_upload(gpu, host, Urgency::Demand, key, SlotId(slot))?;
            self.uploads.await_on(&gpu.compute, slot as usize)?;
            uploads += 1;
        }
        gpu.finish()?;
        Ok(uploads)
    }

    /// Brings the table up to date and begins what is planned: first of `current`, the plan of the pass that follows.
    pub(super) fn begin_pass(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        current: Option<PlanId>,
    ) -> Result<(), CudaError> {
        self.residency.hold(0..0);
        for load in std::mem::take(&mut self.ahead) {
            if is_planned(&self.plans, current, load.key) {
                self.enter_awaited(load);
            } else if self.uploads.is_done(load.slot.index())? {
                self.enter(load.key, load.slot);
            } else {
                self.ahead.push(load);
            }
        }
        while self.ahead.len() < AHEAD_MAX
            && let Some(load) = self.next_prefetch()
        {
            self.begin_ahead(gpu, host, &load)?;
            match is_planned(&self.plans, current, load.key) {
                true => self.enter_awaited(load),
                false => self.ahead.push(load),
            }
        }
        self.send_all(gpu)
    }

    fn begin_ahead(&mut self, gpu: &Gpu, host: &mut HostTier, load: &Load) -> Result<(), CudaError> {
        if let Some(evicted) = load.evicted {
            self.leave(evicted);
        }
        self.upload(gpu, host, Urgency::Ahead, load.key, load.slot)
    }

    fn next_prefetch(&mut self) -> Option<Load> {
        let load = self.residency.next_prefetch_within(NEXT_PLANS, Room::UsedAfterPlan);
        match load {
            None if self.ahead.len() < BUSY_UPLOADS => {
                self.residency.next_prefetch_within(EARLY_PLANS, Room::Unplanned)
            }
            load => load,
        }
    }

    /// Has the compute stream wait for the uploads of these layers' experts that are in the table.
    pub(super) fn settle(&mut self, gpu: &Gpu, layers: Range<u16>) -> Result<(), CudaError> {
        for (layer, slot) in std::mem::take(&mut self.awaited) {
            match layers.contains(&layer.0) {
                true => self.uploads.await_on(&gpu.compute, slot.index())?,
                false => self.awaited.push((layer, slot)),
            }
        }
        Ok(())
    }

    /// A pass is over that used these experts of a layer, all distinct. `is_last`: its batch will not use the layer again.
    pub(super) fn used(&mut self, layer: LayerId, experts: &[ExpertId], is_last: bool) -> Result<(), CudaError> {
        let mut pending = self.residency.call(layer, experts.iter().copied()).map_err(refused)?;
        let mut grants = Vec::with_capacity(experts.len());
        self.residency.acquire(&mut pending, 0, &mut grants);
        grants.iter().for_each(|grant| self.residency.unpin(grant.slot));
        self.residency.abandon(pending);
        if is_last {
            self.residency.advance(layer);
        }
        Ok(())
    }

    /// Loads what is missing of the experts of a layer, all distinct, and has the compute stream wait for it. No pass
    /// may be running, but for one that stopped and reads nothing any more. Returns how many were loaded.
    pub(super) fn demand(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        layer: LayerId,
        experts: &[ExpertId],
    ) -> Result<usize, CudaError> {
        self.residency.hold(0..0);
        let mut pending = self.residency.call(layer, experts.iter().copied()).map_err(refused)?;
        let mut grants = Vec::with_capacity(experts.len());
        self.residency.acquire(&mut pending, usize::MAX, &mut grants);
        if !pending.is_empty() {
            // What is ahead holds the slots: it may leave again. What stays may be chosen by a layer of this pass.
            for load in std::mem::take(&mut self.ahead) {
                self.enter_awaited(load);
            }
            self.residency.acquire(&mut pending, usize::MAX, &mut grants);
        }
        let mut loaded = Vec::new();
        for grant in &grants {
            match grant.access {
                Access::Resident => {}
                Access::Load { evicted } => {
                    if let Some(evicted) = evicted {
                        self.leave(evicted);
                    }
                    self.upload(gpu, host, Urgency::Demand, grant.key, grant.slot)?;
                    self.enter(grant.key, grant.slot);
                    loaded.push(grant.slot);
                }
                Access::Await(_) => {
                    if let Some(at) = self.ahead.iter().position(|load| load.key == grant.key) {
                        let load = self.ahead.remove(at);
                        self.enter(load.key, load.slot);
                    }
                    loaded.push(grant.slot);
                }
            }
        }
        for grant in &grants {
            self.residency.unpin(grant.slot);
        }
        self.residency.abandon(pending);
        for slot in &loaded {
            self.uploads.await_on(&gpu.compute, slot.index())?;
        }
        self.send_all(gpu)?;
        Ok(loaded.len())
    }

    /// Begins an upload. If it fails, the slot is empty and nobody is told of the expert.
    fn upload(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        urgency: Urgency,
        key: ExpertKey,
        slot: SlotId,
    ) -> Result<(), CudaError> {
        let begun = self.begin_upload(gpu, host, urgency, key, slot);
        if begun.is_err() {
            self.residency.load_failed(slot);
        }
        begun
    }

    fn begin_upload(
        &self,
        gpu: &Gpu,
        host: &mut HostTier,
        urgency: Urgency,
        key: ExpertKey,
        slot: SlotId,
    ) -> Result<(), CudaError> {
        // SAFETY: no pass that could read the slot runs (see the file's head), and the host tier outlives the uploads and fills
        // a place again only after its mark.
        unsafe { self.uploads.begin(gpu, &host.find(gpu, key)?, slot.index(), urgency, false) }
    }

    /// The next table has the expert. Its upload is begun, and will be waited for.
    fn enter(&mut self, key: ExpertKey, slot: SlotId) {
        self.residency.loaded(slot);
        let place = self.place(key);
        self.mirror[place] = slot.index() as i32;
        self.is_dirty[usize::from(key.layer.0)] = true;
    }

    /// As [`Experts::enter`], for a pass that must wait for it itself.
    fn enter_awaited(&mut self, load: Load) {
        self.enter(load.key, load.slot);
        self.awaited.push((load.key.layer, load.slot));
    }

    fn leave(&mut self, key: ExpertKey) {
        let place = self.place(key);
        self.mirror[place] = -1;
        self.is_dirty[usize::from(key.layer.0)] = true;
    }

    fn place(&self, key: ExpertKey) -> usize {
        usize::from(key.layer.0) * self.num_experts + usize::from(key.expert.0)
    }

    fn send_all(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        self.send_table(gpu, 0..self.is_dirty.len() as u16)
    }

    /// Sends these layers' parts of the table, if they changed.
    fn send_table(&mut self, gpu: &Gpu, layers: Range<u16>) -> Result<(), CudaError> {
        let layers = usize::from(layers.start)..usize::from(layers.end);
        let is_dirty = &mut self.is_dirty[layers.clone()];
        if is_dirty.contains(&true) {
            let (first, end) = (layers.start * self.num_experts, layers.end * self.num_experts);
            gpu.write(self.table.address() + first as u64 * 4, plain_bytes(&self.mirror[first..end]))?;
            is_dirty.fill(false);
        }
        Ok(())
    }
}

/// What a pass is told of the experts on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertPlaces {
    table: u64,
    layer_bytes: usize,
    pub(super) slots: Slots,
    /// Whether an expert may be nowhere.
    pub(super) may_miss: bool,
}

impl ExpertPlaces {
    /// Where the slots of a layer's experts are listed, on the device.
    pub(super) fn table_of(&self, layer: LayerId) -> u64 {
        self.table + (usize::from(layer.0) * self.layer_bytes) as u64
    }
}

type Plans = HashMap<PlanId, HashSet<ExpertKey>>;

fn is_planned(plans: &Plans, plan: Option<PlanId>, key: ExpertKey) -> bool {
    plan.and_then(|id| plans.get(&id)).is_some_and(|plan| plan.contains(&key))
}

/// A plan or a call that names experts the model does not have.
fn refused(error: sida_routing::residency::ResidencyError) -> CudaError {
    CudaError::Plan { reason: error.to_string() }
}
