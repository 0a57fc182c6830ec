//! Whether a batch that could begin waits a moment for more requests.
//!
//! Callers who wait for an answer before they ask again come back just after a pass has answered them. If those that are
//! there by then begin at once, two halves of the callers take turns for ever, and each pays for a pass of its own. On a
//! GPU that is dear: a pass of eight prompts takes little longer than one of four.
//!
//! So what passes take is noted by their size, and from two sizes follows what two passes cost more than one of all their
//! rows. A batch waits no longer than that, no longer than half of the pass before, and only for as many requests as
//! there were lately. Where passes cost what their rows cost, nothing waits. Callers who do not come back, as
//! those who do not wait for their answers, are soon not waited for: each wait in vain halves the next.

use std::{collections::BTreeMap, time::Duration};

/// The weight of the newest pass in the means.
const NEWEST: f64 = 0.125;
/// A batch waits at most for this share of the pass before.
const OF_PASS: f64 = 0.5;
/// After so many waits in vain a whole one is tried again.
const IN_VAIN_MAX: u32 = 32;

/// What is known of prefills, and how long the next batch waits.
#[derive(Clone, Debug, Default)]
pub struct Gathering {
    /// By the logarithm of their rows, to base 2.
    passes: BTreeMap<u32, Mean>,
    /// Of the last pass.
    magnitude: u32,
    /// As many requests are expected, of which some waited already; and how long for.
    expected: usize,
    waiting: usize,
    /// How many there were after the last pass.
    present: usize,
    patience: Duration,
    /// Waits in vain one after another.
    in_vain: u32,
}

/// Means over passes of about the same size.
#[derive(Clone, Copy, Debug)]
struct Mean {
    rows: f64,
    seconds: f64,
}

impl Gathering {
    /// A prefill of so many rows took so long.
    pub fn note(&mut self, rows: usize, took: Duration) {
        let newest = Mean { rows: rows.max(1) as f64, seconds: took.as_secs_f64() };
        self.magnitude = rows.max(1).ilog2();
        let mean = self.passes.entry(self.magnitude).or_insert(newest);
        mean.rows += NEWEST * (newest.rows - mean.rows);
        mean.seconds += NEWEST * (newest.seconds - mean.seconds);
    }

    /// Nothing runs any more: `answered` requests left last, and `waiting` others have come.
    pub fn idle(&mut self, answered: usize, waiting: usize) {
        // Or as many as after the pass before: callers who ask several at once come back when the last of them is answered.
        let before = std::mem::replace(&mut self.present, answered + waiting);
        (self.expected, self.waiting) = (self.present.max(before), waiting);
        let pass = self.passes.get(&self.magnitude).map_or(0.0, |mean| mean.seconds);
        let halved = 0.5_f64.powi(self.in_vain as i32);
        self.patience = Duration::from_secs_f64(halved * self.saved().min(OF_PASS * pass));
    }

    /// A batch of so many requests begins, after its first one has waited so long with nothing running. That was in vain if less
    /// than half of those that were expected came.
    pub fn begins(&mut self, requests: usize, waited: Duration) {
        let came = requests.saturating_sub(self.waiting);
        if 2 * came >= self.expected - self.waiting {
            self.in_vain = 0;
        } else if waited >= self.patience {
            self.in_vain = (self.in_vain + 1) % IN_VAIN_MAX;
        }
    }

    /// How much longer a batch of `waiting` requests waits for others, after its first one has `waited`; zero: it begins.
    pub fn wait(&self, waiting: usize, waited: Duration) -> Duration {
        if waiting < self.expected { self.patience.saturating_sub(waited) } else { Duration::ZERO }
    }

