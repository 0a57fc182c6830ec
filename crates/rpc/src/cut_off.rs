//! How many of its calls a peer may cut off. A call that is reset costs the server its beginning, and the peer two
//! frames; so HTTP/2's limit of open streams does not hold up one that resets each as soon as it has opened it. Counted
//! by [`crate::peer`].

use std::time::Duration;

use tokio::time::Instant;

/// So many calls may be cut off at once: all that may be open, as when a proxy loses those whom it asks for.
const BURST: u32 = 2048;
/// And then one more in this time: far more than callers who lose patience make.
const PERIOD: Duration = Duration::from_millis(10);

/// What a peer has left.
#[derive(Debug)]
pub(crate) struct CutOff {
    left: u32,
    /// From when on more is to be added.
    since: Instant,
}

impl CutOff {
    /// Nothing has been cut off yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: BURST, since: now }
    }

    /// A call was cut off at `now`: whether that is borne.
    pub(crate) fn is_borne(&mut self, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.since).as_nanos() / PERIOD.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(periods).min(BURST);
        self.since += PERIOD.saturating_mul(periods);
        let is_borne = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_borne
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
        let mut cut_off = CutOff::new(start);
        assert_eq!((0..3 * BURST).take_while(|_| cut_off.is_borne(start)).count(), BURST as usize);
        assert!(!cut_off.is_borne(start + PERIOD / 2));
        assert!(cut_off.is_borne(start + PERIOD), "what was refused took nothing");
        assert!(!cut_off.is_borne(start + PERIOD));
        let mut patient = CutOff::new(start);
        assert!((0..10 * BURST).all(|call| patient.is_borne(start + PERIOD * call)));
        let later = start + Duration::from_secs(1 << 20);
        assert_eq!(
            (0..3 * BURST).take_while(|_| cut_off.is_borne(later)).count(),
            BURST as usize,
            "no more is saved up"
        );
    }
}
