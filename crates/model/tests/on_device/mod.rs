//! A model on a GPU for tests: passes with the experts of a slab beside them, within so many slots. What is missing is loaded
//! when a pass stops for it, and computed where the rows are. This is what a coordinator and an expert-node do together, in
//! its simplest form.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use sida_model::{
    Backend, Beside, Checkpoint, DeviceSlots, ExpertDevice, ExpertSlot, ExpertStore, ModelConfig, MoeRows, NewSequence,
    Passed, Precision, ResidentExperts, Residents, SlotRun, Spans, Stack, Urgency, Wanted,
    cuda::{DeviceDense, DeviceSequence, DeviceSlab, DeviceStates, Gpu},
};
use sida_routing::{
    ExpertId, ExpertKey, Group, Grouping, LayerId, Plan, PlanId,
    residency::{Access, Residency, ResidencyConfig, ResidencyCounters, Room, SlotId},
};

/// Rows of a batch at most.
pub(crate) const ROWS_MAX: usize = 2048;
/// Tokens of a sequence at most.
const TOKENS_MAX: usize = 1200;

/// How a model is put on a device.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) precision: Precision,
    /// Share of all experts that there are slots for, and no fewer than a layer's.
    pub(crate) share: f64,
    /// Page-locked memory for experts.
    pub(crate) host_bytes: u64,
    pub(crate) packs: bool,
    /// Where all fit: they are there before the first pass, or they all come while the first layers run.
    pub(crate) comes_late: bool,
}

/// The dense part and the experts of a model on one device.
pub(crate) struct OnDevice {
    pub(crate) dense: DeviceDense,
    experts: Arc<SlabExperts>,
    beside: Arc<dyn ResidentExperts>,
    config: ModelConfig,
    pub(crate) is_packed: bool,
    states: Option<DeviceStates>,
}

/// The experts of a slab, by the decisions that an expert-node takes.
pub(crate) struct SlabExperts {
    slab: Arc<DeviceSlab>,
    slots: DeviceSlots,
    residency: Mutex<Residency>,
}

/// Experts that all come between the first hold of a pass and the second.
struct LateExperts {
    experts: Arc<SlabExperts>,
    holds: AtomicUsize,
}

/// What a pass saw.
pub(crate) struct Seen {
    /// For each MoE layer of the stack, the expert of every row.
    pub(crate) experts: Vec<Vec<u16>>,
    /// Experts that had to be loaded because the pass stopped for them.
    pub(crate) demand_loads: usize,
    /// The best token of each row that was wanted.
    pub(crate) tokens: Vec<u32>,
}

