//! One call on a device: what is resident is computed while what is missing is on its way there, then the rest, in as few
//! computations as there are waits. Its rows come from this machine's memory, are on the device already, or where a coordinator
//! in another process left them (a window). The counterpart of [`crate::compute`] where slots are not in this machine's memory.
//!
//! A call waits for another's load, or for a slot, only while it holds none but those that the device will be through with
//! by itself: so calls cannot wait for each other in a circle.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sida_cluster::experts::{CallError, CallReport, ExpertCall};
use sida_model::{ExpertDevice, ExpertWindow, ModelError, RowsOnDevice, SlotRows, SlotRun};
use sida_routing::{ExpertKey, Group, LayerId, PlacedGroup};

use crate::{
    cache::{ExpertCache, Granted, Kept, PendingCall, Pinned},
    compute::{refused, split},
};

/// Loads that a call begins before it computes and gives slots back: enough that waiting between rounds does not tell.
const LOADS_PER_ROUND: usize = 16;

/// Experts of a call that are there: their positions in it, and their pins.
type There<'c> = Vec<(usize, Pinned<'c>)>;

/// Computes a call whose lengths fit; see [`sida_cluster::experts::LocalExperts::compute`]. `planned`: it is a
/// batch's, so that the plans advance by it.
pub(crate) fn compute(
    cache: &ExpertCache,
    device: &dyn ExpertDevice,
    call: ExpertCall<'_>,
    planned: bool,
    out: &mut [f32],
) -> Result<CallReport, CallError> {
    let start = Instant::now();
    let d_model = device.shape().d_model;
    let mut groups = split(d_model, call, out);
    let mut run = |there: There<'_>| {
        let rows = there.iter().map(|(group, expert)| {
            let rows = groups[*group].take().expect("an expert is granted once per call");
            SlotRows { slot: expert.slot(), x: rows.x, out: rows.out }
        });
        device.compute(call.layer, &mut rows.collect::<Vec<_>>())
    };
    let rounds = Rounds::open(cache, call.layer, call.groups, planned)?;
    let mut report = rounds.go(&mut run)?;
    report.compute = start.elapsed().saturating_sub(report.load);
    cache.measures.computed(call.activations.len() / d_model, report.compute);
    Ok(report)
}

/// Starts the rows of a batch that are on the device; see [`sida_cluster::experts::LocalExperts::compute_beside`].
pub(crate) fn compute_beside(
    cache: &Arc<ExpertCache>,
    device: &dyn ExpertDevice,
    layer: LayerId,
    groups: &[PlacedGroup],
    rows: &RowsOnDevice<'_>,
) -> Result<CallReport, CallError> {
    let start = Instant::now();
    let mut run = |there: There<'_>| {
        let runs = runs(groups, &there);
        let count: usize = runs.iter().map(|run| run.rows).sum();
        let kept: Vec<Kept> = there.into_iter().map(|(_, expert)| expert.keep(cache)).collect();
        let measured = cache.clone();
        let done = move || {
            drop(kept);
            measured.measures.computed(count, start.elapsed());
        };
        device.start_beside(rows, layer, &runs, Box::new(done))
    };
    Rounds::open(cache, layer, &unplaced(groups), true)?.go(&mut run)
}

/// Computes rows that a coordinator in another process left in its window, which has these places.
pub(crate) fn compute_in_window(
    cache: &ExpertCache,
    window: &dyn ExpertWindow,
    layer: LayerId,
    groups: &[PlacedGroup],
) -> Result<CallReport, CallError> {
    let start = Instant::now();
    let mut run = |there: There<'_>| window.compute(layer, &runs(groups, &there));
    let mut report = Rounds::open(cache, layer, &unplaced(groups), true)?.go(&mut run)?;
    report.compute = start.elapsed().saturating_sub(report.load);
    cache.measures.computed(groups.iter().map(|group| group.rows as usize).sum(), report.compute);
    Ok(report)
}

fn runs(groups: &[PlacedGroup], there: &There<'_>) -> Vec<SlotRun> {
    let run = |(group, expert): &(usize, Pinned<'_>)| {
        let PlacedGroup { first, rows, .. } = groups[*group];
        SlotRun { slot: expert.slot(), first: first as usize, rows: rows as usize }
    };
    there.iter().map(run).collect()
}

fn unplaced(groups: &[PlacedGroup]) -> Vec<Group> {
    groups.iter().map(|&PlacedGroup { expert, rows, .. }| Group { expert, rows }).collect()
}

/// The experts of a call as they come: what is resident, then what was loaded, until all were there once.
struct Rounds<'c, 'g> {
    cache: &'c ExpertCache,
    layer: LayerId,
    groups: &'g [Group],
    pending: PendingCall<'c>,
}

impl<'c, 'g> Rounds<'c, 'g> {
    fn open(cache: &'c ExpertCache, layer: LayerId, groups: &'g [Group], planned: bool) -> Result<Self, CallError> {
        let pending = cache.call(layer, groups.iter().map(|group| group.expert), planned).map_err(refused)?;
        Ok(Self { cache, layer, groups, pending })
    }

    /// Calls `run` with experts that are there. What it costs but for `compute`.
    fn go(mut self, run: &mut dyn FnMut(There<'c>) -> Result<(), ModelError>) -> Result<CallReport, CallError> {
        let (mut granted, mut demand_loads, mut load) = (Vec::new(), 0, Duration::ZERO);
        while !self.pending.is_empty() {
            let waited = Instant::now();
            self.pending.acquire_waiting(LOADS_PER_ROUND, &mut granted);
            load += waited.elapsed();
            let (mut ready, mut loading, mut awaited) = (Vec::new(), Vec::new(), Vec::new());
            for (group, granted) in granted.drain(..) {
                match granted {
                    Granted::Ready(expert) => ready.push((group, expert)),
                    Granted::ToLoad(mut demanded) => {
                        demanded.begin().map_err(|error| self.failed(group, error))?;
                        loading.push((group, demanded));
                    }
                    Granted::LoadedByOther(other) => awaited.push((group, other)),
                }
            }
            self.run(ready, run)?;
            let waited = Instant::now();
            demand_loads += loading.len() as u32;
            let mut loaded = Vec::with_capacity(loading.len());
            for (group, demanded) in loading {
                let expert = demanded.finish().map_err(|error| self.failed(group, error))?;
                loaded.push((group, expert));
            }
            load += waited.elapsed();
            self.run(loaded, run)?;
            // Nothing of the call's own waits for anybody any more.
            for (group, other) in awaited {
                let waited = Instant::now();
                // A load that failed sends the expert back to `pending`, to be loaded by this call.
                let expert = other.wait(&mut self.pending);
                load += waited.elapsed();
                if let Some(expert) = expert {
                    demand_loads += 1;
                    self.run(vec![(group, expert)], run)?;
                }
            }
        }
        let hits = self.groups.len() as u32 - demand_loads;
        Ok(CallReport { hits, demand_loads, load, compute: Duration::ZERO })
    }

    fn run(&self, there: There<'c>, run: &mut dyn FnMut(There<'c>) -> Result<(), ModelError>) -> Result<(), CallError> {
        match there.first() {
            None => Ok(()),
            Some(&(group, _)) => run(there).map_err(|error| self.failed(group, error)),
        }
    }

    fn failed(&self, group: usize, error: ModelError) -> CallError {
        self.cache.note_failure(&error);
        match error {
            ModelError::Device(error) => CallError::Device { reason: error.to_string() },
            error => {
                let key = ExpertKey { layer: self.layer, expert: self.groups[group].expert };
                CallError::Load { key, reason: error.to_string() }
            }
        }
    }
}
