//! Experts on the device: one slab of equal slots within the budget, a table that tells kernels where each expert is, and
//! uploads on streams of their own. Who is where is decided by [`sida_routing::residency`].
//!
//! The table is what a pass sees of all this, and it does not change while a pass runs. Before one starts, what plans
//! ask for is begun ([`Experts::begin_pass`]): an expert that leaves is out of the table from then on, so its slot can
//! be filled while the pass computes. Experts of the pass's own plan enter the table at once, and each MoE layer waits
//! for the uploads of its own; those of later plans enter it before a later pass, when they are there or its plan names
//! them: a pass never waits for what another one will use.
//!
//! Uploads go one after the other in the order of use. What the next batch lacks is begun while this one is computed; what
//! comes after it only as far as the link would be idle else, for the later it is chosen, the more is known of what is
//! used again. Many plans may be queued: they tell who can leave.
//!
//! Invariant: no upload is begun into a slot that a running pass could read: passes are started and ended by one
//! thread, uploads begun between them, and what left for them was out of the table before.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use cudarc::driver::{CudaEvent, CudaStream};
use sida_routing::{
    ExpertId, ExpertKey, LayerId, Plan, PlanId,
    residency::{Access, Load, Residency, ResidencyConfig, ResidencyCounters, Room, SlotId},
};

use super::{
    device::{DeviceMemory, Gpu},
    error::{CudaError, failed},
    host_tier::HostTier,
    weights::plain_bytes,
};
use crate::{ModelConfig, Precision};

/// Uploads for later plans under way. What a pass of a millisecond hides is about 6 experts of 9 MiB; more
/// would only queue, and be wanted by then or not.
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
    expert_bytes: usize,
    slot_values: usize,
    slots: usize,
    slab: DeviceMemory,
    /// (MoE layers, experts) of i32: the slot of each, -1: nowhere.
    table: DeviceMemory,
    mirror: Vec<i32>,
    /// Whether the mirror changed since it was sent.
    is_dirty: bool,
    residency: Residency,
    /// The last upload into each slot.
    uploads: Vec<CudaEvent>,
    /// Uploads for later plans, begun and not yet in the table, in the order of their stream.
    ahead: Vec<Ahead>,
    /// Uploads begun for plans.
    prefetches: u64,
    /// For each MoE layer the last upload that the next pass must wait for: its place in the stream, and its slot.
    awaited: Vec<Option<(u64, SlotId)>>,
    plans: HashMap<PlanId, HashSet<ExpertKey>>,
}

/// An upload for a later plan.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    load: Load,
    /// Its place in the stream of prefetches: what is before it is over when it is.
    number: u64,
}

