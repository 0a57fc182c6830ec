//! Expert memory: one block taken at the start and cut into equal slots, so that nothing fragments and the
//! budget cannot be exceeded. Owned by [`crate::cache`], which decides with the residency machine who may
//! touch which slot.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ptr::NonNull,
};

use sida_routing::residency::SlotId;
use thiserror::Error;

/// Slots begin at multiples of this: a cache line, and the widest vector register.
pub(crate) const SLOT_ALIGNMENT: usize = 64;
/// What the allocator aligns to without touching the memory. With a larger alignment it would have to zero
/// the block itself and so make all of it resident at once.
const ALLOCATION_ALIGNMENT: usize = 16;

/// The operating system did not give the memory.
#[derive(Debug, Error)]
#[error("cannot allocate {bytes} bytes of expert memory")]
pub struct SlabError {
    /// How much was asked for.
    pub bytes: usize,
}

/// Bytes that one slot takes for an expert of `expert_bytes`.
pub(crate) fn slot_bytes(expert_bytes: usize) -> usize {
    expert_bytes.next_multiple_of(SLOT_ALIGNMENT)
}

/// The slots. Pages of it become resident when they are first written.
#[derive(Debug)]
pub(crate) struct Slab {
    block: NonNull<u8>,
    layout: Layout,
    /// The first slot; aligned to [`SLOT_ALIGNMENT`].
    first: NonNull<u8>,
    slots: usize,
    expert_bytes: usize,
}

// SAFETY: the slab owns its block. Its bytes are reached only by `bytes` and `bytes_mut`, whose callers promise
// that a slot being written is reached by nobody else; slots do not overlap.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// `slots` slots for experts of `expert_bytes`, all zero.
    pub(crate) fn new(slots: usize, expert_bytes: usize) -> Result<Self, SlabError> {
        let bytes = slot_bytes(expert_bytes).saturating_mul(slots).saturating_add(SLOT_ALIGNMENT);
        let layout = Layout::from_size_align(bytes, ALLOCATION_ALIGNMENT).map_err(|_| SlabError { bytes })?;
        // SAFETY: the layout has at least SLOT_ALIGNMENT bytes.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(SlabError { bytes })?;
        let lead = block.as_ptr().align_offset(SLOT_ALIGNMENT);
        assert!(lead < SLOT_ALIGNMENT, "a byte pointer can be aligned");
        // SAFETY: the block is SLOT_ALIGNMENT bytes longer than the slots, and `lead` is shorter than that.
        let first = unsafe { block.add(lead) };
        Ok(Self { block, layout, first, slots, expert_bytes })
    }

    /// The expert in a slot.
    ///
    /// # Safety
    /// While the result lives nobody writes the slot: the caller holds a pin on a resident slot.
    pub(crate) unsafe fn bytes(&self, slot: SlotId) -> &[u8] {
        // SAFETY: within the block (see `start`), zeroed at the start and so initialised; not written meanwhile
        // by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start(slot), self.expert_bytes) }
    }

    /// Room for the expert of a slot.
    ///
    /// # Safety
    /// While the result lives nobody else reaches the slot: the caller is the one who loads into it.
    #[allow(clippy::mut_from_ref)] // Slots are disjoint, and one slot's exclusive use is the caller's promise.
    pub(crate) unsafe fn bytes_mut(&self, slot: SlotId) -> &mut [u8] {
        // SAFETY: within the block (see `start`), initialised, and reached by nobody else by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start(slot), self.expert_bytes) }
    }

    fn start(&self, slot: SlotId) -> *mut u8 {
        assert!(slot.index() < self.slots, "slot {slot} of {}", self.slots);
        // SAFETY: the block holds `slots` slots from `first` on.
        unsafe { self.first.as_ptr().add(slot.index() * slot_bytes(self.expert_bytes)) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.block.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_apart() {
        // Broken: loading one expert would overwrite another, or a vector load would cross cache lines.
        let slab = Slab::new(3, 100).unwrap();
        for slot in 0..3 {
            // SAFETY: one thread, one slot at a time.
            let bytes = unsafe { slab.bytes_mut(SlotId(slot)) };
            assert_eq!(bytes.as_ptr().align_offset(SLOT_ALIGNMENT), 0);
            bytes.fill(slot as u8 + 1);
        }
        for slot in 0..3 {
            // SAFETY: nobody writes any more.
            assert_eq!(unsafe { slab.bytes(SlotId(slot)) }, [slot as u8 + 1; 100]);
        }
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        // Broken: a budget beyond the machine's memory would end the process without saying why.
        let error = Slab::new(usize::MAX / 2, 64).unwrap_err();
        assert!(error.to_string().starts_with("cannot allocate"));
    }
}