    /// What a pass as large as the last takes beyond what its rows add to a larger one, in seconds. From the next larger size
    /// that is known, or else the next smaller one, which promises less: rows cost the less, the more there are. 0 while
    /// there is no other.
    fn saved(&self) -> f64 {
        let Some(of) = self.passes.get(&self.magnitude) else { return 0.0 };
        let larger = self.passes.range(self.magnitude + 1..).next();
        let other = larger.or_else(|| self.passes.range(..self.magnitude).next_back());
        let Some((_, other)) = other else { return 0.0 };
        let per_row = (of.seconds - other.seconds) / (of.rows - other.rows);
        (of.seconds - per_row.max(0.0) * of.rows).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    /// After passes of 16 and then 32 rows that took so many microseconds.
    fn after(small: u64, large: u64) -> Gathering {
        let mut gathering = Gathering::default();
        (0..50).for_each(|_| gathering.note(16, us(small)));
        (0..50).for_each(|_| gathering.note(32, us(large)));
        gathering
    }

    #[test]
    fn callers_who_come_back_are_waited_for() {
        // Would break: half of the callers wait while the other half is computed, for ever.
        let mut gathering = after(1000, 1200);
        gathering.idle(4, 4);
        // 800 of 1200 us are paid however few rows there are; half of the pass is less.
        assert_eq!(gathering.wait(4, Duration::ZERO), us(600));
        assert_eq!(gathering.wait(7, us(200)), us(400));
        assert_eq!(gathering.wait(7, us(600)), Duration::ZERO);
        assert_eq!(gathering.wait(8, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn callers_who_stay_away_are_not_waited_for() {
        // Would break: requests that come at random times wait for others again and again, each time in vain.
        let mut gathering = after(1000, 1200);
        for halved in [us(600), us(300), us(150)] {
            gathering.idle(4, 4);
            assert_eq!(gathering.wait(4, Duration::ZERO), halved);
            gathering.begins(4, halved);
        }
        // One success, if not a full one, and they are waited for as before.
        gathering.begins(6, us(75));
        gathering.idle(4, 4);
        assert_eq!(gathering.wait(4, Duration::ZERO), us(600));
        // Or after many in vain: the callers may be others by now.
        (0..IN_VAIN_MAX).for_each(|_| gathering.begins(5, us(600)));
        gathering.idle(4, 4);
        assert_eq!(gathering.wait(4, Duration::ZERO), us(600));
    }

    #[test]
    fn requests_sent_together_run_together() {
        // Would break: one caller's eight requests that once came apart, as three and five, come apart for ever.
        let mut gathering = after(1000, 1200);
        gathering.idle(3, 5);
        gathering.begins(5, us(600));
        gathering.idle(5, 0);
        assert!(gathering.wait(3, Duration::ZERO) > Duration::ZERO);
        gathering.begins(8, us(100));
        // And a caller who is alone from now on waits once more at most.
        gathering.idle(8, 0);
        gathering.idle(1, 0);
        gathering.idle(1, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn nobody_waits_for_what_saves_nothing() {
        // Would break: the model idles, although two passes take as long as one of both.
        let mut gathering = after(1000, 2000);
        gathering.idle(4, 4);
        assert_eq!(gathering.wait(4, Duration::ZERO), Duration::ZERO);
        // A pass that costs little beyond its rows is waited for as little.
        let mut gathering = after(1100, 2000);
        gathering.idle(4, 4);
        assert_eq!(gathering.wait(4, Duration::ZERO), us(200));
    }

    #[test]
    fn a_single_caller_never_waits() {
        // Would break: the latency of a client that is alone.
        let mut gathering = after(1000, 1000);
        gathering.idle(1, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn one_size_says_nothing() {
        // Would break: a batch waits for a saving that nobody has measured.
        let mut gathering = Gathering::default();
        gathering.idle(8, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), Duration::ZERO);
        gathering.note(32, us(1000));
        gathering.idle(8, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), Duration::ZERO);
        // Until another is seen, if only a smaller one.
        gathering.note(16, us(700));
        gathering.note(32, us(1000));
        gathering.idle(8, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), us(400));
        // A larger one tells more.
        gathering.note(64, us(1100));
        gathering.note(32, us(1000));
        gathering.idle(8, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO), us(500));
    }

    #[test]
    fn what_passes_take_is_learnt_anew() {
        // Would break: a model's first, slow pass decides how long batches wait from then on.
        let mut gathering = Gathering::default();
        gathering.note(16, us(1000));
        gathering.note(32, us(100_000));
        (0..100).for_each(|_| gathering.note(32, us(1200)));
        gathering.idle(8, 0);
        assert_eq!(gathering.wait(1, Duration::ZERO).as_micros(), 600);
    }

    proptest! {
        #[test]
        fn waits_are_short(
            passes in prop::collection::vec((0usize..5000, 0u64..1_000_000), 0..40),
            answered in 0usize..100,
            before in 0usize..100,
            waited in 0u64..1_000_000,
        ) {
            // Would break: a wait longer than half of the slowest pass of all, whatever was noted.
            let mut gathering = Gathering::default();
            passes.iter().for_each(|&(rows, took)| gathering.note(rows, us(took)));
            gathering.idle(answered, before);
            let slowest = passes.iter().map(|&(_, took)| took).max().unwrap_or(0);
            for waiting in 0..200 {
                let wait = gathering.wait(waiting, us(waited));
                prop_assert!(wait <= us(slowest.div_ceil(2)).saturating_sub(us(waited)));
                prop_assert!(waiting < answered + before || wait.is_zero());
            }
        }
    }
}