impl Experts {
    /// Takes a slab of at most `budget` bytes. A layer of `rows_max` rows must fit.
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        (expert_bytes, precision): (usize, Precision),
        budget: u64,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        let (layers, num_experts) = (config.moe_layer_count(), config.num_experts);
        let slots = (budget / expert_bytes as u64).min((layers * num_experts) as u64) as usize;
        let needed = num_experts.min(rows_max);
        if slots < needed {
            return Err(CudaError::BudgetTooSmall { bytes: budget, slots, needed });
        }
        let slab = gpu.allocate("experts", slots * expert_bytes)?;
        let table = gpu.allocate("experts", layers * num_experts * 4)?;
        gpu.finish()?;
        let uploads = (0..slots).map(|_| gpu.event()).collect::<Result<_, _>>()?;
        Ok(Self {
            num_experts,
            expert_bytes,
            slot_values: expert_bytes / precision.size(),
            slots,
            slab,
            table,
            mirror: vec![-1; layers * num_experts],
            is_dirty: true,
            residency: Residency::new(ResidencyConfig { slots, layers, num_experts, plans_max: PLANS_MAX }),
            uploads,
            ahead: Vec::new(),
            prefetches: 0,
            awaited: vec![None; layers],
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

    /// Where the slots of a layer's experts are listed, on the device.
    pub(super) fn table_of(&self, layer: LayerId) -> u64 {
        self.table.address() + (usize::from(layer.0) * self.num_experts * 4) as u64
    }

    /// Where matrix 0 (wi) or 1 (wo) of slot 0 is.
    pub(super) fn matrix(&self, index: usize) -> u64 {
        self.slab.address() + (index * self.expert_bytes / 2) as u64
    }

    /// From one slot to the next, in values.
    pub(super) fn slot_values(&self) -> usize {
        self.slot_values
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
        for ahead in std::mem::take(&mut self.ahead) {
            self.enter(ahead.load.key, ahead.load.slot);
        }
        let mut left = Vec::with_capacity(self.residency.resident_slots());
        self.residency.evict_all(|key| left.push(key));
        left.into_iter().for_each(|key| self.leave(key));
        self.awaited.fill(None);
    }

    /// Loads everything that fits, in order of layer and expert.
    pub(super) fn fill(&mut self, gpu: &Gpu, host: &mut HostTier) -> Result<(), CudaError> {
        for index in 0..self.slots {
            let layer = LayerId((index / self.num_experts) as u16);
            self.demand(gpu, host, layer, &[ExpertId((index % self.num_experts) as u16)])?;
        }
        gpu.demand.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// Uploads what is resident once more, as demands are, and waits. Returns the bytes.
    pub(super) fn upload_again(&self, gpu: &Gpu, host: &mut HostTier) -> Result<u64, CudaError> {
        let mut bytes = 0;
        for (place, &slot) in self.mirror.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (layer, expert) = (place / self.num_experts, place % self.num_experts);
            let key = ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert as u16) };
            self.begin_upload(gpu, host, &gpu.demand, key, SlotId(slot as u32))?;
            bytes += self.expert_bytes as u64;
        }
        gpu.demand.synchronize().map_err(failed("cuStreamSynchronize"))?;
        Ok(bytes)
    }

    /// Brings the table up to date and begins what is planned: first of `current`, the plan of the pass that follows.
    pub(super) fn begin_pass(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        current: Option<PlanId>,
    ) -> Result<(), CudaError> {
        for ahead in std::mem::take(&mut self.ahead) {
            if self.is_planned(current, ahead.load.key) {
                self.enter_awaited(ahead);
            } else if self.is_uploaded(ahead.load.slot)? {
                self.enter(ahead.load.key, ahead.load.slot);
            } else {
                self.ahead.push(ahead);
            }
        }
        while self.ahead.len() < AHEAD_MAX
            && let Some(load) = self.next_prefetch()
        {
            if let Some(evicted) = load.evicted {
                self.leave(evicted);
            }
            self.upload(gpu, host, &gpu.prefetch, load.key, load.slot)?;
            self.prefetches += 1;
            let ahead = Ahead { load, number: self.prefetches };
            match self.is_planned(current, load.key) {
                true => self.enter_awaited(ahead),
                false => self.ahead.push(ahead),
            }
        }
        self.send_table(gpu)
    }

    fn next_prefetch(&mut self) -> Option<Load> {
        let load = self.residency.next_prefetch_within(NEXT_PLANS, Room::UsedLater);
        match load {
            None if self.ahead.len() < BUSY_UPLOADS => {
                self.residency.next_prefetch_within(EARLY_PLANS, Room::Unplanned)
            }
            load => load,
        }
    }

    fn is_planned(&self, plan: Option<PlanId>, key: ExpertKey) -> bool {
        plan.and_then(|id| self.plans.get(&id)).is_some_and(|plan| plan.contains(&key))
    }

    fn is_uploaded(&self, slot: SlotId) -> Result<bool, CudaError> {
        self.uploads[slot.index()].try_is_complete().map_err(failed("cuEventQuery"))
    }

    /// Has the compute stream wait for a layer's uploads.
    pub(super) fn wait_for_layer(&self, gpu: &Gpu, layer: LayerId) -> Result<(), CudaError> {
        match self.awaited[usize::from(layer.0)] {
            Some((_, slot)) => gpu.compute.wait(&self.uploads[slot.index()]).map_err(failed("cuStreamWaitEvent")),
            None => Ok(()),
        }
    }

    /// Has the compute stream wait for the uploads of all these layers.
    pub(super) fn wait_for_layers(&self, gpu: &Gpu, mut layers: Range<u16>) -> Result<(), CudaError> {
        layers.try_for_each(|layer| self.wait_for_layer(gpu, LayerId(layer)))
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
        self.awaited[usize::from(layer.0)] = None;
        Ok(())
    }

