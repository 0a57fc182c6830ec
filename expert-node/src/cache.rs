//! Expert memory in use: the residency machine under one lock, the slab it decides about, and the source that
//! fills it. Nobody copies or computes under the lock. Called by [`crate::compute`] (calls) and
//! [`crate::prefetch`] (prefetch).
//!
//! What the machine grants is handed out as values that give themselves back: a [`Pinned`] slot is unpinned,
//! an [`Unfilled`] one reported as failed, a [`PendingCall`] abandoned when dropped. So an error or a panic in
//! the middle of a call costs that call and nothing else, and the two unsafe lines of `granted` rest on types: only a
//! `Pinned` reads a slot, only an `Unfilled` writes one, and the machine never grants both.

mod granted;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use sida_model::{DeviceError, ExpertDevice, ExpertShape, ModelError, Residents};
use sida_routing::{
    ExpertId, ExpertKey, LayerId,
    residency::{Access, Grant, Load, LoadKind, Pending, Placed, Residency, ResidencyConfig, ResidencyError, Room},
};

pub(crate) use self::granted::{Demanded, Granted, Kept, Loading, Pinned, Unfilled};
use crate::{measures::Measures, slots::Slab, source::ExpertSource};

/// How long a thread of the pool sleeps before it looks for work.
const NAP: Duration = Duration::from_millis(1);

/// A load that takes less is left to the call that needs it: to have the prefetch thread do it would cost a wake-up and
/// bring the expert into another core's cache, and what a plan named in vain would be loaded for nothing.
const QUICK_LOAD: Duration = Duration::from_micros(100);

/// Plans that get what they lack at the cost of later ones: that of the pass, and the next.
const PASS_PLANS: usize = 2;

/// Where the slots are.
pub(crate) enum Memory {
    /// In this machine's memory, filled from the source.
    Host(Slab),
    /// On a device, which fills them itself.
    Device(Arc<dyn ExpertDevice>),
}

/// The experts of a node.
pub(crate) struct ExpertCache {
    source: Arc<dyn ExpertSource>,
    memory: Memory,
    state: Mutex<State>,
    /// Something was unpinned, loaded or failed.
    changed: Condvar,
    /// There is something to prefetch, or the cache closes.
    prefetch: Condvar,
    /// The device is lost.
    lost: AtomicBool,
    pub(crate) measures: Measures,
}

struct State {
    residency: Residency,
    /// Calls that wait on `changed`.
    sleepers: usize,
    /// Whether the loader waits on `prefetch`.
    loader_sleeps: bool,
    closed: bool,
}

impl ExpertCache {
    /// `slots` empty slots in `memory`, which has as many.
    pub(crate) fn new(
        source: Arc<dyn ExpertSource>,
        memory: Memory,
        slots: usize,
        plans_max: usize,
        measures: Measures,
    ) -> Self {
        let (layers, num_experts) = (source.layers(), source.num_experts());
        let residency = Residency::new(ResidencyConfig { slots, layers, num_experts, plans_max });
        let state = State { residency, sleepers: 0, loader_sleeps: false, closed: false };
        let (changed, prefetch) = (Condvar::new(), Condvar::new());
        let lost = AtomicBool::new(false);
        Self { source, memory, state: Mutex::new(state), changed, prefetch, lost, measures }
    }

