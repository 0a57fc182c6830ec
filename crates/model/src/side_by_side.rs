//! Work that several threads of the pool do at the same time, for parts of a pass that take a fraction of a
//! millisecond. A thread that waits goes to sleep after some 10 microseconds, and waking one takes more than twice as
//! long; so whoever is done first here stays awake for the others, who are about to be done, too.
//!
//! Called by the blocks of the backbone, by the coordinator for nodes in its process, and by the expert-node's workers.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rayon::Yield;

/// How long the calling thread waits awake.
const AWAKE_MAX: Duration = Duration::from_micros(200);

/// Calls `work` on this thread and, as they come, on up to `threads - 1` others of the pool; returns when all ended.
/// One that comes after this thread's call has ended finds what that left: nothing, where `work` empties a queue.
pub fn side_by_side(threads: usize, work: impl Fn() + Sync) {
    let others = AtomicUsize::new(0);
    let (work, others) = (&work, &others);
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(move |_| {
                others.fetch_add(1, Ordering::Relaxed);
                work();
                others.fetch_sub(1, Ordering::Release);
            });
        }
        work();
        let done = Instant::now();
        while others.load(Ordering::Acquire) > 0 && done.elapsed() < AWAKE_MAX {
            if rayon::yield_now() != Some(Yield::Executed) {
                thread::yield_now();
            }
        }
    });
}

/// Calls `work` for every item, each taken in its turn by the thread that is free next.
pub fn each<T: Send>(items: Vec<T>, work: impl Fn(T) + Sync) {
    let threads = rayon::current_num_threads().min(items.len());
    let queue = Mutex::new(items.into_iter());
    side_by_side(threads, || {
        loop {
            // In a statement of its own: the lock must not be held meanwhile.
            let next = queue.lock().next();
            let Some(item) = next else { return };
            work(item);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part of a batch would be computed twice or not at all, or a panic would leave the batch waiting.
    #[test]
    fn every_item_is_worked_at_once() {
        for count in [0, 1, 2, 100] {
            let all = || {
                let seen = Mutex::new(Vec::new());
                each((0..count).collect(), |item: usize| seen.lock().push(item));
                let mut seen = seen.into_inner();
                seen.sort_unstable();
                assert_eq!(seen, (0..count).collect::<Vec<_>>());
            };
            all();
            rayon::scope(|_| all());
        }
        let panicking = || each(vec![1, 2, 3, 4], |item| assert_ne!(item, 3, "as it should"));
        assert!(std::panic::catch_unwind(panicking).is_err());
    }
}
