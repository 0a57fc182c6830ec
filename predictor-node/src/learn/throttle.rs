//! Keeps a thread to a share of a processor: after each piece of work it rests for as long as makes the work that share.

use std::time::{Duration, Instant};

/// Of one thread.
pub(crate) struct Throttle {
    /// Above 0, at most 1.
    share: f64,
    /// When the work that was not rested for began.
    since: Instant,
}

impl Throttle {
    pub(crate) fn new(share: f64) -> Self {
        Self { share, since: Instant::now() }
    }

    /// Work begins.
    pub(crate) fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// Rests for the work since then, by `sleep`; work begins again.
    pub(crate) fn rest(&mut self, sleep: impl FnOnce(Duration)) {
        let rest = rest(self.share, self.since.elapsed());
        if !rest.is_zero() {
            sleep(rest);
        }
        self.begin();
    }
}

/// How long to rest for some work, so that the work is `share` of both.
fn rest(share: f64, work: Duration) -> Duration {
    work.mul_f64((1.0 - share) / share)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node that serves would be slowed by more than its user allowed.
    #[test]
    fn work_is_the_share() {
        let work = Duration::from_millis(10);
        assert_eq!(rest(0.25, work), Duration::from_millis(30));
        assert_eq!(rest(0.5, work), work);
        assert_eq!(rest(1.0, work), Duration::ZERO);
    }
}
