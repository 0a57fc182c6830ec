//! How many calls may be made again: a share of all calls, and a few in any case. One per coordinator.
//!
//! The problem: when nodes are slow because there is too much to do, asking others again makes more of it. So
//! retries are paid from a bucket that calls fill, each with a fraction of a retry; with time it fills a
//! little by itself, so that a quiet coordinator can retry too; and it holds what [`BURST`] brings, so that all
//! calls to a dying node can go elsewhere at once.

use std::time::Duration;

/// The bucket holds what that time brings without any call, and at least [`BURST_MIN`].
pub const BURST: Duration = Duration::from_secs(10);
/// Retries that a full bucket pays at least.
pub const BURST_MIN: f64 = 10.0;

/// Pays for retries. Full at first.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryBudget {
    share: f64,
    per_second_min: f64,
    /// Invariant: in [0, capacity].
    retries: f64,
    filled: Duration,
}

impl RetryBudget {
    /// `share` of a retry for every call, and `per_second_min` in any case.
    pub fn new(share: f64, per_second_min: f64) -> Self {
        debug_assert!(share >= 0.0 && per_second_min >= 0.0, "a budget of {share} and {per_second_min}");
        let mut budget = Self { share, per_second_min, retries: 0.0, filled: Duration::ZERO };
        budget.retries = budget.capacity();
        budget
    }

    /// A call is made, the first for its rows.
    pub fn call(&mut self, now: Duration) {
        self.fill(now);
        self.retries = (self.retries + self.share).min(self.capacity());
    }

    /// Takes a retry if there is one.
    pub fn take_retry(&mut self, now: Duration) -> bool {
        self.fill(now);
        let is_paid = self.retries >= 1.0;
        if is_paid {
            self.retries -= 1.0;
        }
        is_paid
    }

    /// How long until a retry can be had without any further call; `None` if never. What cannot be retried now
    /// is better retried then than given up.
    pub fn retry_after(&self, now: Duration) -> Option<Duration> {
        let mut then = self.clone();
        then.fill(now);
        let missing = 1.0 - then.retries;
        if missing <= 0.0 {
            return Some(Duration::ZERO);
        }
        // A little more, lest rounding makes it a moment too early.
        (self.per_second_min > 0.0)
            .then(|| Duration::from_secs_f64(missing / self.per_second_min) + Duration::from_micros(1))
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        self.retries = (self.retries + passed.as_secs_f64() * self.per_second_min).min(self.capacity());
    }

    fn capacity(&self) -> f64 {
        (self.per_second_min * BURST.as_secs_f64()).max(BURST_MIN)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drained() -> RetryBudget {
        let mut budget = RetryBudget::new(0.2, 10.0);
        let taken = (0..1000).filter(|_| budget.take_retry(Duration::ZERO)).count();
        assert_eq!(taken, 100, "ten seconds' worth");
        budget
    }

    #[test]
    fn calls_and_time_fill_it() {
        // Broken: retries would pile up on a cluster that is slow already, or none would be had when one is needed.
        let mut budget = drained();
        (0..5).for_each(|_| budget.call(Duration::ZERO));
        assert!(budget.take_retry(Duration::ZERO));
        assert!(!budget.take_retry(Duration::ZERO));
        assert!(!budget.take_retry(Duration::from_millis(99)));
        assert!(budget.take_retry(Duration::from_millis(101)));
        let hour = Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| budget.take_retry(hour)).count(), 100);
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        // Broken: two threads that read the clock in another order would make retries out of nothing.
        let mut budget = drained();
        assert!(!budget.take_retry(Duration::from_millis(50)));
        assert!(!budget.take_retry(Duration::from_millis(10)));
        assert!(!budget.take_retry(Duration::from_millis(90)));
        assert!(budget.take_retry(Duration::from_millis(110)));
    }

    #[test]
    fn how_long_to_wait_is_known_beforehand() {
        // Broken: a call would be given up although a retry is there, or asked again before it can be paid.
        let mut budget = RetryBudget::new(0.25, 10.0);
        assert_eq!(budget.retry_after(Duration::ZERO), Some(Duration::ZERO), "a full bucket");
        (0..100).for_each(|_| assert!(budget.take_retry(Duration::ZERO)));
        let after = |ms| Some(Duration::from_millis(ms) + Duration::from_micros(1));
        assert_eq!(budget.retry_after(Duration::ZERO), after(100));
        assert_eq!(budget.retry_after(Duration::from_millis(75)), after(25));
        (0..4).for_each(|_| budget.call(Duration::ZERO));
        assert_eq!(budget.retry_after(Duration::ZERO), Some(Duration::ZERO), "four calls bring one retry");
    }

    #[test]
    fn a_budget_without_time_is_filled_by_calls_only() {
        // Broken: a coordinator whose retries are paid by calls alone would panic, or wait for what never comes.
        let mut budget = RetryBudget::new(0.5, 0.0);
        assert_eq!((0..100).filter(|_| budget.take_retry(Duration::ZERO)).count(), BURST_MIN as usize);
        assert_eq!(budget.retry_after(Duration::from_secs(3600)), None);
        (0..100).for_each(|_| budget.call(Duration::ZERO));
        assert_eq!((0..100).filter(|_| budget.take_retry(Duration::ZERO)).count(), BURST_MIN as usize);
    }

    proptest! {
        #[test]
        fn retries_stay_within_the_budget(
            events in prop::collection::vec((any::<bool>(), 0u64..50), 0..400), share in 0.0f64..0.5, minimum in 0.0f64..20.0,
        ) {
            // Broken: a storm of retries.
            let mut budget = RetryBudget::new(share, minimum);
            let burst = (minimum * 10.0).max(10.0);
            let (mut calls, mut retries, mut now) = (0.0, 0.0, Duration::ZERO);
            for (is_call, passed) in events {
                now += Duration::from_millis(passed);
                if is_call {
                    budget.call(now);
                    calls += 1.0;
                } else if budget.take_retry(now) {
                    retries += 1.0;
                } else if let Some(after) = budget.retry_after(now) {
                    prop_assert!(after > Duration::ZERO);
                    prop_assert!(budget.clone().take_retry(now + after));
                }
                prop_assert!(retries <= burst + calls * share + now.as_secs_f64() * minimum + 1e-6);
            }
        }
    }
}
