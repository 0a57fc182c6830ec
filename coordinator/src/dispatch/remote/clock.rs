//! Time as the decisions of `sida_routing` take it: since a moment that all nodes of a coordinator share.

use std::time::{Duration, Instant};

/// Counts from when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    /// Begins now.
    pub(crate) fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// The time.
    pub(crate) fn now(self) -> Duration {
        self.origin.elapsed()
    }

    /// The moment at which it is that time.
    pub(crate) fn instant(self, time: Duration) -> Instant {
        self.origin + time
    }
}
