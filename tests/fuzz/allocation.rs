//! Counts what is allocated, so that a decoder that believes a claimed length is caught even where the system would
//! have granted it the memory.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// The largest single allocation of this thread since it was last set. Targets run side by side on threads of their own.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn record(bytes: usize) {
    // An ending thread frees and allocates after its locals are gone; nothing is measured then.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        record(layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        record(layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        record(bytes);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What `work` returns, and the bytes of the largest allocation that this thread made during it.
pub(crate) fn largest_during<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.set(0);
    let result = work();
    (result, LARGEST.get())
}

/// The bound on allocations would hold for any decoder, however credulous.
#[test]
fn allocations_are_seen() {
    let (_, largest) = largest_during(|| Vec::<u8>::with_capacity(123_456));
    assert_eq!(largest, 123_456);
    let (_, largest) = largest_during(|| vec![0u64; 1000]);
    assert_eq!(largest, 8000);
}