    pub(crate) fn source(&self) -> &dyn ExpertSource {
        &*self.source
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How an expert lies in a slot.
    pub(crate) fn shape(&self) -> &ExpertShape {
        match &self.memory {
            Memory::Host(_) => self.source.shape(),
            Memory::Device(device) => device.shape(),
        }
    }

    /// Looks at the machine, or changes what is planned.
    pub(crate) fn residency<T>(&self, look: impl FnOnce(&mut Residency) -> T) -> T {
        let mut state = self.state.lock();
        let seen = look(&mut state.residency);
        self.wake_loader(&mut state);
        seen
    }

    /// Holds the experts of `layers`, and no others any more, for a pass that goes through them. Returns where every expert
    /// is, unless nothing changed since `seen`.
    pub(crate) fn hold(&self, layers: Range<u16>, seen: Option<u64>) -> Option<Residents> {
        let mut state = self.state.lock();
        if !state.residency.is_complete() {
            state.residency.hold(layers);
            self.wake(&mut state);
        }
        let residency = &state.residency;
        let version = residency.version();
        (seen != Some(version)).then(|| Residents {
            version,
            slots: residency
                .resident_slots_by_expert()
                .map(|slot| slot.map_or(-1, |slot| slot.index() as i32))
                .collect(),
            is_complete: residency.is_complete(),
        })
    }

    /// Holds nothing any more.
    pub(crate) fn release_held(&self) {
        let mut state = self.state.lock();
        if !state.residency.is_complete() {
            state.residency.hold(0..0);
            self.wake(&mut state);
        }
    }

    /// A batch went through a layer whose rows used these resident experts: the plans advance by it.
    pub(crate) fn used(
        &self,
        layer: LayerId,
        experts: impl IntoIterator<Item = ExpertId>,
    ) -> Result<(), ResidencyError> {
        let mut state = self.state.lock();
        let residency = &mut state.residency;
        let mut pending = residency.call(layer, experts)?;
        let mut grants = Vec::new();
        residency.acquire(&mut pending, 0, &mut grants);
        grants.iter().for_each(|grant| residency.unpin(grant.slot));
        residency.abandon(pending);
        residency.advance(layer);
        self.wake(&mut state);
        Ok(())
    }

    /// Opens a call of one layer. With `planned` it is a batch's, and the plans advance by it.
    pub(crate) fn call(
        &self,
        layer: LayerId,
        experts: impl IntoIterator<Item = ExpertId>,
        planned: bool,
    ) -> Result<PendingCall<'_>, ResidencyError> {
        let mut state = self.state.lock();
        let pending = state.residency.call(layer, experts)?;
        if planned {
            state.residency.advance(layer);
        }
        Ok(PendingCall { cache: self, pending: Some(pending) })
    }

    /// Starts the next prefetch; sleeps until there is one, at most for `patience`. `None`: nothing yet.
    pub(crate) fn next_prefetch(&self, patience: Duration) -> Option<Unfilled<'_>> {
        let mut state = self.state.lock();
        if !state.closed
            && let Some(load) = self.ahead().next(&mut state.residency)
        {
            self.measures.evicted(load.evicted);
            return Some(Unfilled::new(self, load.key, load.slot, LoadKind::Prefetch));
        }
        if !state.closed {
            state.loader_sleeps = true;
            self.prefetch.wait_for(&mut state, patience);
            state.loader_sleeps = false;
        }
        None
    }

    /// Starts the next load of what is placed here (ascending), where there is room that nobody misses.
    pub(crate) fn next_placed(&self, placed: &[ExpertKey]) -> NextPlaced<'_> {
        let mut state = self.state.lock();
        if state.closed {
            return NextPlaced::Done;
        }
        match state.residency.next_placed(placed) {
            Placed::Done => NextPlaced::Done,
            Placed::Busy => NextPlaced::Busy,
            Placed::Load(load) => {
                self.measures.evicted(load.evicted);
                NextPlaced::Load(Unfilled::new(self, load.key, load.slot, LoadKind::Prefetch))
            }
        }
    }

    /// No prefetch starts any more. Calls that run go on.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.prefetch.notify_all();
    }

    /// Whether [`ExpertCache::close`] was called.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Notes whether an error says that the device is lost.
    pub(crate) fn note_failure(&self, error: &ModelError) {
        if matches!(error, ModelError::Device(DeviceError::Lost(_))) {
            self.lost.store(true, Ordering::Relaxed);
        }
    }

    /// Whether nothing can be computed any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Applies a change that may free or fill a slot, and wakes who waits for it.
    fn change(&self, apply: impl FnOnce(&mut Residency)) {
        let mut state = self.state.lock();
        apply(&mut state.residency);
        self.wake(&mut state);
    }

    fn wake(&self, state: &mut MutexGuard<'_, State>) {
        if state.sleepers > 0 {
            self.changed.notify_all();
        }
        self.wake_loader(state);
    }

    fn wake_loader(&self, state: &mut MutexGuard<'_, State>) {
        if state.loader_sleeps && self.ahead().wants(&mut state.residency) {
            state.loader_sleeps = false;
            self.prefetch.notify_one();
        }
    }

    fn ahead(&self) -> Ahead {
        match self.memory {
            Memory::Host(_) => Ahead::OfCalls,
            Memory::Device(_) => Ahead::OfPasses,
        }
    }

    /// Sleeps until something changed, or for a while. A thread of the pool works between naps: the change may be
    /// up to a call that waits for a thread.
    fn sleep(&self, state: &mut MutexGuard<'_, State>) {
        state.sleepers += 1;
        if rayon::current_thread_index().is_none() {
            self.changed.wait(state);
        } else if self.changed.wait_for(state, NAP).timed_out() {
            MutexGuard::unlocked(state, rayon::yield_now);
        }
        state.sleepers -= 1;
    }

    fn hand_out(&self, grant: Grant) -> (usize, Granted<'_>) {
        let Grant { group, key, slot, access } = grant;
        let granted = match access {
            Access::Resident => Granted::Ready(Pinned { cache: self, slot }),
            Access::Load { evicted } => {
                self.measures.evicted(evicted);
                Granted::ToLoad(Demanded::new(self, key, slot))
            }
            Access::Await(ticket) => Granted::LoadedByOther(Loading { cache: self, grant, ticket }),
        };
        (group, granted)
    }
}

