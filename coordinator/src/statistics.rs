//! What a coordinator has done since it started, for its status. Counted by the front door, the engine and the forward pass.

use std::sync::atomic::{AtomicU64, AtomicUsize};

/// Counters that several threads add to.
#[derive(Debug, Default)]
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
}
