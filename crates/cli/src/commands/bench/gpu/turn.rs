//! One subject's turn: batches one after the other for a while, each timed by the host from its ids to its answer.

use std::time::{Duration, Instant};

use sida_model::{
    Spans,
    cuda::{CudaError, DeviceModel, DeviceSequence, Passed, distinct},
};
use sida_routing::{ExpertId, ExpertKey, LayerId, Plan, PlanId};

use super::{
    inputs::Inputs,
    settings::{GpuSettings, Method},
};

/// Batches before the measurement: enough for every graph to be recorded and every cache to fill.
const WARM_UP_ENCODE: usize = 16;
const WARM_UP_GENERATE: usize = 4;
/// Batches of a measurement, however long they take.
const BATCHES_MIN: usize = 5;

/// How experts come to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loading {
    /// All are there.
    AllResident,
    /// By plans, so many batches ahead of the one that begins.
    Planned(usize),
    /// When a router chose them.
    OnDemand,
    /// When a router chose them, and they leave with their batch: offloading without residency.
    NothingKept,
}

/// What is measured: a budget, and how experts come to be within it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Subject {
    /// Of all experts.
    pub(super) share: f64,
    pub(super) loading: Loading,
}

impl Subject {
    /// Everything resident, then each budget in all ways that the settings ask for.
    pub(super) fn all(settings: &GpuSettings) -> Vec<Self> {
        let mut ways = vec![Loading::Planned(settings.lookahead), Loading::OnDemand];
        if settings.nothing_kept {
            ways.push(Loading::NothingKept);
        }
        let of = |&share: &f64| ways.iter().map(move |&loading| Self { share, loading }).collect::<Vec<_>>();
        let budgets = settings.budgets.iter().flat_map(of);
        [Self { share: 1.0, loading: Loading::AllResident }].into_iter().chain(budgets).collect()
    }

    pub(super) fn is_all_resident(&self) -> bool {
        self.loading == Loading::AllResident
    }

    pub(super) fn label(&self) -> String {
        let percent = self.share * 100.0;
        match self.loading {
            Loading::AllResident => "all resident".to_owned(),
            Loading::Planned(lookahead) => format!("{percent:.0}%, planned {lookahead} ahead"),
            Loading::OnDemand => format!("{percent:.0}%, on demand"),
            Loading::NothingKept => format!("{percent:.0}%, nothing kept"),
        }
    }

    /// Batches ahead whose plans are queued, if there are plans.
    fn lookahead(&self) -> Option<u64> {
        match self.loading {
            Loading::Planned(lookahead) => Some(lookahead as u64),
            _ => None,
        }
    }
}

/// For each batch, the distinct experts of every MoE layer that it used, ascending.
pub(super) type Routed = Vec<Vec<Vec<u16>>>;

/// What a turn saw.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken {
    /// Of each batch.
    pub(super) seconds: Vec<f64>,
    pub(super) demand_loads: u64,
    pub(super) prefetch_loads: u64,
    /// Waiting for what was demanded, of all batches together.
    pub(super) load: Duration,
}

/// One turn: a subject, and what it computes for how long.
pub(super) struct Turn<'t> {
    pub(super) subject: &'t Subject,
    pub(super) input: &'t Inputs,
    pub(super) routed: &'t Routed,
    pub(super) hint_rate: f64,
    pub(super) seconds: f64,
}

/// What a batch went through.
#[derive(Default)]
struct Batch {
    /// For each MoE layer of the model, the distinct experts.
    experts: Vec<Vec<u16>>,
    load: Duration,
    /// Of an encoding, as they lie on the device.
    states: Vec<u8>,
}

impl Batch {
    fn take(&mut self, first_layer: usize, passed: Passed) {
        self.load += passed.load;
        for (index, chosen) in passed.experts.iter().enumerate() {
            let at = first_layer + index;
            self.experts.resize(self.experts.len().max(at + 1), Vec::new());
            let before = std::mem::take(&mut self.experts[at]);
            let all = distinct(chosen).into_iter().map(|expert| expert.0).chain(before).collect::<Vec<u16>>();
            self.experts[at] = distinct(&all).into_iter().map(|expert| expert.0).collect();
        }
    }
}

/// What each batch of an input uses. Every expert must be resident.
pub(super) fn route(model: &mut DeviceModel, input: &Inputs) -> Result<Routed, CudaError> {
    input.batches.iter().map(|ids| Ok(answer(model, input, ids, Vec::new())?.experts)).collect()
}

