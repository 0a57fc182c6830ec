//! Log lines that could come by the thousand, as where an expert's file is damaged: one a second at most, which says how many were
//! left out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// From one line to the next at least.
const APART: Duration = Duration::from_secs(1);

/// Lines of one kind.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    last: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// Whether a line is written at `now`: `None` if it is left out, else how many were since the last that was written.
    pub fn next(&self, now: Instant) -> Option<u64> {
        // A panic while it was held leaves numbers.
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.last.is_some_and(|last| now.saturating_duration_since(last) < APART) {
            lines.left_out += 1;
            return None;
        }
        lines.last = Some(now);
        Some(std::mem::take(&mut lines.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_and_how_many_not() {
        // Broken: a request to a damaged model writes a hundred lines, or nobody learns how often it failed.
        let (seldom, begin) = (Seldom::default(), Instant::now());
        let lines =
            [0, 0, 10, 999, 1_000, 1_001, 5_000, 6_000].map(|ms| seldom.next(begin + Duration::from_millis(ms)));
        assert_eq!(lines, [Some(0), None, None, None, Some(3), None, Some(1), Some(0)]);
    }
}