/// What is loaded ahead of its use, and at whose cost.
#[derive(Clone, Copy)]
enum Ahead {
    /// Calls go layer by layer and give slots back as they go, so only what no plan names leaves for a prefetch.
    OfCalls,
    /// A pass on the node's device goes through its layers as fast as their experts are there, so what is used later leaves
    /// for what the next plans use sooner.
    OfPasses,
}

impl Ahead {
    fn next(self, residency: &mut Residency) -> Option<Load> {
        match self {
            Self::OfCalls => residency.next_prefetch(),
            Self::OfPasses => residency.next_prefetch_within(PASS_PLANS, Room::UsedAfterLayer),
        }
    }

    fn wants(self, residency: &mut Residency) -> bool {
        match self {
            Self::OfCalls => residency.wants_prefetch(),
            Self::OfPasses => residency.wants_prefetch_within(PASS_PLANS, Room::UsedAfterLayer),
        }
    }
}

/// [`Placed`], with the slot to fill.
pub(crate) enum NextPlaced<'c> {
    /// To be loaded.
    Load(Unfilled<'c>),
    /// Calls go first.
    Busy,
    /// Nothing is missing that there is room for.
    Done,
}

/// What a call has not been given yet.
pub(crate) struct PendingCall<'c> {
    cache: &'c ExpertCache,
    /// `None` only while it is dropped.
    pending: Option<Pending>,
}

impl<'c> PendingCall<'c> {
    /// Whether everything was given.
    pub(crate) fn is_empty(&self) -> bool {
        self.pending.as_ref().is_none_or(Pending::is_empty)
    }

    /// What can be had now, with at most `loads_max` loads: the position of each expert in the call, and
    /// the expert.
    pub(crate) fn acquire(&mut self, loads_max: usize, granted: &mut Vec<(usize, Granted<'c>)>) {
        let cache = self.cache;
        let grants = self.round(&mut cache.state.lock(), loads_max);
        granted.extend(grants.into_iter().map(|grant| self.cache.hand_out(grant)));
    }

    /// As [`PendingCall::acquire`], but sleeps until there is something. The call must hold nothing, or calls
    /// could wait for each other.
    pub(crate) fn acquire_waiting(&mut self, loads_max: usize, granted: &mut Vec<(usize, Granted<'c>)>) {
        let cache = self.cache;
        let mut state = cache.state.lock();
        let mut grants = self.round(&mut state, loads_max);
        while grants.is_empty() && !self.is_empty() {
            cache.sleep(&mut state);
            grants = self.round(&mut state, loads_max);
        }
        drop(state);
        granted.extend(grants.into_iter().map(|grant| cache.hand_out(grant)));
    }

    fn round(&mut self, state: &mut MutexGuard<'_, State>, loads_max: usize) -> Vec<Grant> {
        let pending = self.pending.as_mut().expect("present until it is dropped");
        let mut grants = Vec::new();
        state.residency.acquire(pending, loads_max, &mut grants);
        grants
    }
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take()
            && !pending.is_empty()
        {
            self.cache.change(|residency| residency.abandon(pending));
        }
    }
}
