//! How long to go on when everybody was asked and nobody answered: a moment later somebody may be back. One per layer
//! of a batch, kept by the coordinator's dispatch.
//!
//! The problem: all nodes can be away at the same time for a second (a switch that reboots, a machine that is starved,
//! everybody reconnecting), and a request that fails for it was failed for nothing. So who failed for a reason that
//! passes is asked again when it is back: at once the first time, then after pauses that double from [`ROUND_MIN`] to
//! [`ROUND_MAX`], so that nodes which come back and fail at once cost ever less. Every such call is paid for by the
//! [`RetryBudget`](super::RetryBudget), like any other.
//!
//! Only time in which the coordinator was awake counts. A process that was stopped for a minute has waited for nobody:
//! what came meanwhile is still unread.

use std::time::Duration;

/// How often it is looked who is back.
pub const LOOK: Duration = Duration::from_millis(10);
/// The first pause between two rounds over those who are back.
pub const ROUND_MIN: Duration = Duration::from_millis(10);
/// The longest.
pub const ROUND_MAX: Duration = Duration::from_millis(500);
/// A wait that lasted longer than it was to counts for so much more at most.
pub const OVERSLEPT_MAX: Duration = Duration::from_millis(100);

/// How long a layer has waited for a node to come back, and whether that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Patience {
    limit: Duration,
    /// What counts of the time since the begin.
    waited: Duration,
    /// Up to when time was counted.
    counted: Duration,
    rounds: u32,
    next_round: Duration,
}

impl Patience {
    /// Begins at `now`, and lasts for `limit`.
    pub fn new(limit: Duration, now: Duration) -> Self {
        Self { limit, waited: Duration::ZERO, counted: now, rounds: 0, next_round: now }
    }

    /// A wait that was to end at `until` ended at `now`.
    pub fn passed(&mut self, until: Duration, now: Duration) {
        let end = now.min(until.max(self.counted) + OVERSLEPT_MAX);
        self.waited += end.saturating_sub(self.counted);
        self.counted = self.counted.max(now);
    }

    /// Whether it is at its end.
    pub fn is_over(&self) -> bool {
        self.waited >= self.limit
    }

    /// Whether those who failed and are back may be asked again: once in any case, and then as long as it lasts. Calls may take
    /// longer than the pauses between them, so these alone would bring no end.
    pub fn may_ask_again(&self, now: Duration) -> bool {
        now >= self.next_round && (self.rounds == 0 || !self.is_over())
    }

    /// They are asked again.
    pub fn asked_again(&mut self, now: Duration) {
        self.next_round = now + ROUND_MIN.saturating_mul(1u32 << self.rounds.min(16)).min(ROUND_MAX);
        self.rounds = self.rounds.saturating_add(1);
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
    fn it_ends_after_its_limit() {
        // Broken: a request that nobody can answer would be held for ever, or failed before its time.
        let mut patience = Patience::new(ms(100), ms(5000));
        for look in 1..10 {
            patience.passed(ms(5000 + look * 10), ms(5000 + look * 10));
            assert!(!patience.is_over(), "after {look} looks");
        }
        patience.passed(ms(5100), ms(5100));
        assert!(patience.is_over());
        assert!(Patience::new(Duration::ZERO, ms(1)).is_over());
    }

    #[test]
    fn a_coordinator_that_was_stopped_has_not_waited() {
        // Broken: after a pause of the whole machine all requests would fail, although every node goes on with it.
        let mut patience = Patience::new(ms(1000), ms(0));
        patience.passed(ms(10), ms(60_000));
        assert!(!patience.is_over());
        assert_eq!(patience.waited, ms(10) + OVERSLEPT_MAX);
        patience.passed(ms(60_890), ms(60_890));
        assert!(patience.is_over());
    }

    #[test]
    fn who_is_back_is_asked_again_once_at_its_end() {
        // Broken: whoever has no patience fails for a node that was away for a blink, or is asked again for ever.
        let mut patience = Patience::new(Duration::ZERO, ms(0));
        assert!(patience.may_ask_again(ms(0)));
        patience.asked_again(ms(0));
        assert!(!patience.may_ask_again(ms(60_000)));
    }

    #[test]
    fn rounds_come_ever_later() {
        // Broken: nodes that come back and fail at once would be asked without a pause until the budget is spent.
        let mut patience = Patience::new(ms(30_000), ms(0));
        let mut now = ms(700);
        assert!(patience.may_ask_again(now), "who is back is asked at once");
        for pause in [10, 20, 40, 80, 160, 320, 500, 500] {
            patience.asked_again(now);
            assert!(!patience.may_ask_again(now + ms(pause - 1)));
            now += ms(pause);
            assert!(patience.may_ask_again(now));
        }
    }

    proptest! {
        #[test]
        fn what_counts_is_no_more_than_what_passed(waits in prop::collection::vec((0u64..500, 0u64..5000), 0..50)) {
            // Broken: overlapping waits would count twice, and end a request early.
            let mut patience = Patience::new(ms(1), ms(0));
            let mut now = Duration::ZERO;
            for (meant, took) in waits {
                let until = now + ms(meant);
                now += ms(took);
                patience.passed(until, now);
                prop_assert!(patience.waited <= now);
            }
        }
    }
}
