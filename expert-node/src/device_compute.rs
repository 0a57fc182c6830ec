//! One call on a device: what is resident is computed while what is missing is on its way there, then the rest, in as few
//! computations as there are waits. The counterpart of [`crate::compute`] where slots are not in this machine's memory.
//!
//! A call waits for another's load, or for a slot, only while it holds none: so calls cannot wait for each other in a
//! circle.

use std::time::{Duration, Instant};

use sida_cluster::experts::{CallError, CallReport, ExpertCall};
use sida_model::{ExpertDevice, ModelError, SlotRows};
use sida_routing::ExpertKey;

use crate::{
    cache::{ExpertCache, Granted, Pinned},
    compute::{GroupRows, refused, split},
};

/// Loads that a call begins before it computes and gives slots back: enough that waiting between rounds does not tell.
const LOADS_PER_ROUND: usize = 16;

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
    let key = |group: usize| ExpertKey { layer: call.layer, expert: call.groups[group].expert };
    let mut pending = cache.call(call.layer, call.groups.iter().map(|group| group.expert), planned).map_err(refused)?;
    let mut groups = split(d_model, call, out);
    let (mut granted, mut demand_loads, mut load) = (Vec::new(), 0, Duration::ZERO);
    while !pending.is_empty() {
        let waited = Instant::now();
        pending.acquire_waiting(LOADS_PER_ROUND, &mut granted);
        load += waited.elapsed();
        let (mut ready, mut loading, mut awaited) = (Vec::new(), Vec::new(), Vec::new());
        for (group, granted) in granted.drain(..) {
            match granted {
                Granted::Ready(expert) => ready.push((group, expert)),
                Granted::ToLoad(mut unfilled) => {
                    unfilled.begin().map_err(|error| failed(cache, key(group), error))?;
                    loading.push((group, unfilled));
                }
                Granted::LoadedByOther(other) => awaited.push((group, other)),
            }
        }
        run(device, &mut groups, ready).map_err(|error| failed(cache, key(0), error))?;
        let waited = Instant::now();
        demand_loads += loading.len();
        let loaded = loading
            .into_iter()
            .map(|(group, unfilled)| match unfilled.finish() {
                Ok(Some(expert)) => Ok((group, expert)),
                Ok(None) => unreachable!("a demand load is the call's own"),
                Err(error) => Err(failed(cache, key(group), error)),
            })
            .collect::<Result<Vec<_>, _>>()?;
        load += waited.elapsed();
        run(device, &mut groups, loaded).map_err(|error| failed(cache, key(0), error))?;
        // Nothing of the call's own is held any more.
        for (group, other) in awaited {
            let waited = Instant::now();
            // A load that failed sends the expert back to `pending`, to be loaded by this call.
            let expert = other.wait(&mut pending);
            load += waited.elapsed();
            if let Some(expert) = expert {
                demand_loads += 1;
                run(device, &mut groups, vec![(group, expert)]).map_err(|error| failed(cache, key(group), error))?;
            }
        }
    }
    let compute = start.elapsed().saturating_sub(load);
    cache.measures.computed(call.activations.len() / d_model, compute);
    Ok(CallReport { hits: (call.groups.len() - demand_loads) as u32, demand_loads: demand_loads as u32, load, compute })
}

/// Computes the rows of these groups, whose experts are there, and gives the slots back.
fn run(
    device: &dyn ExpertDevice,
    groups: &mut [Option<GroupRows<'_>>],
    experts: Vec<(usize, Pinned<'_>)>,
) -> Result<(), ModelError> {
    if experts.is_empty() {
        return Ok(());
    }
    let rows = experts.iter().map(|(group, expert)| {
        let rows = groups[*group].take().expect("an expert is granted once per call");
        SlotRows { slot: expert.slot(), x: rows.x, out: rows.out }
    });
    device.compute(&mut rows.collect::<Vec<_>>())
}

fn failed(cache: &ExpertCache, key: ExpertKey, error: ModelError) -> CallError {
    cache.note_failure(&error);
    match error {
        ModelError::Device(error) => CallError::Device { reason: error.to_string() },
        error => CallError::Load { key, reason: error.to_string() },
    }
}