    /// Loads what is missing of the experts of a layer, all distinct, and has the compute stream wait for it. No pass
    /// may be running. Returns how many were loaded.
    pub(super) fn demand(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        layer: LayerId,
        experts: &[ExpertId],
    ) -> Result<usize, CudaError> {
        let mut pending = self.residency.call(layer, experts.iter().copied()).map_err(refused)?;
        let mut grants = Vec::with_capacity(experts.len());
        self.residency.acquire(&mut pending, usize::MAX, &mut grants);
        if !pending.is_empty() {
            // What is ahead holds the slots: it may leave again. What stays may be chosen by a layer of this pass.
            for ahead in std::mem::take(&mut self.ahead) {
                self.enter_awaited(ahead);
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
                    self.upload(gpu, host, &gpu.demand, grant.key, grant.slot)?;
                    self.enter(grant.key, grant.slot);
                    loaded.push(grant.slot);
                }
                Access::Await(_) => {
                    if let Some(at) = self.ahead.iter().position(|ahead| ahead.load.key == grant.key) {
                        let Ahead { load, .. } = self.ahead.remove(at);
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
            gpu.compute.wait(&self.uploads[slot.index()]).map_err(failed("cuStreamWaitEvent"))?;
        }
        self.send_table(gpu)?;
        Ok(loaded.len())
    }

    /// Begins an upload. If it fails, the slot is empty and nobody is told of the expert.
    fn upload(
        &mut self,
        gpu: &Gpu,
        host: &mut HostTier,
        stream: &CudaStream,
        key: ExpertKey,
        slot: SlotId,
    ) -> Result<(), CudaError> {
        let begun = self.begin_upload(gpu, host, stream, key, slot);
        if begun.is_err() {
            self.residency.load_failed(slot);
        }
        begun
    }

    fn begin_upload(
        &self,
        gpu: &Gpu,
        host: &mut HostTier,
        stream: &CudaStream,
        key: ExpertKey,
        slot: SlotId,
    ) -> Result<(), CudaError> {
        let done = &self.uploads[slot.index()];
        // The upload before it may have been begun on the other stream and not be over.
        stream.wait(done).map_err(failed("cuStreamWaitEvent"))?;
        let found = host.find(gpu, key)?;
        let to = self.slab.address() + (slot.index() * self.expert_bytes) as u64;
        // SAFETY: no pass that could read the slot runs (see the file's head), the upload before it is waited for,
        // and a place of the host is filled again only after `read`.
        unsafe { gpu.upload(stream, found.bytes, to) }?;
        done.record(stream).map_err(failed("cuEventRecord"))?;
        match found.read {
            Some(read) => read.record(stream).map_err(failed("cuEventRecord")),
            None => Ok(()),
        }
    }

    /// The next table has the expert. Its upload is begun, and will be waited for.
    fn enter(&mut self, key: ExpertKey, slot: SlotId) {
        self.residency.loaded(slot);
        let place = self.place(key);
        self.mirror[place] = slot.index() as i32;
        self.is_dirty = true;
    }

    /// As [`Experts::enter`], for a pass that must wait for it itself.
    fn enter_awaited(&mut self, Ahead { load, number }: Ahead) {
        self.enter(load.key, load.slot);
        let awaited = &mut self.awaited[usize::from(load.key.layer.0)];
        if awaited.is_none_or(|(last, _)| last < number) {
            *awaited = Some((number, load.slot));
        }
    }

    fn leave(&mut self, key: ExpertKey) {
        let place = self.place(key);
        self.mirror[place] = -1;
        self.is_dirty = true;
    }

    fn place(&self, key: ExpertKey) -> usize {
        usize::from(key.layer.0) * self.num_experts + usize::from(key.expert.0)
    }

    fn send_table(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        if std::mem::take(&mut self.is_dirty) {
            gpu.write(self.table.address(), plain_bytes(&self.mirror))?;
        }
        Ok(())
    }
}

/// A plan or a call that names experts the model does not have.
fn refused(error: sida_routing::residency::ResidencyError) -> CudaError {
    CudaError::Plan { reason: error.to_string() }
}
