//! An expert-node without its network: expert memory, the threads that compute, and the thread that loads ahead.
//! The coordinator of the same process calls it directly, [`crate::lane`] for those of other processes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts, ResidencyReport};
use sida_model::{
    Checkpoint, DeviceError, DeviceName, ExpertDevice, ExpertDeviceOptions, ExpertShape, ExpertSlot, ExpertStore,
    ExpertWindow, ModelError, ResidentExperts, RowsOnDevice, WindowHandle, expert_device,
};
use sida_proto::wire::Bounds;
use sida_routing::{Digest, ExpertId, ExpertKey, Group, LayerId, NodeId, PlacedGroup, Plan, PlanId};
use sida_telemetry::Seldom;

use crate::{
    cache::{ExpertCache, Memory},
    compute::{self, Workers},
    config::{ExpertNodeConfig, ExpertNodeLimits},
    device_compute,
    error::ExpertNodeError,
    follow_placement,
    measures::Measures,
    prefetch,
    resident::NodeResidents,
    slots::{Slab, slot_bytes},
    source::ExpertSource,
};

/// A call needs a slot while a prefetch fills another.
const SLOTS_MIN: u64 = 2;

/// An expert-node without its network. Calls may come from any number of threads.
pub struct Engine {
    node: NodeId,
    cache: Arc<ExpertCache>,
    workers: Workers,
    budget_bytes: u64,
    expert_bytes: u64,
    rows: Arc<AtomicU64>,
    /// Log lines of calls that failed.
    pub(crate) failures: Seldom,
    /// `None` once it was stopped.
    loader: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Opens the model of `config`.
    pub fn open(config: &ExpertNodeConfig) -> Result<Self, ExpertNodeError> {
        Self::of_checkpoint(config, Checkpoint::open(&config.model_dir)?)
    }

    /// Serves the experts of a checkpoint that is open already: a process of several nodes maps a model once.
    pub fn of_checkpoint(config: &ExpertNodeConfig, checkpoint: Arc<Checkpoint>) -> Result<Self, ExpertNodeError> {
        let store = ExpertStore::open(checkpoint)?;
        if config.device == DeviceName::Cpu {
            return Self::new(config, Arc::new(store));
        }
        let precision = config.precision.unwrap_or(store.precision());
        let unpacked = ExpertSlot::choose(&store, precision, false)?;
        let experts = store.config().moe_layer_count() * store.config().num_experts;
        let unpacked_bytes = unpacked.bytes();
        let experts_bytes = (experts * unpacked_bytes) as u64;
        let host_bytes = config.host_memory.bytes(experts_bytes);
        // Where everything fits, packing gains nothing.
        let packs = config.packs && config.expert_memory.bytes(experts_bytes) < experts_bytes;
        let slot = if packs { ExpertSlot::choose(&store, precision, true)? } else { unpacked };
        let slot_bytes = slot.bytes();
        let options = ExpertDeviceOptions { device: config.device, slot, host_bytes };
        let source = Arc::new(store.clone());
        Self::on_device(config, source, unpacked_bytes, slot_bytes, |slots| expert_device::open(options, store, slots))
    }

    /// Takes the memory and starts the threads. Experts come from `source` as they are needed.
    pub fn new(config: &ExpertNodeConfig, source: Arc<dyn ExpertSource>) -> Result<Self, ExpertNodeError> {
        let expert_bytes = source.shape().bytes();
        let budget = Budget::of(config, &*source, expert_bytes, slot_bytes(expert_bytes))?;
        let slab = Slab::new(budget.slots, expert_bytes)?;
        Self::with(config, source, Memory::Host(slab), budget)
    }

    /// As [`Engine::new`], with slots of `slot_bytes` on the device that `open` makes for their number. An expert takes
    /// `expert_bytes` where a budget is a share of all of them.
    pub fn on_device(
        config: &ExpertNodeConfig,
        source: Arc<dyn ExpertSource>,
        expert_bytes: usize,
        slot_bytes: usize,
        open: impl FnOnce(usize) -> Result<Arc<dyn ExpertDevice>, ModelError>,
    ) -> Result<Self, ExpertNodeError> {
        let budget = Budget::of(config, &*source, expert_bytes, slot_bytes)?;
        Self::with(config, source, Memory::Device(open(budget.slots)?), budget)
    }

    fn with(
        config: &ExpertNodeConfig,
        source: Arc<dyn ExpertSource>,
        memory: Memory,
        budget: Budget,
    ) -> Result<Self, ExpertNodeError> {
        let Budget { bytes: budget_bytes, slots, expert_bytes } = budget;
        let measures = Measures::new(&config.node, source.layers(), expert_bytes, budget_bytes);
        let cache = Arc::new(ExpertCache::new(source, memory, slots, config.limits.plans_max, measures));
        let workers = Workers::new(config.threads);
        let loader = Mutex::new(Some(prefetch::start(cache.clone())?));
        Ok(Self {
            node: config.node.clone(),
            cache,
            workers,
            budget_bytes,
            expert_bytes,
            rows: Arc::new(AtomicU64::new(0)),
            failures: Seldom::default(),
            loader,
        })
    }

