//! How long an answer takes, from what was measured of the steps and of the answers before it: so that what cannot be
//! in time is not begun. Under a load that nobody can bear this is what keeps the answers coming: a model that works on
//! requests which are over before they end answers nobody.

use std::time::Duration;

/// What is kept of all sums when another step is noted, or another answer: what was long ago is forgotten.
const KEPT: f64 = 0.98;

/// A step that took longer than so many times what was expected hung, which says little of the next.
const HUNG: u32 = 8;

/// What a model's answers take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Of the steps: how many, their sequences, their seconds, and the products of these.
    steps: f64,
    sequences: f64,
    seconds: f64,
    sequences_squared: f64,
    sequences_seconds: f64,
    /// Of the answers: how many, the steps that they took, and those that they might have taken.
    answers: f64,
    steps_taken: f64,
    steps_allowed: f64,
}

/// A request that is not begun, and what is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Sequences that are begun or will be before it.
    pub sequences: usize,
    /// Sequences of its own.
    pub own: usize,
    /// Sequences of its kind that can run at the same time.
    pub places: usize,
    /// Steps that its own may take at most.
    pub steps: usize,
}

impl Pace {
    /// A step of so many sequences took so long.
    pub fn step(&mut self, sequences: usize, took: Duration) {
        let took = self.step_time(sequences).map_or(took, |expected| took.min(expected.saturating_mul(HUNG)));
        let (n, t) = (sequences as f64, took.as_secs_f64());
        let sums = [
            (&mut self.steps, 1.0),
            (&mut self.sequences, n),
            (&mut self.seconds, t),
            (&mut self.sequences_squared, n * n),
            (&mut self.sequences_seconds, n * t),
        ];
        sums.into_iter().for_each(note);
    }

    /// An answer is complete, after so many steps of those that it was allowed.
    pub fn answered(&mut self, steps: usize, allowed: usize) {
        let sums = [
            (&mut self.answers, 1.0),
            (&mut self.steps_taken, steps as f64),
            (&mut self.steps_allowed, allowed as f64),
        ];
        sums.into_iter().for_each(note);
    }

    /// How long a step of so many sequences takes; `None` before the first was measured.
    ///
    /// A straight line through what was measured: so much for the step, and so much more for each sequence. Where all
    /// steps were of one size it cannot be told apart, and then it is all the sequences'.
    pub fn step_time(&self, sequences: usize) -> Option<Duration> {
        if self.steps == 0.0 {
            return None;
        }
        let (n, t) = (self.sequences / self.steps, self.seconds / self.steps);
        let spread = self.sequences_squared / self.steps - n * n;
        let most = t / n.max(1.0);
        let each = match spread > 0.01 * n * n {
            true => ((self.sequences_seconds / self.steps - n * t) / spread).clamp(0.0, most),
            false => most,
        };
        Some(seconds(t + each * (sequences as f64 - n)))
    }

    /// How long it takes until a request is answered, if the requests behind it change nothing; `None` before anything
    /// was measured.
    pub fn time_for(&self, ahead: Ahead) -> Option<Duration> {
        let places = ahead.places.max(ahead.own).max(1);
        let together = ahead.sequences.saturating_add(ahead.own);
        let step = self.step_time(together.min(places))?.as_secs_f64();
        // Those without a place wait for others to end: so many answers in each place.
        let waited_for = together.saturating_sub(places) as f64 / places as f64;
        let (answer, allowed) = match self.answers > 0.0 && self.steps_allowed > 0.0 {
            true => (self.steps_taken / self.answers, self.steps_taken / self.steps_allowed),
            false => (ahead.steps as f64, 1.0),
        };
        let own = (ahead.steps as f64 * allowed).max(1.0);
        Some(seconds((waited_for * answer.max(1.0) + own) * step))
    }
}

fn note((sum, value): (&mut f64, f64)) {
    *sum = KEPT * *sum + value;
}

