//! What the residency machine grants to calls and to the prefetch thread, as values that give themselves back.

use std::{sync::Arc, time::Instant};

use sida_model::{ModelError, Urgency};
use sida_routing::{
    ExpertKey,
    residency::{Awaited, Grant, LoadKind, SlotId, Ticket},
};

use super::{ExpertCache, Memory, PendingCall, QUICK_LOAD};

/// An expert granted to a call.
pub(crate) enum Granted<'c> {
    /// Resident.
    Ready(Pinned<'c>),
    /// To be loaded by this call.
    ToLoad(Demanded<'c>),
    /// Being loaded by another call or by the prefetch thread.
    LoadedByOther(Loading<'c>),
}

/// A resident expert that cannot be evicted as long as this lives.
pub(crate) struct Pinned<'c> {
    pub(super) cache: &'c ExpertCache,
    pub(super) slot: SlotId,
}

impl Pinned<'_> {
    /// The slot of the expert.
    pub(crate) fn slot(&self) -> usize {
        self.slot.index()
    }

    /// The weights of the expert. Panics if they are on a device.
    pub(crate) fn weights(&self) -> &[u8] {
        let Memory::Host(slab) = &self.cache.memory else { panic!("weights on a device are the device's to read") };
        // SAFETY: a `Pinned` is made when the machine grants a resident slot with a pin, or when its load is
        // done; the machine gives a slot to a load only when nothing pins it, and this gives the pin back on drop.
        unsafe { slab.bytes(self.slot) }
    }
}

/// A [`Pinned`] expert for an owner that outlives the call, such as a device that still computes with it.
pub(crate) struct Kept {
    cache: Arc<ExpertCache>,
    slot: SlotId,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.cache.change(|residency| residency.unpin(self.slot));
    }
}

impl Pinned<'_> {
    /// The same pin as a value that borrows nothing; `cache` is the cache that the pin is of.
    pub(crate) fn keep(self, cache: &Arc<ExpertCache>) -> Kept {
        let slot = self.slot;
        std::mem::forget(self); // The pin goes on in the value that is returned.
        Kept { cache: cache.clone(), slot }
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.cache.change(|residency| residency.unpin(self.slot));
    }
}

/// A slot that an expert is to be loaded into, by whoever holds this.
pub(crate) struct Unfilled<'c> {
    pub(super) cache: &'c ExpertCache,
    pub(super) key: ExpertKey,
    pub(super) slot: SlotId,
    pub(super) kind: LoadKind,
    pub(super) begun: Instant,
}

impl<'c> Unfilled<'c> {
    pub(super) fn new(cache: &'c ExpertCache, key: ExpertKey, slot: SlotId, kind: LoadKind) -> Self {
        Self { cache, key, slot, kind, begun: Instant::now() }
    }

    /// The expert that is to be loaded.
    pub(crate) fn key(&self) -> ExpertKey {
        self.key
    }

    /// Starts the load where a device does it.
    pub(crate) fn begin(&mut self) -> Result<(), ModelError> {
        self.begun = Instant::now();
        let urgency = match self.kind {
            LoadKind::Demand => Urgency::Demand,
            LoadKind::Prefetch => Urgency::Ahead,
        };
        match &self.cache.memory {
            Memory::Host(_) => Ok(()),
            Memory::Device(device) => device.begin_load(self.key, self.slot.index(), urgency),
        }
    }

    /// Loads the expert, or waits for what was begun.
    pub(crate) fn finish(self) -> Result<(), ModelError> {
        let quick = match &self.cache.memory {
            Memory::Host(slab) => {
                let start = Instant::now();
                // SAFETY: the machine gave this slot to this load alone, and reports of it come from here and drop
                // only.
                let bytes = unsafe { slab.bytes_mut(self.slot) };
                self.cache.source.load(self.key, bytes)?;
                start.elapsed() < QUICK_LOAD
            }
            Memory::Device(device) => {
                device.finish_load(self.slot.index())?;
                false // A copy to a device runs while processors compute, so it is always worth beginning early.
            }
        };
        self.cache.measures.loaded(self.kind, self.begun.elapsed());
        let (cache, key, slot) = (self.cache, self.key, self.slot);
        std::mem::forget(self); // Dropping it would report a failed load.
        cache.change(|residency| {
            residency.note_pace(key, quick);
            residency.loaded(slot);
        });
        Ok(())
    }

    /// Loads the expert: [`Self::begin`], then [`Self::finish`].
    pub(crate) fn fill(mut self) -> Result<(), ModelError> {
        self.begin()?;
        self.finish()
    }
}

/// An [`Unfilled`] slot whose expert a call waits for: the machine has pinned it for that call. What is loaded ahead is
/// pinned by nobody, so that no [`Pinned`] may be made of it.
pub(crate) struct Demanded<'c>(Unfilled<'c>);

impl<'c> Demanded<'c> {
    pub(super) fn new(cache: &'c ExpertCache, key: ExpertKey, slot: SlotId) -> Self {
        Self(Unfilled::new(cache, key, slot, LoadKind::Demand))
    }

    /// The expert that is to be loaded.
    pub(crate) fn key(&self) -> ExpertKey {
        self.0.key
    }

    /// As [`Unfilled::begin`].
    pub(crate) fn begin(&mut self) -> Result<(), ModelError> {
        self.0.begin()
    }

    /// As [`Unfilled::finish`]; the expert is the call's to use.
    pub(crate) fn finish(self) -> Result<Pinned<'c>, ModelError> {
        let Unfilled { cache, slot, .. } = self.0;
        self.0.finish()?;
        Ok(Pinned { cache, slot })
    }

    /// As [`Unfilled::fill`].
    pub(crate) fn fill(mut self) -> Result<Pinned<'c>, ModelError> {
        self.begin()?;
        self.finish()
    }
}

impl Drop for Unfilled<'_> {
    fn drop(&mut self) {
        self.cache.change(|residency| residency.load_failed(self.slot));
    }
}

/// An expert that somebody else is loading, pinned for this call once it is there.
pub(crate) struct Loading<'c> {
    pub(super) cache: &'c ExpertCache,
    pub(super) grant: Grant,
    pub(super) ticket: Ticket,
}

impl<'c> Loading<'c> {
    /// Waits for that load only. If it failed, the expert goes back to `call`, which will load it itself.
    pub(crate) fn wait(self, call: &mut PendingCall<'_>) -> Option<Pinned<'c>> {
        let mut state = self.cache.state.lock();
        loop {
            match state.residency.awaited(self.ticket) {
                Awaited::Loading => self.cache.sleep(&mut state),
                Awaited::Loaded => {
                    let (cache, slot) = (self.cache, self.grant.slot);
                    drop(state);
                    std::mem::forget(self); // The pin goes on in the value that is returned.
                    return Some(Pinned { cache, slot });
                }
                Awaited::Failed => {
                    let pending = call.pending.as_mut().expect("present until it is dropped");
                    state.residency.again(pending, &self.grant);
                    drop(state);
                    return None;
                }
            }
        }
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.cache.change(|residency| {
            if residency.awaited(self.ticket) != Awaited::Failed {
                residency.unpin(self.grant.slot);
            }
        });
    }
}
