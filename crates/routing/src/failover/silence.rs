//! How long a node may be silent while a call to it is pending. One per lane.
//!
//! While a node works at a call it sends a sign of life every [`HEARTBEAT`], whatever it does for the call. So
//! a hang shows as a gap between signs, and how long a call takes, or a load, need not be guessed for it. What
//! gap is normal depends on the machines and the network between them and is measured: silence is borne for
//! four times the largest gap of late, at least [`ALLOWED_MIN`]; and while somebody else could be asked, for no
//! more than [`ALLOWED_MAX`], which is what a request may lose. With nobody else, giving up gains nothing, and
//! it is borne for [`ALLOWED_ALONE_MIN`] at least.

use std::time::Duration;

/// How often a node with pending calls sends a sign of life.
pub const HEARTBEAT: Duration = Duration::from_millis(25);
/// Silence that is borne in any case: four heartbeats, and above what the scheduler of a busy machine takes.
pub const ALLOWED_MIN: Duration = Duration::from_millis(100);
/// Silence that is borne at most while another node is up.
pub const ALLOWED_MAX: Duration = Duration::from_millis(200);
/// Silence that is borne at least while nobody else could be asked. When that changes, so does the deadline.
pub const ALLOWED_ALONE_MIN: Duration = Duration::from_secs(1);
/// How long a gap is remembered, at least; twice that at most.
pub const REMEMBERED: Duration = Duration::from_secs(10);
/// A longer gap is remembered as this one: it was a hang, and says nothing about what is normal.
pub const GAP_MAX: Duration = Duration::from_secs(1);

/// Watches for signs of life on one lane.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Silence {
    /// The last sign, or the begin of the first pending call if that came later; `None` while nothing is
    /// pending: then a node has nothing to say.
    since: Option<Duration>,
    /// The largest gaps of the current and of the last stretch of [`REMEMBERED`].
    gaps: [Duration; 2],
    /// When the current stretch began.
    stretch: Duration,
}

impl Silence {
    /// Nothing pending, nothing heard yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A call is pending from now on. While others are, it changes nothing.
    pub fn begin(&mut self, now: Duration) {
        self.since.get_or_insert(now);
    }

    /// A sign of life: any message.
    pub fn heard(&mut self, now: Duration) {
        let Some(since) = self.since.replace(now) else {
            // An answer to a call that was given up. Nothing is pending, so silence is none.
            self.since = None;
            return;
        };
        if now >= self.stretch + REMEMBERED {
            let is_next = now < self.stretch + 2 * REMEMBERED;
            self.gaps = [Duration::ZERO, if is_next { self.gaps[0] } else { Duration::ZERO }];
            self.stretch = now;
        }
        self.gaps[0] = self.gaps[0].max(now.saturating_sub(since).min(GAP_MAX));
    }

    /// Nothing is pending any more: the last call was answered or given up, or the connection was lost.
    pub fn end(&mut self) {
        self.since = None;
    }

    /// How much silence is borne now. `others`: whether another node is up that could be asked instead.
    pub fn allowed(&self, others: bool) -> Duration {
        let normal = (self.gaps[0].max(self.gaps[1]) * 4).max(ALLOWED_MIN);
        if others { normal.min(ALLOWED_MAX) } else { normal.max(ALLOWED_ALONE_MIN) }
    }

    /// When the silence will have lasted too long; `None` while nothing is pending.
    pub fn deadline(&self, others: bool) -> Option<Duration> {
        self.since.map(|since| since + self.allowed(others))
    }