/// One batch, from ids to states or tokens on the host.
fn answer(model: &mut DeviceModel, input: &Inputs, ids: &[u32], states: Vec<u8>) -> Result<Batch, CudaError> {
    let mut batch = Batch { states, ..Batch::default() };
    batch.take(0, model.encode(ids, &input.spans)?);
    let Method::Generate(new_tokens) = input.case.method else {
        model.read_states(ids.len(), &mut batch.states)?;
        return Ok(batch);
    };
    let mut sequences = model.start(&input.spans)?;
    let count = input.case.sequences;
    let first_layer = usize::from(model.config().moe_layers(sida_model::Stack::Decoder).start);
    let steps = Spans::single_tokens(count);
    let wanted: Vec<u32> = (0..count as u32).collect();
    let mut tokens = vec![model.config().decoder_start_token_id; count];
    for _ in 0..new_tokens {
        let mut states: Vec<&mut DeviceSequence> = sequences.iter_mut().collect();
        let passed = model.decode(&tokens, &steps, &mut states, &wanted)?;
        tokens.clone_from(&passed.tokens);
        batch.take(first_layer, passed);
    }
    Ok(batch)
}

impl Turn<'_> {
    /// Warms up, then measures.
    pub(super) fn take(&self, model: &mut DeviceModel) -> Result<Taken, CudaError> {
        let (mut number, mut states) = (0, Vec::new());
        for ahead in 0..self.subject.lookahead().unwrap_or(0) {
            model.plan(&self.plan(model, ahead))?;
        }
        let warm_up = match self.input.case.method {
            Method::Encode => WARM_UP_ENCODE,
            Method::Generate(_) => WARM_UP_GENERATE,
        };
        for _ in 0..warm_up {
            self.prepare(model);
            self.batch(model, &mut number, &mut states)?;
        }
        let before = model.counters();
        let mut taken = Taken::default();
        let begun = Instant::now();
        while begun.elapsed().as_secs_f64() < self.seconds || taken.seconds.len() < BATCHES_MIN {
            self.prepare(model);
            let start = Instant::now();
            taken.load += self.batch(model, &mut number, &mut states)?;
            taken.seconds.push(start.elapsed().as_secs_f64());
        }
        let after = model.counters();
        taken.demand_loads = after.demand_loads - before.demand_loads;
        taken.prefetch_loads = after.prefetch_loads - before.prefetch_loads;
        for ahead in 0..self.subject.lookahead().unwrap_or(0) {
            model.release(PlanId(number + ahead));
        }
        Ok(taken)
    }

    /// What is not measured of a batch.
    fn prepare(&self, model: &mut DeviceModel) {
        if self.subject.loading == Loading::NothingKept {
            model.evict_experts();
        }
    }

    /// One batch. Where there are plans, those of the batches up to the lookahead are queued already, and one more is
    /// before it begins: so much of the future a server with a queue knows.
    fn batch(&self, model: &mut DeviceModel, number: &mut u64, states: &mut Vec<u8>) -> Result<Duration, CudaError> {
        let ids = &self.input.batches[*number as usize % self.input.batches.len()];
        if let Some(lookahead) = self.subject.lookahead() {
            model.plan(&self.plan(model, *number + lookahead))?;
            model.begin_batch(Some(PlanId(*number)));
        }
        let batch = answer(model, self.input, ids, std::mem::take(states))?;
        if self.subject.lookahead().is_some() {
            model.release(PlanId(*number));
        }
        *number += 1;
        *states = batch.states;
        Ok(batch.load)
    }

    /// What a predictor of this hit rate would say of a batch: each entry is right, or else any other expert.
    fn plan(&self, model: &DeviceModel, number: u64) -> Plan {
        let routed = &self.routed[number as usize % self.routed.len()];
        let num_experts = model.config().num_experts as u64;
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let mut experts: Vec<ExpertKey> = Vec::new();
        for (layer, chosen) in routed.iter().enumerate() {
            let mut named: Vec<u16> = chosen
                .iter()
                .map(|&expert| match (draw() % 1000) as f64 / 1000.0 < self.hint_rate {
                    true => expert,
                    false => (draw() % num_experts) as u16,
                })
                .collect();
            named.sort_unstable();
            named.dedup();
            let layer = LayerId(layer as u16);
            experts.extend(named.into_iter().map(|expert| ExpertKey { layer, expert: ExpertId(expert) }));
        }
        Plan { id: PlanId(number), begins: false, experts }
    }
}
