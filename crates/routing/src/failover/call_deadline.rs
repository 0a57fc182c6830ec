//! How long a call to an expert-node may take before the next holder is asked. The limit follows how long the node's
//! calls took, so that a slow node is not given up. A node that hangs is found sooner, by its silence; this limit is
//! for a node that is alive and does not answer.
//!
//! The limit is four times the slowest of the last calls of the same size (a stand-in for the 99th percentile that
//! needs no sorting), at least 50 ms, plus the time that loading the call's experts could take.
//! Part of [`LaneHealth`](super::LaneHealth).

use std::time::Duration;

/// No call is given up before this; it is above what the scheduler of a busy machine takes away.
const CALL_MIN: Duration = Duration::from_millis(50);
/// Assumed time to load an expert until one was seen: a large one from a slow disk.
const LOAD_UNKNOWN: Duration = Duration::from_millis(100);
/// Calls remembered per size, and loads.
const SAMPLES: usize = 128;
/// Sizes: calls of 2^i..2^(i+1) rows.
const SIZES: usize = 16;

/// What the calls of one node took.
#[derive(Clone, Debug)]
pub(crate) struct CallDeadline {
    /// For each size, what calls took without loads.
    calls: [Recent; SIZES],
    /// What loads took, per expert.
    loads: Recent,
}

impl CallDeadline {
    /// For a node that was not called yet.
    pub(crate) fn new() -> Self {
        Self { calls: [const { Recent::new() }; SIZES], loads: Recent::new() }
    }

    /// Notes an answered call: its rows, how long it took in all, and how much of that were how many loads.
    pub(crate) fn note(&mut self, rows: usize, took: Duration, loads: u32, load: Duration) {
        self.calls[size(rows)].push(took.saturating_sub(load));
        if loads > 0 {
            self.loads.push(load / loads);
        }
    }

    /// How long a call of so many rows for so many experts may take.
    pub(crate) fn allow(&self, rows: usize, experts: usize) -> Duration {
        // A size that was never seen is judged by the next larger one that was.
        let seen = self.calls[size(rows)..].iter().find_map(Recent::max).unwrap_or_default();
        let load = self.loads.max().unwrap_or(LOAD_UNKNOWN);
        CALL_MIN.max(seen * 4) + load * u32::try_from(experts).unwrap_or(u32::MAX)
    }
}

fn size(rows: usize) -> usize {
    (rows.max(1).ilog2() as usize).min(SIZES - 1)
}

/// The last `SAMPLES` durations.
#[derive(Clone, Debug)]
struct Recent {
    microseconds: [u32; SAMPLES],
    seen: usize,
}

impl Recent {
    const fn new() -> Self {
        Self { microseconds: [0; SAMPLES], seen: 0 }
    }

    fn push(&mut self, duration: Duration) {
        self.microseconds[self.seen % SAMPLES] = duration.as_micros().try_into().unwrap_or(u32::MAX);
        self.seen += 1;
    }

    fn max(&self) -> Option<Duration> {
        let max = self.microseconds[..self.seen.min(SAMPLES)].iter().max()?;
        Some(Duration::from_micros(u64::from(*max)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn hung_node_costs_little() {
        // Would break: a node that hangs holds a request for much longer than its calls ever took.
        let mut deadline = CallDeadline::new();
        deadline.note(64, ms(3), 2, ms(2));
        assert_eq!(deadline.allow(64, 4), ms(50) + ms(4));
        deadline.note(64, ms(40), 0, ms(0));
        assert_eq!(deadline.allow(100, 4), ms(160) + ms(4));
    }

    #[test]
    fn slow_calls_are_forgotten() {
        // Would break: one slow start makes every later hang cost as much.
        let mut deadline = CallDeadline::new();
        deadline.note(1, ms(1000), 1, ms(1));
        for _ in 0..SAMPLES {
            deadline.note(1, ms(1), 1, ms(1));
        }
        assert_eq!(deadline.allow(1, 1), ms(51));
    }

    #[test]
    fn unknown_load_is_generous() {
        // Would break: the first call to a cold node is given up while it loads.
        assert_eq!(CallDeadline::new().allow(1, 3), ms(350));
    }
}