/// A time that no clock can tell is the longest of all.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A model whose step takes 2 ms, and 1 ms more for each sequence.
    fn measured(sizes: impl IntoIterator<Item = usize>) -> Pace {
        let mut pace = Pace::default();
        sizes.into_iter().for_each(|size| pace.step(size, MS * (2 + size as u32)));
        pace
    }

    fn milliseconds(time: Option<Duration>) -> f64 {
        (time.expect("measured").as_secs_f64() * 1e4).round() / 10.0
    }

    #[test]
    fn steps_of_other_sizes_are_told_from_those_that_were_seen() {
        // Would break: a node that was idle refuses a burst that it could bear, or takes what it cannot.
        assert_eq!(Pace::default().step_time(1), None);
        let pace = measured([1, 8, 3, 20]);
        assert_eq!(milliseconds(pace.step_time(1)), 3.0);
        assert_eq!(milliseconds(pace.step_time(100)), 102.0);
        // Of one size only: nothing says what a step takes by itself.
        assert_eq!(milliseconds(measured([4; 50]).step_time(8)), 12.0);
        // What is slower the less it computes is noise: more sequences never take less time.
        let mut odd = Pace::default();
        [(1, 50), (10, 5)].into_iter().for_each(|(size, time)| odd.step(size, MS * time));
        assert!(odd.step_time(20) >= odd.step_time(1));
    }

    #[test]
    fn a_step_that_hung_is_soon_forgotten() {
        // Would break: one expert-node that dies makes requests be refused for as long as it takes to forget ten seconds.
        let mut pace = measured([1, 8, 3, 20]);
        pace.step(8, MS * 10_000);
        assert!(pace.step_time(8) < Some(MS * 30));
        // What stays slow is known to be soon.
        (0..100).for_each(|_| pace.step(8, MS * 1000));
        assert!(pace.step_time(8) > Some(MS * 500));
    }

    #[test]
    fn steps_of_lately_count() {
        // Would break: a node that got slower, or quicker, is judged by what it was.
        let mut pace = measured([1, 8, 3, 20]);
        (0..500).for_each(|at| pace.step(1 + at % 9, MS * 10 * (2 + at as u32 % 9 + 1)));
        assert!((milliseconds(pace.step_time(5)) - 70.0).abs() < 0.1);
    }

    #[test]
    fn an_answer_takes_its_steps_and_those_it_waits_for() {
        // Would break: a request is begun that cannot be in time, or refused though it could.
        let mut pace = measured([1, 8, 3, 20]);
        let ahead = Ahead { sequences: 3, own: 1, places: 10, steps: 5 };
        assert_eq!(milliseconds(pace.time_for(ahead)), 5.0 * 6.0);
        // Twenty more than there is room for wait for two answers in each place.
        let full = Ahead { sequences: 29, ..ahead };
        assert_eq!(milliseconds(pace.time_for(full)), (2.0 * 5.0 + 5.0) * 12.0);
        // Answers take half of what they might.
        (0..500).for_each(|_| pace.answered(10, 20));
        assert_eq!(milliseconds(pace.time_for(ahead)), 2.5 * 6.0);
        assert_eq!(milliseconds(pace.time_for(full)), (2.0 * 10.0 + 2.5) * 12.0);
        // What is larger than everything has a place of its own.
        assert_eq!(milliseconds(pace.time_for(Ahead { sequences: 0, own: 20, places: 10, steps: 2 })), 22.0);
    }

    /// What becomes of requests that come evenly, `rate` a second, each of `STEPS` steps and of use for so long, where
    /// nothing is begun that is expected to be late: how many a second are answered in time, and begun in vain.
    fn overloaded(rate: f64, patience: Duration) -> (f64, f64) {
        const STEPS: usize = 8;
        const PLACES: usize = 64;
        const SECONDS: f64 = 20.0;
        let (mut pace, mut now, mut arrival) = (Pace::default(), 0.0, 0.0);
        let mut waiting = VecDeque::new();
        let mut running = Vec::<(f64, usize)>::new();
        let (mut in_time, mut in_vain) = (0, 0);
        for step in 0.. {
            while arrival < now {
                let (deadline, sequences) = (arrival + patience.as_secs_f64(), running.len() + waiting.len());
                let time = pace.time_for(Ahead { sequences, own: 1, places: PLACES, steps: STEPS });
                let is_in_time = time.is_none_or(|time| time.as_secs_f64() <= 0.8 * (deadline - now));
                if sequences == 0 || is_in_time {
                    waiting.push_back(deadline);
                }
                arrival += 1.0 / rate;
            }
            while running.len() < PLACES
                && let Some(deadline) = waiting.pop_front()
            {
                let ahead = Ahead { sequences: running.len(), own: 1, places: PLACES, steps: STEPS };
                if pace.time_for(ahead).is_none_or(|time| now + time.as_secs_f64() <= deadline) {
                    running.push((deadline, 0));
                }
            }
            // A fifth more or less, as no two steps are equal.
            let noise = 0.8 + 0.4 * f64::from(step * 7 % 11) / 10.0;
            let took = match running.len() {
                0 => 0.001,
                running => (0.002 + 0.0001 * running as f64) * noise,
            };
            if !running.is_empty() {
                pace.step(running.len(), seconds(took));
            }
            now += took;
            running.retain_mut(|(deadline, done)| {
                *done += 1;
                let is_over = *done == STEPS || now > *deadline;
                match is_over && now <= *deadline {
                    true => in_time += 1,
                    false => in_vain += usize::from(is_over),
                }
                if is_over && now <= *deadline {
                    pace.answered(STEPS, STEPS);
                }
                !is_over
            });
            if now > SECONDS {
                break;
            }
        }
        (f64::from(in_time) / SECONDS, in_vain as f64 / SECONDS)
    }

    #[test]
    fn answers_keep_coming_however_many_ask() {
        // Would break: the more ask, the more requests are begun that end without an answer, until none is answered.
        for (patience, capacity) in
            [(5000, 64.0 / (8.0 * 0.0084)), (500, 64.0 / (8.0 * 0.0084)), (50, 25.0 / (8.0 * 0.0045))]
        {
            for times in [1.0, 2.0, 5.0, 50.0] {
                let (in_time, in_vain) = overloaded(times * capacity, MS * patience);
                assert!(
                    in_time >= 0.9 * capacity,
                    "{in_time} of {capacity} within {patience} ms at {times} times as many"
                );
                assert!(in_vain <= 0.02 * capacity, "{in_vain} in vain");
            }
        }
        // Nobody is refused where there is room for all.
        let (in_time, _) = overloaded(500.0, MS * 500);
        assert!((499.0..=501.0).contains(&in_time), "{in_time}");
    }

    proptest! {
        #[test]
        fn more_takes_no_less(
            steps in prop::collection::vec((1usize..300, 1u32..1000), 1..50),
            answers in prop::collection::vec((1usize..100, 0usize..100), 0..50),
            sequences in 0usize..1000,
            own in 1usize..20,
            places in 0usize..300,
            length in 0usize..1000,
        ) {
            // Would break: a request is told to come back when more wait, or a longer answer is promised sooner.
            let mut pace = Pace::default();
            steps.into_iter().for_each(|(size, time)| pace.step(size, MS * time));
            answers.into_iter().for_each(|(taken, more)| pace.answered(taken, taken + more));
            let ahead = Ahead { sequences, own, places, steps: length };
            let time = pace.time_for(ahead).expect("measured");
            let behind_more = pace.time_for(Ahead { sequences: sequences + 1, ..ahead }).expect("measured");
            let longer = pace.time_for(Ahead { steps: length + 1, ..ahead }).expect("measured");
            prop_assert!(behind_more >= time && longer >= time && time < Duration::MAX);
        }
    }
}