    /// Whether the silence has lasted too long.
    pub fn is_over(&self, now: Duration, others: bool) -> bool {
        self.deadline(others).is_some_and(|deadline| now >= deadline)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Heartbeats every `gap` from `now` on for `signs` times; returns when the last came.
    fn beat(silence: &mut Silence, mut now: Duration, gap: Duration, signs: u32) -> Duration {
        silence.begin(now);
        for _ in 0..signs {
            now += gap;
            silence.heard(now);
        }
        now
    }

    #[test]
    fn a_first_hang_costs_a_tenth_of_a_second() {
        // Broken: a request would wait for a hung node longer than the stall that is allowed.
        let mut silence = Silence::new();
        assert_eq!(silence.deadline(true), None);
        silence.begin(ms(1000));
        silence.begin(ms(1050));
        assert_eq!(silence.deadline(true), Some(ms(1100)), "counted from the first pending call");
        assert!(!silence.is_over(ms(1099), true) && silence.is_over(ms(1100), true));
    }

    #[test]
    fn gaps_that_are_normal_here_are_borne() {
        // Broken: on a slow network every call would be given up; or a hang there would be borne for ever.
        let mut silence = Silence::new();
        let now = beat(&mut silence, ms(0), ms(40), 3);
        assert_eq!(silence.allowed(true), ms(160));
        let now = beat(&mut silence, now, ms(90), 1);
        assert_eq!((silence.allowed(true), silence.allowed(false)), (ALLOWED_MAX, ALLOWED_ALONE_MIN));
        let now = beat(&mut silence, now, ms(300), 1);
        assert_eq!((silence.allowed(true), silence.allowed(false)), (ALLOWED_MAX, ms(1200)));
        beat(&mut silence, now, ms(60_000), 1);
        assert_eq!((silence.allowed(true), silence.allowed(false)), (ALLOWED_MAX, 4 * GAP_MAX));
    }

    #[test]
    fn gaps_are_forgotten() {
        // Broken: one pause of a node would make all later hangs cost as much.
        let mut silence = Silence::new();
        let now = beat(&mut silence, ms(0), ms(45), 1);
        assert_eq!(silence.allowed(true), ms(180));
        let now = beat(&mut silence, now, ms(20), 500);
        assert_eq!(silence.allowed(true), ms(180), "remembered for {REMEMBERED:?}");
        beat(&mut silence, now, ms(20), 600);
        assert_eq!(silence.allowed(true), ms(100));
        silence.end();
        beat(&mut silence, ms(500_000), ms(10), 1);
        assert_eq!(silence.allowed(true), ms(100));
    }

    #[test]
    fn gaps_are_remembered_for_two_stretches_at_most() {
        // Broken: what was measured long ago would stand for what is normal now.
        for (now, remembered) in [(ms(19_999), ms(180)), (ms(20_000), ALLOWED_MIN)] {
            let mut silence = Silence::new();
            beat(&mut silence, ms(0), ms(45), 1);
            silence.end();
            beat(&mut silence, now - ms(10), ms(10), 1);
            assert_eq!(silence.allowed(true), remembered, "{now:?}");
        }
    }

    #[test]
    fn an_idle_lane_is_not_silent() {
        // Broken: the first call after a quiet minute would be given up at once, or the minute would count as a gap.
        let mut silence = Silence::new();
        beat(&mut silence, ms(0), ms(20), 5);
        silence.end();
        assert!(!silence.is_over(ms(60_000), true));
        silence.heard(ms(60_000));
        assert_eq!(silence.deadline(true), None);
        silence.begin(ms(70_000));
        assert_eq!(silence.deadline(true), Some(ms(70_100)));
    }

    proptest! {
        #[test]
        fn allowances_stay_within_their_bounds(events in prop::collection::vec((0u8..4, 0u64..3000), 0..100)) {
            // Broken: a node's own delays would teach the coordinator to wait for it longer than a request can bear.
            let mut silence = Silence::new();
            let mut now = Duration::ZERO;
            for (event, passed) in events {
                now += ms(passed);
                match event {
                    0 => silence.begin(now),
                    1 => silence.end(),
                    _ => silence.heard(now),
                }
                prop_assert!((ALLOWED_MIN..=ALLOWED_MAX).contains(&silence.allowed(true)));
                prop_assert!((silence.allowed(true)..=4 * GAP_MAX).contains(&silence.allowed(false)));
            }
        }
    }
}
