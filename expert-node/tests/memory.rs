//! What the allocator sees: in a binary of its own, since it counts every byte of the process.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use sida_cluster::experts::LocalExperts;
use support::{MadeUp, MadeUpCall, engine};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn experts_never_take_more_than_the_budget() {
    // Broken: a node given 2 GiB takes more, and the machine kills it.
    let source = MadeUp::wide(4096);
    let expert_bytes = 2 * support::D_MODEL * 4096 * 4;
    let slots = 4;
    // The made-up source makes weights before it copies them: up to one expert per thread that loads.
    let making = 3 * expert_bytes;
    // What each thread that computes keeps: rows between matrices, and a few rows of a matrix, widened.
    let room = (rayon::current_num_threads() + 1) * (expert_bytes / 4 + 4 * 4096 * 4);
    // The first product of a process makes a table of scales, which all share from then on.
    let call = MadeUpCall::new(&mut 1);
    engine(&MadeUp::new(), slots, 2).unwrap().compute(call.as_call(), &mut vec![0.0; call.activations.len()]).unwrap();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let engine = engine(&source, slots, 2).unwrap();
    let taken = NOW.load(Ordering::Relaxed) - before;
    assert!(taken >= slots * expert_bytes, "the slab is taken at the start: {taken}");
    let mut seed = 1;
    for _ in 0..100 {
        let call = MadeUpCall::new(&mut seed);
        let mut out = vec![0.0; call.activations.len()];
        engine.compute(call.as_call(), &mut out).unwrap();
        let report = engine.residency();
        assert!(report.resident_bytes <= (slots * expert_bytes) as u64);
    }
    let peak = PEAK.load(Ordering::Relaxed) - before;
    let allowed = slots * expert_bytes + making + room;
    assert!(peak <= allowed, "{peak} bytes at the peak, {allowed} allowed");
    assert!(source.loads.load(Ordering::Relaxed) > 100, "the budget was never under pressure");
    drop(engine);
    let left = NOW.load(Ordering::Relaxed).saturating_sub(before);
    assert!(left < room, "{left} bytes are left of an engine that is gone");
}