impl OnDevice {
    pub(crate) fn open(dir: &Path, ordinal: usize, options: Options) -> Self {
        let Options { precision, share, host_bytes, packs, comes_late } = options;
        let checkpoint = Checkpoint::open(dir).unwrap();
        let store = ExpertStore::open(checkpoint.clone()).unwrap();
        let config = checkpoint.config().clone();
        let (layers, num_experts) = (config.moe_layer_count(), config.num_experts);
        let slots = (((layers * num_experts) as f64 * share) as usize).max(num_experts);
        let mut dense = DeviceDense::open(Gpu::open(ordinal).unwrap(), &checkpoint, precision, ROWS_MAX).unwrap();
        let slot = ExpertSlot::choose(&store, precision, packs).unwrap();
        let is_packed = slot.is_packed();
        let slab = DeviceSlab::open(Gpu::open(ordinal).unwrap(), store, slot, slots, host_bytes).unwrap();
        let slab = Arc::new(slab);
        let beside = slab.clone().slots_beside(&dense.device().unwrap()).expect("both are on one device");
        let residency = Residency::new(ResidencyConfig { slots, layers, num_experts, plans_max: 64 });
        let experts = Arc::new(SlabExperts { slab, slots: beside, residency: Mutex::new(residency) });
        let beside: Arc<dyn ResidentExperts> = match comes_late {
            true => Arc::new(LateExperts { experts: experts.clone(), holds: AtomicUsize::new(0) }),
            false => experts.clone(),
        };
        if slots == layers * num_experts && !comes_late {
            experts.load_all();
        }
        Self { dense, experts, beside, config, is_packed, states: None }
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn counters(&self) -> ResidencyCounters {
        self.experts.residency.lock().unwrap().counters()
    }

    pub(crate) fn plan(&self, plan: &Plan) {
        self.experts.residency.lock().unwrap().plan(plan).unwrap();
    }

    pub(crate) fn release(&self, plan: PlanId) {
        self.experts.residency.lock().unwrap().release(plan);
    }

    /// For a thread that loads ahead while passes run.
    pub(crate) fn experts(&self) -> Arc<SlabExperts> {
        self.experts.clone()
    }

    /// Encodes prompts; the states are there until the next pass.
    pub(crate) fn encode(&mut self, ids: &[u32], spans: &Spans) -> Seen {
        self.pass(Stack::Encoder, ids, spans, Vec::new(), &[])
    }

    /// Decodes the new tokens of sequences, and chooses the best token after each wanted row.
    pub(crate) fn decode(
        &mut self,
        ids: &[u32],
        spans: &Spans,
        sequences: &mut [DeviceSequence],
        wanted: &[u32],
    ) -> Seen {
        let wanted: Vec<Wanted> = wanted.iter().map(|&row| Wanted { row, banned: None }).collect();
        self.pass(Stack::Decoder, ids, spans, sequences.iter_mut().collect(), &wanted)
    }

    /// The states of the last encoding, (rows, d_model).
    pub(crate) fn states(&mut self) -> Vec<f32> {
        let mut buffer = Vec::new();
        self.dense.values(self.states.as_ref().unwrap(), &mut buffer).unwrap().to_vec()
    }

    /// The logits after rows of the last decoding, (rows, vocab_size).
    pub(crate) fn logits(&mut self, rows: usize) -> Vec<f32> {
        let rows: Vec<usize> = (0..rows).collect();
        self.dense.logits(self.states.as_ref().unwrap(), &rows).unwrap()
    }

    /// What the last norm makes of the states of the last pass, which is over with it.
    pub(crate) fn last_hidden(&mut self) -> Vec<f32> {
        let states = self.dense.last_hidden(self.states.take().unwrap()).unwrap();
        self.dense.values(&states, &mut Vec::new()).unwrap().to_vec()
    }

    /// Sequences before their first token, of a model whose decoder reads the input.
    pub(crate) fn start_empty(&mut self, count: usize) -> Vec<DeviceSequence> {
        start_empty(&mut self.dense, count)
    }

    /// A sequence that goes on from the first `tokens` of another one.
    pub(crate) fn fork_prefix(&self, sequence: &DeviceSequence, tokens: usize, tokens_max: usize) -> DeviceSequence {
        self.dense.fork_prefix(sequence, tokens, tokens_max).unwrap()
    }

    /// Sequences before their first token, of the last encoding.
    pub(crate) fn start(&mut self, spans: &Spans) -> Vec<DeviceSequence> {
        start(&mut self.dense, self.states.as_ref().unwrap(), spans)
    }

    fn pass(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: Vec<&mut DeviceSequence>,
        wanted: &[Wanted],
    ) -> Seen {
        let (mut by_layer, mut demand_loads) = (Vec::new(), 0);
        let beside = Beside { wanted, experts: Some(self.beside.clone()), ..Beside::default() };
        let mut pass = self.dense.begin(stack, ids, spans, sequences, beside).unwrap();
        while let Some(layer) = self.dense.advance(&mut pass).unwrap() {
            let routes = self.dense.routes(&mut pass).unwrap();
            let grouping = Grouping::new(&routes);
            let experts: Vec<ExpertId> = grouping.groups.iter().map(|group| group.expert).collect();
            let (slots, loads) = self.experts.load(layer, &experts);
            demand_loads += loads;
            let mut first = 0;
            let run = |(group, slot): (&Group, usize)| {
                let rows = group.rows as usize;
                first += rows;
                SlotRun { slot, first: first - rows, rows }
            };
            let runs: Vec<SlotRun> = grouping.groups.iter().zip(slots.iter().copied()).map(run).collect();
            let MoeRows::Device(mut rows) = self.dense.rows(&mut pass) else { panic!("the rows are on the device") };
            rows.group(&grouping).unwrap();
            self.experts.slab.start_beside(&rows, layer, &runs, Box::new(|| ())).unwrap();
            rows.add_computed().unwrap();
            rows.settle().unwrap();
            self.experts.unpin(&slots);
            by_layer.push((layer, routes.experts.into_iter().flatten().collect::<Vec<_>>()));
        }
        let Passed { states, layers } = self.dense.finish(pass).unwrap();
        by_layer.extend(layers.into_iter().map(|passed| (passed.layer, passed.experts)));
        by_layer.sort_by_key(|(layer, _)| layer.0);
        assert_eq!(by_layer.len(), self.config.moe_layers(stack).len(), "every layer is told of once");
        let tokens = match wanted.is_empty() {
            true => Vec::new(),
            false => self.dense.best_tokens(&states, wanted).unwrap().unwrap().into_iter().flatten().collect(),
        };
        self.states = Some(states);
        let ids = |(_, experts): (LayerId, Vec<ExpertId>)| experts.into_iter().map(|expert| expert.0).collect();
        Seen { experts: by_layer.into_iter().map(ids).collect(), demand_loads, tokens }
    }
}

/// Sequences before their first token, of a model whose decoder reads the input.
pub(crate) fn start_empty(dense: &mut DeviceDense, count: usize) -> Vec<DeviceSequence> {
    let new = vec![NewSequence { rows: 0..0, tokens_max: TOKENS_MAX }; count];
    dense.start(None, &new).unwrap().into_iter().map(Result::unwrap).collect()
}

/// Sequences of all prompts of an encoding, with room for the longest answer of these tests.
pub(crate) fn start(dense: &mut DeviceDense, states: &DeviceStates, spans: &Spans) -> Vec<DeviceSequence> {
    let new: Vec<NewSequence> = spans.ranges().map(|rows| NewSequence { rows, tokens_max: TOKENS_MAX }).collect();
    dense.start(Some(states), &new).unwrap().into_iter().map(Result::unwrap).collect()
}

impl SlabExperts {
    fn load_all(&self) {
        let ResidencyConfig { layers, num_experts, .. } = self.residency.lock().unwrap().config();
        for layer in 0..layers as u16 {
            let all: Vec<ExpertId> = (0..num_experts as u16).map(ExpertId).collect();
            let (slots, _) = self.load(LayerId(layer), &all);
            self.unpin(&slots);
        }
    }