    /// The node's name.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The shape of its experts.
    pub fn shape(&self) -> &ExpertShape {
        self.cache.shape()
    }

    /// Which model they are of.
    pub fn model(&self) -> Digest {
        self.cache.source().model()
    }

    /// Which experts of that model they are, if that is known.
    pub fn experts(&self) -> Option<Digest> {
        self.cache.source().experts()
    }

    /// Its expert memory.
    pub(crate) fn cache(&self) -> &ExpertCache {
        &self.cache
    }

    /// What messages to this node may hold.
    pub(crate) fn bounds(&self, limits: &ExpertNodeLimits) -> Bounds {
        let source = self.cache.source();
        Bounds {
            moe_layers: source.layers(),
            num_experts: source.num_experts(),
            d_model: self.shape().d_model,
            rows_max: limits.call_rows_max,
            // Nothing with tokens comes here.
            vocab_size: 0,
            tokens_max: 0,
            sequences_max: 0,
        }
    }

    /// Computes one row with one expert, a resident one where there is any, so that a healthy node stays as
    /// it is. No plan advances.
    pub(crate) fn probe(&self) -> Result<(), CallError> {
        let first = ExpertKey { layer: LayerId(0), expert: ExpertId(0) };
        let key = self.cache.residency(|residency| residency.resident().next()).map_or(first, |(key, _)| key);
        let groups = [Group { expert: key.expert, rows: 1 }];
        let (activations, mut out) = (vec![1.0; self.shape().d_model], vec![0.0; self.shape().d_model]);
        let call = ExpertCall { layer: key.layer, groups: &groups, activations: &activations };
        self.check(&call, &out)?;
        self.run(call, false, &mut out)?;
        Ok(())
    }

    /// Maps the rows of a coordinator in another process of this machine.
    pub(crate) fn open_window(&self, rows: &WindowHandle) -> Result<Arc<dyn ExpertWindow>, ModelError> {
        match self.cache.memory() {
            Memory::Host(_) => Err(DeviceError::Refused("this node computes on the processor".to_owned()).into()),
            Memory::Device(device) => device.clone().open_window(rows),
        }
    }

    /// Computes the rows of one layer that are in a window of this node.
    pub(crate) fn compute_in_window(
        &self,
        window: &dyn ExpertWindow,
        layer: LayerId,
        groups: &[PlacedGroup],
    ) -> Result<CallReport, CallError> {
        if self.cache.is_closed() {
            return Err(CallError::ShuttingDown);
        }
        let end = |group: &PlacedGroup| u64::from(group.first) + u64::from(group.rows);
        if let Some(group) = groups.iter().find(|group| end(group) > window.rows() as u64) {
            let (expert, end, places) = (group.expert, end(group), window.rows());
            return Err(CallError::Malformed(format!(
                "expert {expert}'s rows end at place {end} of a window of {places}"
            )));
        }
        let report = device_compute::compute_in_window(&self.cache, window, layer, groups)?;
        self.note_rows(groups);
        Ok(report)
    }

    fn note_rows(&self, groups: &[PlacedGroup]) {
        self.rows.fetch_add(groups.iter().map(|group| u64::from(group.rows)).sum(), Ordering::Relaxed);
    }

    /// Loads these experts (ascending), as far as there is room that nobody misses, or until the node is closed; how many. What
    /// is loaded is there when a request needs it.
    pub fn load_ahead(&self, experts: &[ExpertKey]) -> usize {
        follow_placement::load(&self.cache, experts, || true).unwrap_or_default()
    }

    /// Whether its experts are on a device.
    pub(crate) fn has_device(&self) -> bool {
        matches!(self.cache.memory(), Memory::Device(_))
    }

    /// Takes no further call, and stops loading ahead. Calls that run come to their end.
    pub fn close(&self) {
        self.cache.close();
        if let Some(loader) = self.loader.lock().take()
            && loader.join().is_err()
        {
            tracing::error!(node = %self.node, "the prefetch thread panicked");
        }
    }

    /// Whether it can never compute again: its device is lost.
    pub fn is_lost(&self) -> bool {
        self.cache.is_lost()
    }

    fn run(&self, call: ExpertCall<'_>, planned: bool, out: &mut [f32]) -> Result<CallReport, CallError> {
        match self.cache.memory() {
            Memory::Host(_) => compute::compute(&self.cache, &self.workers, call, planned, out),
            Memory::Device(device) => device_compute::compute(&self.cache, &**device, call, planned, out),
        }
    }

