//! One call: the rows of one MoE layer through their experts. Workers take groups from a queue, large ones in parts;
//! for each they load the expert if it is missing, compute its rows straight into their place in the result, and give
//! the slot back. The queue asks for missing experts only a few at a time, so that a call of a whole layer passes through
//! few slots and leaves the others what they hold. Called by [`crate::engine`].
//!
//! A call waits (for another's load, for a slot) only on the thread that made it, and for a slot only while it
//! holds none: so calls cannot wait for each other in a circle. If that thread is one of the pool, as a
//! coordinator's in the same process is, it works for others while it waits (see `cache`).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_cluster::experts::{CallError, CallReport, ExpertCall};
use sida_model::{ExpertScratch, ExpertShape, side_by_side::side_by_side};
use sida_routing::residency::ResidencyError;

use crate::cache::{Demanded, ExpertCache, Granted, Loading, PendingCall, Pinned};

/// Loads that a call begins before it computes and gives slots back: enough to keep the workers of a small
/// machine busy, few enough to evict little.
const LOADS_PER_ROUND: usize = 4;

/// Waking another thread costs about as much as so many multiplications.
const PARALLEL_MACS_MIN: usize = 2_000_000;
/// A product of so many multiplications is worth splitting (see `sida_kernels::matmul`).
const SPLIT_MACS_MIN: usize = 4_000_000;
/// Reading a byte of weights costs about as much as so many multiplications.
const MACS_PER_WEIGHT_BYTE: usize = 1;

/// A group of more rows than are a worker's share of the call is computed in parts, so that the workers end at about the
/// same time. Each part reads all weights of its expert, for at least this share of as many rows as those are wide.
const PART_ROWS_SHARE: usize = 8;

/// How many threads of the process's pool a node uses, and what they keep from call to call.
pub(crate) struct Workers {
    threads: usize,
    scratches: Mutex<Vec<ExpertScratch>>,
}

/// How much a call is to do, in multiplications or what costs as much.
struct Effort {
    whole: usize,
    largest_group: usize,
}

impl Effort {
    fn of(call: &ExpertCall<'_>, shape: &ExpertShape) -> Self {
        let group = |rows: u32| rows as usize * shape.macs_per_row() + shape.bytes() * MACS_PER_WEIGHT_BYTE;
        let groups = call.groups.iter().map(|g| group(g.rows));
        Self { whole: groups.clone().sum(), largest_group: groups.max().unwrap_or(0) }
    }
}

impl Workers {
    /// At most `threads` threads, which take part in calls that are worth it. They are the pool that everything in
    /// this process computes on: where coordinator and nodes share it, its threads are awake when a call comes.
    pub(crate) fn new(threads: usize) -> Self {
        Self { threads: threads.max(1), scratches: Mutex::new(Vec::new()) }
    }

    /// How many there are.
    fn threads(&self) -> usize {
        rayon::current_num_threads().min(self.threads).max(1)
    }

    /// Runs `work` on as many threads as the call is worth, all at the same time. Returns how many.
    fn run(&self, effort: &Effort, groups: usize, work: impl Fn(&mut ExpertScratch) + Sync) -> u32 {
        let work = || {
            let mut scratch = self.scratches.lock().pop().unwrap_or_default();
            work(&mut scratch);
            self.scratches.lock().push(scratch);
        };
        let threads = self.threads().min(groups);
        if effort.largest_group >= SPLIT_MACS_MIN {
            // From a thread of the pool, so that the products of a large group are split over the same pool.
            rayon::scope(|_| side_by_side(threads, work));
        } else if threads > 1 && effort.whole >= PARALLEL_MACS_MIN {
            side_by_side(threads, work);
        } else {
            work();
            return 1;
        }
        threads as u32
    }
}

/// Rows of one group, and where their results go.
pub(crate) struct GroupRows<'x> {
    pub(crate) x: &'x [f32],
    pub(crate) out: &'x mut [f32],
}