    /// Loads what is missing of a layer's experts: the slot of each, pinned, and how many were loaded.
    fn load(&self, layer: LayerId, experts: &[ExpertId]) -> (Vec<usize>, usize) {
        let (mut slots, mut loads) = (vec![usize::MAX; experts.len()], 0);
        let mut pending = self.residency.lock().unwrap().call(layer, experts.iter().copied()).unwrap();
        while !pending.is_empty() {
            let mut grants = Vec::new();
            self.residency.lock().unwrap().acquire(&mut pending, usize::MAX, &mut grants);
            for grant in grants {
                match grant.access {
                    Access::Resident => {}
                    Access::Load { .. } => {
                        self.slab.begin_load(grant.key, grant.slot.index(), Urgency::Demand).unwrap();
                        self.slab.finish_load(grant.slot.index()).unwrap();
                        self.residency.lock().unwrap().loaded(grant.slot);
                        loads += 1;
                    }
                    Access::Await(ticket) => {
                        use sida_routing::residency::Awaited;
                        while self.residency.lock().unwrap().awaited(ticket) == Awaited::Loading {
                            std::thread::yield_now();
                        }
                        loads += 1;
                    }
                }
                slots[grant.group] = grant.slot.index();
            }
        }
        self.residency.lock().unwrap().abandon(pending);
        (slots, loads)
    }

    /// The device is done with slots that were pinned.
    fn unpin(&self, slots: &[usize]) {
        let mut residency = self.residency.lock().unwrap();
        slots.iter().for_each(|&slot| residency.unpin(SlotId(slot as u32)));
    }

    /// Loads the next expert that the first two plans name, in the place of what is used later; whether there was one.
    pub(crate) fn load_ahead(&self) -> bool {
        let load = self.residency.lock().unwrap().next_prefetch_within(2, Room::UsedAfterLayer);
        let Some(load) = load else { return false };
        self.slab.begin_load(load.key, load.slot.index(), Urgency::Ahead).unwrap();
        self.slab.finish_load(load.slot.index()).unwrap();
        self.residency.lock().unwrap().loaded(load.slot);
        true
    }
}

impl ResidentExperts for SlabExperts {
    fn hold(&self, layers: Range<u16>, seen: Option<u64>) -> Option<Residents> {
        let mut residency = self.residency.lock().unwrap();
        residency.hold(layers);
        let (version, is_complete) = (residency.version(), residency.is_complete());
        let slots = residency.resident_slots_by_expert().map(|slot| slot.map_or(-1, |slot| slot.index() as i32));
        (seen != Some(version)).then(|| Residents { version, slots: slots.collect(), is_complete })
    }

    fn release(&self) {
        self.residency.lock().unwrap().hold(0..0);
    }

    fn used(&self, layer: LayerId, groups: &[Group]) {
        let mut residency = self.residency.lock().unwrap();
        let (mut pending, mut grants) = (residency.call(layer, groups.iter().map(|g| g.expert)).unwrap(), Vec::new());
        residency.acquire(&mut pending, 0, &mut grants);
        assert_eq!(grants.len(), groups.len(), "experts that a running pass uses were evicted");
        grants.iter().for_each(|grant| residency.unpin(grant.slot));
        residency.advance(layer);
    }

    fn slots(&self) -> &DeviceSlots {
        &self.slots
    }
}

impl ResidentExperts for LateExperts {
    fn hold(&self, layers: Range<u16>, seen: Option<u64>) -> Option<Residents> {
        if self.holds.fetch_add(1, Ordering::Relaxed) == 1 {
            self.experts.load_all();
        }
        self.experts.hold(layers, seen)
    }

    fn release(&self) {
        self.experts.release();
    }

    fn used(&self, layer: LayerId, groups: &[Group]) {
        self.experts.used(layer, groups);
    }

    fn slots(&self) -> &DeviceSlots {
        self.experts.slots()
    }
}

/// A plan of what passes of a batch through layers from the first on used.
pub(crate) fn plan(number: u64, experts: &[Vec<u16>]) -> Plan {
    let mut keys = Vec::new();
    for (layer, chosen) in experts.iter().enumerate() {
        let mut chosen = chosen.clone();
        chosen.sort_unstable();
        chosen.dedup();
        let key = |expert| ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert) };
        keys.extend(chosen.into_iter().map(key));
    }
    Plan { id: PlanId(number), begins: false, experts: keys }
}
