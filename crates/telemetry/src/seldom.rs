//! Log lines that could come by the thousand, as where an expert's file is damaged: one a second at most, and ever fewer, down to
//! one a minute, while it goes on. Each says how many were left out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// From the first line to the next at least; the pause doubles with each line.
const APART_MIN: Duration = Duration::from_secs(1);
const APART_MAX: Duration = Duration::from_secs(60);
/// What did not happen for so long is over: if it happens again, that is news.
const QUIET: Duration = Duration::from_secs(10);

/// Lines of one kind.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    /// When the last was written, and the pause after it.
    written: Option<(Instant, Duration)>,
    /// When one was wanted last.
    wanted: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// Whether a line is written at `now`: `None` if it is left out, else how many were since the last that was written.
    pub fn next(&self, now: Instant) -> Option<u64> {
        // A panic while it was held leaves numbers.
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let goes_on = lines.wanted.replace(now).is_some_and(|last| now.saturating_duration_since(last) < QUIET);
        let apart = match lines.written.filter(|_| goes_on) {
            Some((last, apart)) if now.saturating_duration_since(last) < apart => {
                lines.left_out += 1;
                return None;
            }
            Some((_, apart)) => (apart * 2).min(APART_MAX),
            None => APART_MIN,
        };
        lines.written = Some((now, apart));
        Some(std::mem::take(&mut lines.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ever_fewer_while_it_goes_on_and_at_once_after_a_while() {
        // Broken: a request to a damaged model writes a hundred lines, or a cluster whose nodes are away for a night a hundred
        // thousand; nobody learns how often it failed, or that it fails again.
        let (seldom, begin) = (Seldom::default(), Instant::now());
        let at = |ms| seldom.next(begin + Duration::from_millis(ms));
        let lines = [0, 10, 999, 1_000, 2_000, 2_999, 3_000, 3_001].map(at);
        assert_eq!(lines, [Some(0), None, None, Some(2), None, None, Some(2), None]);
        let hour = (3_002..3_603_000).step_by(1_000).filter_map(at).count();
        assert!((60..70).contains(&hour), "{hour} lines in an hour");
        assert_eq!([3_620_000, 3_620_001, 3_621_000].map(at).map(|line| line.is_some()), [true, false, true]);
    }
}
