//! What a coordinator has done since it started, for its status.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::measures::{inference_counts::InferenceCounts, step_outcomes::StepOutcomes};

/// Counters that several threads add to.
#[derive(Debug)]
pub(crate) struct Statistics {
    /// Requests accepted.
    pub(crate) requests: AtomicU64,
    /// Requests that are being computed now.
    pub(crate) inflight: AtomicUsize,
    /// Routed experts that the hash table named.
    pub(crate) hash_hits: AtomicU64,
    /// Routed experts that the hash table did not name.
    pub(crate) hash_misses: AtomicU64,
    /// Expert calls that went to another node.
    pub(crate) failovers: AtomicU64,
    /// Whether the device of the dense layers is lost, so that nothing can be computed any more.
    pub(crate) is_device_lost: AtomicBool,
    /// Whether steps answer anybody.
    pub(crate) outcomes: StepOutcomes,
    /// What came by the Open Inference Protocol.
    pub(crate) open_inference: Mutex<InferenceCounts>,
    origin: Instant,
    /// Milliseconds from `origin` to the beginning of the scheduler's step; 0 between steps.
    step_began: AtomicU64,
}

impl Default for Statistics {
    fn default() -> Self {
        let (requests, inflight, hash_hits, hash_misses, failovers, is_device_lost, step_began) = Default::default();
        let (outcomes, open_inference, origin) = (StepOutcomes::default(), Mutex::default(), Instant::now());
        Self {
            requests,
            inflight,
            hash_hits,
            hash_misses,
            failovers,
            is_device_lost,
            outcomes,
            open_inference,
            origin,
            step_began,
        }
    }
}

impl Statistics {
    /// The scheduler begins a step.
    pub(crate) fn step_begins(&self) {
        self.step_began.store((self.origin.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    /// The scheduler's step is over.
    pub(crate) fn step_ended(&self) {
        self.step_began.store(0, Ordering::Relaxed);
        self.outcomes.step_ended(Instant::now());
    }

    /// For how long the scheduler has been in one step.
    pub(crate) fn stuck_for(&self) -> Duration {
        match self.step_began.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            began => self.origin.elapsed().saturating_sub(Duration::from_millis(began)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_step_can_be_stuck() {
        // Broken: an idle coordinator would be started again, or one whose engine hangs never.
        let mut statistics = Statistics::default();
        assert_eq!(statistics.stuck_for(), Duration::ZERO);
        statistics.step_begins();
        let hour = Duration::from_secs(3600);
        // Moves the origin back, as if the step had begun an hour ago.
        let Some(origin) = statistics.origin.checked_sub(hour) else { return };
        statistics.origin = origin;
        assert!(statistics.stuck_for() > hour - Duration::from_secs(60));
        statistics.step_ended();
        assert_eq!(statistics.stuck_for(), Duration::ZERO);
    }
}