    fn check(&self, call: &ExpertCall<'_>, out: &[f32]) -> Result<(), CallError> {
        if self.cache.is_closed() {
            return Err(CallError::ShuttingDown);
        }
        if let Some(group) = call.groups.iter().find(|group| group.rows == 0) {
            return Err(CallError::Malformed(format!("expert {} is given no rows", group.expert)));
        }
        let rows: u64 = call.groups.iter().map(|group| u64::from(group.rows)).sum();
        let (expected, d_model) = (rows.saturating_mul(self.shape().d_model as u64), self.shape().d_model);
        for (what, found) in [("activations", call.activations.len()), ("results", out.len())] {
            if found as u64 != expected {
                let reason = format!("{rows} rows of {d_model} need {expected} {what}, found {found}");
                return Err(CallError::Malformed(reason));
            }
        }
        Ok(())
    }
}

/// Expert memory, cut into slots.
struct Budget {
    bytes: u64,
    slots: usize,
    /// What an expert takes of it, without what a slot is rounded up by.
    expert_bytes: u64,
}

impl Budget {
    /// For experts of `expert_bytes`, which take `slot_bytes` each.
    fn of(
        config: &ExpertNodeConfig,
        source: &dyn ExpertSource,
        expert_bytes: usize,
        slot_bytes: usize,
    ) -> Result<Self, ExpertNodeError> {
        let experts = (source.layers() * source.num_experts()) as u64;
        let (expert_bytes, slot_bytes) = (expert_bytes as u64, slot_bytes as u64);
        let budget_bytes = config.expert_memory.bytes(experts * expert_bytes);
        // More slots than experts would never be filled; a model of one expert is content with one.
        let slots = (budget_bytes / slot_bytes).min(experts);
        if slots < SLOTS_MIN.min(experts) {
            let (needed_bytes, experts_bytes) = (SLOTS_MIN.min(experts) * slot_bytes, experts * expert_bytes);
            return Err(ExpertNodeError::BudgetTooSmall { budget_bytes, needed_bytes, experts_bytes });
        }
        Ok(Self { bytes: budget_bytes, slots: slots as usize, expert_bytes: expert_bytes.min(slot_bytes) })
    }
}

impl LocalExperts for Engine {
    fn plan(&self, plan: Plan) {
        if let Err(error) = self.cache.residency(|residency| residency.plan(&plan)) {
            // A hint: whoever sent it loses time, not results.
            tracing::warn!(node = %self.node, plan = plan.id.0, %error, "plan refused");
        }
    }

    fn release(&self, plan: PlanId) {
        self.cache.residency(|residency| residency.release(plan));
    }

    fn compute(&self, call: ExpertCall<'_>, out: &mut [f32]) -> Result<CallReport, CallError> {
        self.check(&call, out)?;
        let report = self.run(call, true, out)?;
        self.rows.fetch_add((call.activations.len() / self.shape().d_model) as u64, Ordering::Relaxed);
        Ok(report)
    }

    fn compute_beside(
        &self,
        layer: LayerId,
        groups: &[PlacedGroup],
        rows: &RowsOnDevice<'_>,
    ) -> Option<Result<CallReport, CallError>> {
        let Memory::Device(device) = self.cache.memory() else { return None };
        if !device.is_beside(rows) {
            return None;
        }
        if self.cache.is_closed() {
            return Some(Err(CallError::ShuttingDown));
        }
        let started = device_compute::compute_beside(&self.cache, &**device, layer, groups, rows);
        self.note_rows(groups);
        Some(started)
    }

    fn resident_beside(&self, rows: &RowsOnDevice<'_>) -> Option<Arc<dyn ResidentExperts>> {
        let Memory::Device(device) = self.cache.memory() else { return None };
        let slots = device.clone().slots_beside(rows).filter(|_| !self.cache.is_closed())?;
        Some(Arc::new(NodeResidents { cache: self.cache.clone(), slots, rows: self.rows.clone() }))
    }

    fn resident_count(&self) -> usize {
        self.cache.residency(|residency| residency.resident_slots())
    }

    fn gains_by_plans(&self) -> bool {
        self.cache.residency(|residency| residency.gains_by_plans())
    }

    fn residency(&self) -> ResidencyReport {
        self.cache.residency(|residency| {
            let resident: Vec<_> = residency.resident().map(|(key, _)| key).collect();
            let counters = residency.counters();
            ResidencyReport {
                resident_bytes: resident.len() as u64 * self.expert_bytes,
                budget_bytes: self.budget_bytes,
                slots: residency.config().slots as u64,
                demand_loads: counters.demand_loads,
                prefetch_loads: counters.prefetch_loads,
                evictions: counters.evictions,
                rows: self.rows.load(Ordering::Relaxed),
                resident,
            }
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
