//! What a coordinator has done since it started, for its status. Counted by the front door, the engine and the forward pass.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// Counters that several threads add to.
#[derive(Debug)]
pub(crate) struct Statistics {
    /// Requests accepted.
    pub(crate) requests: AtomicU64,
    /// Requests in the engine now.
    pub(crate) inflight: AtomicUsize,
    /// Routed experts that the hash table named.
    pub(crate) hash_hits: AtomicU64,
    /// And those that it did not.
    pub(crate) hash_misses: AtomicU64,
    /// Expert calls that went to another node.
    pub(crate) failovers: AtomicU64,
    origin: Instant,
    /// Milliseconds from `origin` to the beginning of the engine's step; 0: it is in none.
    step_began: AtomicU64,
}

impl Default for Statistics {
    fn default() -> Self {
        let (requests, inflight, hash_hits, hash_misses, failovers, step_began) = Default::default();
        Self { requests, inflight, hash_hits, hash_misses, failovers, origin: Instant::now(), step_began }
    }
}

impl Statistics {
    /// The engine begins a step.
    pub(crate) fn step_begins(&self) {
        self.step_began.store((self.origin.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    /// The engine's step is over.
    pub(crate) fn step_ended(&self) {
        self.step_began.store(0, Ordering::Relaxed);
    }

    /// For how long the engine has been in one step.
    pub(crate) fn stuck_for(&self) -> Duration {
        match self.step_began.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            began => self.origin.elapsed().saturating_sub(Duration::from_millis(began)),
        }
    }
}
