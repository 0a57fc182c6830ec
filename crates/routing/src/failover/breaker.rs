//! Whether a node is asked at all: left alone after a failure, for longer each time, then tried with one call.
//! One per node, kept by its lane.
//!
//! Closed: everything goes. A failure opens it for [`OPEN_MIN`], doubled with every further one up to
//! [`OPEN_MAX`]. After that comes probation: one call at a time, and what becomes of it closes the breaker or
//! opens it again. A node that fails soon after it was let in again (see [`FORGIVEN_AFTER`]) is left alone for
//! longer than before, so that one that comes and goes costs ever less.

use std::time::Duration;

/// How long a node is left alone after its first failure.
pub const OPEN_MIN: Duration = Duration::from_millis(100);
/// How long at most.
pub const OPEN_MAX: Duration = Duration::from_secs(5);
/// How long a node must have done well for its failures to be forgotten.
pub const FORGIVEN_AFTER: Duration = Duration::from_secs(10);
/// After how long a call on probation counts as lost by whoever made it, and another may be made.
pub const PROBE_LOST_AFTER: Duration = Duration::from_secs(5);

/// What a [`Breaker`] allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Everything.
    Closed,
    /// Nothing.
    Open,
    /// One call at a time.
    Probation,
}

/// Lets calls to one node through, or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Breaker {
    /// When probation begins; `None` while closed.
    open_until: Option<Duration>,
    /// Begin of the call on probation.
    /// Invariant: `None` while closed.
    probe: Option<Duration>,
    /// Failures that count for the next opening.
    failures: u32,
    /// When it was last closed.
    closed_since: Duration,
}

impl Breaker {
    /// Closed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a call may be made now.
    pub fn allows(&self, now: Duration) -> bool {
        match self.state(now) {
            BreakerState::Closed => true,
            BreakerState::Open => false,
            BreakerState::Probation => self.probe.is_none_or(|since| now >= since + PROBE_LOST_AFTER),
        }
    }

    /// A call is made. (Also one that was not allowed, where nobody else was left.)
    pub fn begin(&mut self, now: Duration) {
        if self.state(now) == BreakerState::Probation {
            self.probe = Some(now);
        }
    }

    /// A call was answered. Any answer closes the breaker, also one to a call made before it opened: the node
    /// lives.
    pub fn succeeded(&mut self, now: Duration) {
        if self.open_until.take().is_some() {
            self.probe = None;
            self.closed_since = now;
        }
    }

    /// A call failed in a way that speaks against the node. One that was made before the breaker opened counts
    /// for nothing more: the calls of one batch fail together, and are one failure.
    pub fn failed(&mut self, now: Duration) {
        match self.state(now) {
            BreakerState::Open => return,
            BreakerState::Closed if now >= self.closed_since + FORGIVEN_AFTER => self.failures = 0,
            // Nobody was let through since; it is a call made before.
            BreakerState::Probation if self.probe.is_none() => return,
            _ => {}
        }
        let open = OPEN_MIN.saturating_mul(1u32 << self.failures.min(16)).min(OPEN_MAX);
        self.failures = self.failures.saturating_add(1);
        self.open_until = Some(now + open);
        self.probe = None;
    }

    /// A call ended in a way that says nothing about the node: cancelled, or refused for the caller's sake.
    pub fn abandoned(&mut self) {
        self.probe = None;
    }

    /// What it allows now.
    pub fn state(&self, now: Duration) -> BreakerState {
        match self.open_until {
            None => BreakerState::Closed,
            Some(until) if now < until => BreakerState::Open,
            Some(_) => BreakerState::Probation,
        }
    }

    /// When it will allow a call again; `None` if it does so now.
    pub fn allows_from(&self, now: Duration) -> Option<Duration> {
        if self.allows(now) {
            return None;
        }
        match self.probe {
            Some(since) => Some(since + PROBE_LOST_AFTER),
            None => self.open_until,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn openings_double_and_end() {
        // Broken: a dead node would cost every request a wait, or a node that is back would never be asked again.
        let mut breaker = Breaker::new();
        let mut now = ms(1000);
        for open in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            assert!(breaker.allows(now));
            breaker.begin(now);
            breaker.failed(now);
            assert_eq!(breaker.allows_from(now), Some(now + ms(open)));
            assert!(!breaker.allows(now + ms(open - 1)));
            now += ms(open);
            assert_eq!(breaker.state(now), BreakerState::Probation);
        }
        breaker.begin(now);
        breaker.succeeded(now);
        assert_eq!(breaker.state(now), BreakerState::Closed);
    }

    #[test]
    fn probation_lets_one_call_through() {
        // Broken: a node that hangs would get a whole batch each time it is tried.
        let mut breaker = Breaker::new();
        breaker.failed(ms(0));
        assert!(breaker.allows(ms(100)));
        breaker.begin(ms(100));
        assert!(!breaker.allows(ms(101)));
        assert!(!breaker.allows(ms(5099)));
        assert_eq!(breaker.allows_from(ms(101)), Some(ms(5100)));
        assert!(breaker.allows(ms(5100)), "whoever made the call is gone");
        breaker.abandoned();
        assert!(breaker.allows(ms(101)));
    }

    #[test]
    fn calls_that_fail_together_are_one_failure() {
        // Broken: sixteen lost calls of one batch would leave the node alone for 5 s.
        let mut breaker = Breaker::new();
        (0..16).for_each(|_| breaker.begin(ms(0)));
        (0..16).for_each(|i| breaker.failed(ms(200 + i)));
        assert_eq!(breaker.allows_from(ms(216)), Some(ms(300)));
        // One of them ends when probation has begun already.
        breaker.failed(ms(301));
        assert!(breaker.allows(ms(301)));
    }

    #[test]
    fn failures_are_forgiven_after_a_while() {
        // Broken: a node that comes and goes would take a wait from requests at every return; or one failure a
        // day would in the end cost 5 s.
        let mut breaker = Breaker::new();
        breaker.failed(ms(0));
        breaker.succeeded(ms(150));
        breaker.failed(ms(500));
        assert_eq!(breaker.allows_from(ms(500)), Some(ms(700)));
        breaker.succeeded(ms(700));
        breaker.failed(ms(700) + FORGIVEN_AFTER);
        assert_eq!(breaker.allows_from(ms(700) + FORGIVEN_AFTER), Some(ms(800) + FORGIVEN_AFTER));
    }

    proptest! {
        #[test]
        fn it_always_lets_somebody_in_again(events in prop::collection::vec((0u8..5, 0u64..8000), 0..60)) {
            // Broken: some order of events would shut a node out for ever.
            let mut breaker = Breaker::new();
            let mut now = Duration::ZERO;
            for (event, passed) in events {
                now += ms(passed);
                match event {
                    0 => breaker.begin(now),
                    1 => breaker.succeeded(now),
                    2 => breaker.abandoned(),
                    _ => breaker.failed(now),
                }
                prop_assert!(breaker.allows(now + OPEN_MAX + PROBE_LOST_AFTER));
                if let Some(at) = breaker.allows_from(now) {
                    prop_assert!(!breaker.allows(now) && breaker.allows(at));
                }
                if event == 1 {
                    prop_assert!(breaker.allows(now));
                }
            }
        }
    }
}