/// What is left of a call.
struct Queue<'c, 'x> {
    d_model: usize,
    /// Floats of a part at most.
    part_floats: usize,
    /// What is to be computed of groups whose expert is there.
    parts: Vec<(GroupRows<'x>, Arc<Pinned<'c>>)>,
    pending: PendingCall<'c>,
    granted: Vec<(usize, Granted<'c>)>,
    /// Granted, but somebody else is loading them.
    awaited: Vec<(usize, Loading<'c>)>,
    /// By position in the call. `None`: taken by the worker that computes it.
    groups: Vec<Option<GroupRows<'x>>>,
    failure: Option<CallError>,
    /// Experts that were not resident.
    demand_loads: u32,
    /// Sum over workers.
    load: Duration,
}

/// What a worker is to do.
enum Next<'c, 'x> {
    Compute(GroupRows<'x>, Arc<Pinned<'c>>),
    /// And then compute.
    Load(GroupRows<'x>, Demanded<'c>),
}

impl<'c, 'x> Queue<'c, 'x> {
    /// What can be computed, or loaded and computed, without waiting for anybody.
    fn next(&mut self) -> Option<Next<'c, 'x>> {
        while self.failure.is_none() {
            if let Some((rows, expert)) = self.parts.pop() {
                return Some(Next::Compute(rows, expert));
            }
            if self.granted.is_empty() && !self.pending.is_empty() {
                // Nothing is loaded while there is something to compute, since that will leave its slot.
                self.pending.acquire(0, &mut self.granted);
                if self.granted.is_empty() {
                    self.pending.acquire(LOADS_PER_ROUND, &mut self.granted);
                }
                // The largest is taken first, so that the workers end at about the same time.
                let rows = |group: &Option<GroupRows<'_>>| group.as_ref().map_or(0, |rows| rows.x.len());
                self.granted.sort_by_key(|(group, _)| rows(&self.groups[*group]));
            }
            let (group, granted) = self.granted.pop()?;
            match granted {
                Granted::LoadedByOther(loading) => self.awaited.push((group, loading)),
                Granted::Ready(expert) => {
                    let rows = self.take(group);
                    self.share(rows, expert);
                }
                Granted::ToLoad(demanded) => {
                    self.demand_loads += 1;
                    return Some(Next::Load(self.take(group), demanded));
                }
            }
        }
        None
    }

    /// Cuts a group whose expert is there into parts of about one size.
    fn share(&mut self, rows: GroupRows<'x>, expert: Pinned<'c>) {
        let expert = Arc::new(expert);
        let parts = rows.x.len().div_ceil(self.part_floats);
        let floats = (rows.x.len() / self.d_model).div_ceil(parts) * self.d_model;
        let parts = rows.x.chunks(floats).zip(rows.out.chunks_mut(floats)).map(|(x, out)| GroupRows { x, out });
        self.parts.extend(parts.map(|rows| (rows, expert.clone())));
    }

    fn take(&mut self, group: usize) -> GroupRows<'x> {
        self.groups[group].take().expect("an expert is granted once per call")
    }
}

/// Computes a call whose lengths fit; see [`sida_cluster::experts::LocalExperts::compute`]. `planned`: it is a
/// batch's, so that the plans advance by it.
pub(crate) fn compute(
    cache: &ExpertCache,
    workers: &Workers,
    call: ExpertCall<'_>,
    planned: bool,
    out: &mut [f32],
) -> Result<CallReport, CallError> {
    let start = Instant::now();
    let pending = cache.call(call.layer, call.groups.iter().map(|group| group.expert), planned).map_err(refused)?;
    let shape = cache.source().shape_of(call.layer);
    let rows = call.activations.len() / shape.d_model;
    let effort = Effort::of(&call, shape);
    let part_rows = rows.div_ceil(workers.threads()).max(shape.d_model.div_ceil(PART_ROWS_SHARE));
    let queue = Mutex::new(Queue {
        d_model: shape.d_model,
        part_floats: part_rows * shape.d_model,
        parts: Vec::with_capacity(call.groups.len()),
        pending,
        granted: Vec::with_capacity(call.groups.len()),
        awaited: Vec::new(),
        groups: split(shape.d_model, call, out),
        failure: None,
        demand_loads: 0,
        load: Duration::ZERO,
    });
    let mut load = Duration::ZERO;
    loop {
        let threads = workers.run(&effort, call.groups.len(), |scratch| work(&queue, shape, scratch));
        let mut queue = queue.lock();
        load += std::mem::take(&mut queue.load) / threads;
        if let Some(failure) = queue.failure.take() {
            return Err(failure);
        }
        if queue.awaited.is_empty() && queue.pending.is_empty() {
            let demand_loads = queue.demand_loads;
            let hits = call.groups.len() as u32 - demand_loads;
            let compute = start.elapsed().saturating_sub(load);
            cache.measures.computed(rows, compute);
            return Ok(CallReport { hits, demand_loads, load, compute });
        }
        let waited = Instant::now();
        wait(&mut queue);
        load += waited.elapsed();
    }
}

/// A worker: computes until there is nothing that can be had without waiting.
fn work(queue: &Mutex<Queue<'_, '_>>, shape: &ExpertShape, scratch: &mut ExpertScratch) {
    loop {
        // In a statement of its own: the lock must not be held while computing.
        let next = queue.lock().next();
        match next {
            None => return,
            Some(Next::Compute(rows, expert)) => forward(shape, &expert, rows, scratch),
            Some(Next::Load(rows, demanded)) => {
                let (key, start) = (demanded.key(), Instant::now());
                match demanded.fill() {
                    Ok(expert) => {
                        let mut queue = queue.lock();
                        queue.load += start.elapsed();
                        queue.share(rows, expert);
                    }
                    Err(error) => {
                        queue.lock().failure = Some(CallError::Load { key, reason: error.to_string() });
                        return;
                    }
                }
            }
        }
    }
}

fn forward(shape: &ExpertShape, expert: &Pinned<'_>, rows: GroupRows<'_>, scratch: &mut ExpertScratch) {
    shape.forward(expert.weights(), rows.x, rows.out, scratch);
}

/// Waits for what others load, or, holding nothing, for a slot.
fn wait(queue: &mut Queue<'_, '_>) {
    if queue.awaited.is_empty() {
        return queue.pending.acquire_waiting(LOADS_PER_ROUND, &mut queue.granted);
    }
    for (group, loading) in std::mem::take(&mut queue.awaited) {
        // A load that failed sends the expert back to `pending`, to be loaded by this call.
        if let Some(expert) = loading.wait(&mut queue.pending) {
            queue.demand_loads += 1;
            queue.granted.push((group, Granted::Ready(expert)));
        }
    }
}

/// Cuts activations and results by group.
pub(crate) fn split<'x>(d_model: usize, call: ExpertCall<'x>, mut out: &'x mut [f32]) -> Vec<Option<GroupRows<'x>>> {
    let mut x = call.activations;
    let mut groups = Vec::with_capacity(call.groups.len());
    for group in call.groups {
        let values = group.rows as usize * d_model;
        let (x_group, x_rest) = x.split_at(values);
        let (out_group, out_rest) = out.split_at_mut(values);
        groups.push(Some(GroupRows { x: x_group, out: out_group }));
        (x, out) = (x_rest, out_rest);
    }
    groups
}

pub(crate) fn refused(error: ResidencyError) -> CallError {
    CallError::Malformed(error.to_string())
}
