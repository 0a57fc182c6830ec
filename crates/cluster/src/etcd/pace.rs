//! How many copies may be moved now: so many a minute, with a few at once. Copies that only improve wait for it;
//! those that restore what a failure took do not. Asked by `follow`.

use std::time::Duration;

use tokio::time::Instant;

/// Copies that may move in a minute.
pub(super) const MOVES_PER_MINUTE: f64 = 600.0;
/// Copies that may move at once after a quiet time.
pub(super) const MOVES_AT_ONCE: f64 = 128.0;

/// A bucket that fills with time.
#[derive(Debug)]
pub(super) struct Pace {
    moves: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { moves: MOVES_AT_ONCE, at: now }
    }

    /// Copies that may move now.
    pub(super) fn moves(&mut self, now: Instant) -> usize {
        let since = now.saturating_duration_since(self.at);
        self.moves =
            (self.moves + since.div_duration_f64(Duration::from_secs(60)) * MOVES_PER_MINUTE).min(MOVES_AT_ONCE);
        self.at = now;
        self.moves as usize
    }

    /// So many were moved.
    pub(super) fn moved(&mut self, moves: usize) {
        self.moves = (self.moves - moves as f64).max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_so_many_a_minute() {
        // Broken: a change of load would have every node load at the same time.
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let mut moved = 0;
        for second in 0..=60 {
            let moves = pace.moves(start + Duration::from_secs(second));
            pace.moved(moves);
            moved += moves;
        }
        assert_eq!(moved, (MOVES_AT_ONCE + MOVES_PER_MINUTE) as usize);
    }
}
