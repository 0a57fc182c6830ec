//! How fast something may come on the whole, however many bring it. A decision of when, without a clock; waited for by
//! [`crate::request_body`].

use std::time::Duration;

use tokio::time::Instant;

/// What comes at a pace.
#[derive(Debug)]
pub(crate) struct RateLimit {
    per_second: f64,
    /// So far ahead of the pace it may come.
    ahead: Duration,
    /// When all that has come would have come at that pace.
    until: Instant,
}

impl RateLimit {
    /// So much `per_second`, and as much at once as comes in `ahead`. Nothing has come at `now`.
    pub(crate) fn new(per_second: f64, ahead: Duration, now: Instant) -> Self {
        Self { per_second, ahead, until: now }
    }

    /// So much came at `now`: until when what comes next has to wait, if so.
    pub(crate) fn takes(&mut self, amount: f64, now: Instant) -> Option<Instant> {
        self.until = self.until.max(now) + Duration::from_secs_f64(amount / self.per_second);
        (self.until - now > self.ahead).then(|| self.until - self.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would break: a flood takes all of the processors, or what comes at its pace waits.
    #[test]
    fn what_is_ahead_of_its_pace_waits() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut limit = RateLimit::new(4.0, second, start);
        assert_eq!([1.0, 2.0, 1.0].map(|amount| limit.takes(amount, start)), [None; 3], "as much as comes in a second");
        assert_eq!(limit.takes(1.0, start), Some(start + second / 4));
        assert_eq!(limit.takes(1.0, start + second / 4), Some(start + second / 2));
        assert!((0..9).all(|period| limit.takes(1.0, start + second + period * second / 4).is_none()), "at its pace");
        let later = start + 60 * second;
        assert_eq!(limit.takes(4.0, later), None);
        assert_eq!(limit.takes(8.0, later), Some(later + 2 * second), "no more is saved up than comes in a second");
    }
}
