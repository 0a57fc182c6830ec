//! Whether the scheduler's steps fail again and again by our own fault, so that others should be asked: weights that are
//! not numbers, a device that computes nothing any more. The expert call of the health check does not see that.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// After so many failed steps in a row, nobody should send requests.
const FAILED_STEPS_MAX: u32 = 3;
/// So long after the last failed step requests are tried again: without any, no step could succeed.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// The outcomes of steps so far.
#[derive(Debug, Default)]
pub(crate) struct StepOutcomes {
    /// Whether the step that is under way answered somebody.
    has_answered: AtomicBool,
    failures: Mutex<Failures>,
}

/// Failed steps in a row.
#[derive(Debug, Default)]
struct Failures {
    steps: u32,
    /// When the last one ended, and what was wrong in it.
    last: Option<(Instant, String)>,
    /// What is wrong in the step that is under way.
    now: Option<String>,
}

impl StepOutcomes {
    /// A request got an answer, or a token of it.
    pub(crate) fn answered(&self) {
        self.has_answered.store(true, Ordering::Relaxed);
    }

    /// A request failed by our own fault.
    pub(crate) fn failed(&self, cause: impl ToString) {
        self.failures.lock().now.get_or_insert_with(|| cause.to_string());
    }

    /// The step is over. One that answered somebody ends the row; one that did neither, such as a prompt's, changes nothing.
    pub(crate) fn step_ended(&self, now: Instant) {
        let has_answered = self.has_answered.swap(false, Ordering::Relaxed);
        let mut failures = self.failures.lock();
        match failures.now.take() {
            _ if has_answered => *failures = Failures::default(),
            Some(cause) => {
                failures.steps = failures.steps.saturating_add(1);
                failures.last = Some((now, cause));
            }
            None => {}
        }
    }

    /// Why requests should go elsewhere, if they should.
    pub(crate) fn failing(&self, now: Instant) -> Option<String> {
        let failures = self.failures.lock();
        let (at, cause) = failures.last.as_ref()?;
        let is_failing = failures.steps >= FAILED_STEPS_MAX && now.saturating_duration_since(*at) < RETRY_AFTER;
        is_failing.then(|| format!("the last {} steps failed: {cause}", failures.steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What steps did, each by a letter: answered, failed, both, or neither (a prompt's).
    fn after(steps: &str) -> (StepOutcomes, Instant) {
        let (outcomes, now) = (StepOutcomes::default(), Instant::now());
        for step in steps.chars() {
            if "ab".contains(step) {
                outcomes.answered();
            }
            if "fb".contains(step) {
                outcomes.failed("a test");
                outcomes.failed("another cause");
            }
            outcomes.step_ended(now);
        }
        (outcomes, now)
    }

    #[test]
    fn only_failures_in_a_row_count() {
        // Would break: a coordinator that cannot answer anybody gets traffic, or one bad request takes it away.
        for (steps, is_failing) in [
            ("", false),
            ("ff", false),
            ("fff", true),
            ("fnfnf", true),
            ("ffaff", false),
            ("ffbf", false),
            ("fffn", true),
            ("fffa", false),
            ("fffff", true),
        ] {
            let (outcomes, now) = after(steps);
            assert_eq!(outcomes.failing(now).is_some(), is_failing, "{steps}");
        }
        let (outcomes, now) = after("ffff");
        assert_eq!(outcomes.failing(now).as_deref(), Some("the last 4 steps failed: a test"));
    }

    #[test]
    fn after_a_while_requests_are_tried_again() {
        // Would break: a coordinator that nobody asks any more stays unready for ever, or is full of requests that fail.
        let (outcomes, then) = after("fff");
        let later = then + RETRY_AFTER;
        assert!(outcomes.failing(later - Duration::from_millis(1)).is_some());
        assert_eq!(outcomes.failing(later), None);
        outcomes.failed("a test");
        outcomes.step_ended(later);
        assert!(outcomes.failing(later).is_some(), "one more is enough");
    }
}
