//! How often a peer may do what costs the server more than the peer: cut off its calls, or send frames that do nothing for a
//! call. A call that is reset costs the server its beginning, and the peer two frames; so HTTP/2's limit of open streams does
//! not hold up one that resets each as soon as it has opened it. Counted by [`crate::peer`].

use std::time::Duration;

use tokio::time::Instant;

/// So often at once: all calls that may be open are cut off when a proxy loses those whom it asks for, and each has had some
/// frames.
const BURST: u32 = 2048;
/// And so often by who has earned it: a proxy that was answered much and loses a thousand callers whom it has only just asked for.
const EARNED_MAX: u32 = 8 * BURST;
/// And then one more in this time: far more than callers who lose patience make.
const PERIOD: Duration = Duration::from_millis(10);

/// What a peer has left of one of them.
#[derive(Debug)]
pub(crate) struct Allowance {
    left: u32,
    /// From when on more is to be added.
    since: Instant,
}

impl Allowance {
    /// Nothing was taken yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: BURST, since: now }
    }

    /// It was done so often at `now`: whether that is borne.
    pub(crate) fn is_borne(&mut self, times: u32, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.since).as_nanos() / PERIOD.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        // What was earned stays.
        self.left = self.left.max(self.left.saturating_add(periods).min(BURST));
        self.since += PERIOD.saturating_mul(periods);
        let is_borne = self.left >= times;
        self.left = self.left.saturating_sub(times);
        is_borne
    }

    /// So many more are borne.
    pub(crate) fn earn(&mut self, times: u32) {
        self.left = self.left.saturating_add(times).min(EARNED_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_cuts_off_is_not_borne_and_who_loses_patience_is() {
        // Would break: a peer that opens and resets calls as fast as it can takes a processor; or a proxy whose callers
        // time out, a hundred a second, loses its connection.
        let start = Instant::now();
        let mut cut_off = Allowance::new(start);
        assert_eq!((0..3 * BURST).take_while(|_| cut_off.is_borne(1, start)).count(), BURST as usize);
        assert!(!cut_off.is_borne(1, start + PERIOD / 2));
        assert!(cut_off.is_borne(1, start + PERIOD), "what was refused took nothing");
        assert!(!cut_off.is_borne(1, start + PERIOD));
        let mut patient = Allowance::new(start);
        assert!((0..10 * BURST).all(|call| patient.is_borne(1, start + PERIOD * call)));
        let later = start + Duration::from_secs(1 << 20);
        assert_eq!(
            (0..3 * BURST).take_while(|_| cut_off.is_borne(1, later)).count(),
            BURST as usize,
            "no more is saved up"
        );
        let mut earns = Allowance::new(start);
        assert!((0..10 * BURST).all(|_| {
            earns.earn(3);
            earns.is_borne(3, start)
        }));
        earns.earn(2 * EARNED_MAX);
        assert!(
            earns.is_borne(EARNED_MAX, start + PERIOD * 9) && !earns.is_borne(1, start + PERIOD * 9),
            "no more is earned"
        );
        earns.earn(BURST + 9);
        assert!(earns.is_borne(9, start + PERIOD * 10), "what was earned is not lost");
        assert!(earns.is_borne(BURST, start + PERIOD * 10) && !earns.is_borne(1, start + PERIOD * 10));
    }
}
