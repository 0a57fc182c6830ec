//! Whether a pass goes through the model whole or in two halves, the dense layers of one of which are computed while the
//! experts of the other are. Asked by the coordinator before each pass.
//!
//! Halves hide the way to the expert-nodes and back, and what these compute; but each expert is asked twice for half as
//! many rows, which may cost more. Which weighs more depends on machines, network and model, so it is tried: passes of
//! about the same size take turns, and the faster way is kept for some hundred passes, then tried again. A row has the same
//! bits either way.

use std::{collections::BTreeMap, time::Duration};

/// Passes of each way in a trial, in turns.
const TURNS: usize = 5;
/// Passes between two trials at first. Twice as many each time that the same way was faster again.
const SETTLED_MIN: u32 = 256;
const SETTLED_MAX: u32 = 4096;
/// Halves are kept if they take less than this much of a whole pass's time.
const WORTH_IT: f64 = 0.97;

/// What passes have in common that take about as long per row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PassSize {
    is_decoding: bool,
    /// The logarithm of the rows, to base 2.
    magnitude: u32,
}

/// How a pass goes through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// In one piece.
    Whole,
    /// In two micro-batches.
    Halves,
}

/// What is known of passes by their size.
#[derive(Clone, Debug, Default)]
pub struct MicroBatches {
    sizes: BTreeMap<PassSize, Stage>,
}

#[derive(Clone, Debug)]
enum Stage {
    Trial {
        /// Seconds per row.
        whole: Vec<f64>,
        halves: Vec<f64>,
        /// What the trial before had found, and for how many passes that stood.
        before: Option<(Way, u32)>,
    },
    Settled {
        way: Way,
        passes: u32,
        left: u32,
    },
}

impl PassSize {
    /// Of so many rows.
    pub fn new(is_decoding: bool, rows: usize) -> Self {
        Self { is_decoding, magnitude: rows.max(1).ilog2() }
    }
}

impl MicroBatches {
    /// The way of the next pass of this size.
    pub fn way(&self, size: PassSize) -> Way {
        match self.sizes.get(&size) {
            Some(Stage::Settled { way, .. }) => *way,
            Some(Stage::Trial { whole, halves, .. }) if whole.len() > halves.len() => Way::Halves,
            Some(Stage::Trial { .. }) | None => Way::Whole,
        }
    }

    /// A pass of this size and of `rows` rows went that way.
    pub fn note(&mut self, size: PassSize, way: Way, rows: usize, took: Duration) {
        let stage = self.sizes.entry(size).or_insert_with(|| Stage::trial(None));
        match stage {
            Stage::Trial { whole, halves, before } => {
                let samples = if way == Way::Whole { &mut *whole } else { &mut *halves };
                samples.push(took.as_secs_f64() / rows.max(1) as f64);
                if whole.len() < TURNS || halves.len() < TURNS {
                    return;
                }
                let is_worth_it = median(halves) < WORTH_IT * median(whole);
                let way = if is_worth_it { Way::Halves } else { Way::Whole };
                let passes = match *before {
                    Some((same, passes)) if same == way => (2 * passes).min(SETTLED_MAX),
                    _ => SETTLED_MIN,
                };
                *stage = Stage::Settled { way, passes, left: passes };
            }
            Stage::Settled { way, passes, left } => {
                *left -= 1;
                if *left == 0 {
                    *stage = Stage::trial(Some((*way, *passes)));
                }
            }
        }
    }
}

impl Stage {
    fn trial(before: Option<(Way, u32)>) -> Self {
        Self::Trial { whole: Vec::with_capacity(TURNS), halves: Vec::with_capacity(TURNS), before }
    }
}

/// How many of the sequences with so many rows each are in the first half: about half of the rows, and at least one sequence
/// in each half. `None` if there is one sequence, or none.
pub fn middle(rows: &[usize]) -> Option<usize> {
    let all: usize = rows.iter().sum();
    let mut before = 0;
    let cuts = rows.iter().enumerate().map(|(sequence, rows)| {
        before += rows;
        (before.abs_diff(all - before), sequence + 1)
    });
    let (_, sequences) = cuts.take(rows.len().checked_sub(1)?).min()?;
    Some(sequences)
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: fn() -> PassSize = || PassSize::new(false, 100);

    /// Runs passes that take so long per row whole and in halves; returns the ways they went.
    fn run(micro_batches: &mut MicroBatches, passes: usize, whole: u64, halves: u64) -> Vec<Way> {
        let pass = |_| {
            let way = micro_batches.way(SIZE());
            let per_row = if way == Way::Whole { whole } else { halves };
            micro_batches.note(SIZE(), way, 100, Duration::from_micros(100 * per_row));
            way
        };
        (0..passes).map(pass).collect()
    }

    fn in_halves(ways: &[Way]) -> usize {
        ways.iter().filter(|way| **way == Way::Halves).count()
    }

    /// Would break: the slower way is kept, or tried so often that it costs something.
    #[test]
    fn the_faster_way_is_found_and_kept() {
        for (whole, halves, expected) in [(100, 60, Way::Halves), (60, 100, Way::Whole), (100, 99, Way::Whole)] {
            let mut micro_batches = MicroBatches::default();
            let trial = run(&mut micro_batches, 2 * TURNS, whole, halves);
            assert_eq!(in_halves(&trial), TURNS);
            assert!(trial.chunks(2).all(|turn| turn == [Way::Whole, Way::Halves]), "in turns: {trial:?}");
            let kept = run(&mut micro_batches, SETTLED_MIN as usize, whole, halves);
            assert!(kept.iter().all(|way| *way == expected));
            let many = run(&mut micro_batches, 100_000, whole, halves);
            let others = many.iter().filter(|way| **way != expected).count();
            assert!((TURNS..=100_000 / 400).contains(&others), "{others}");
        }
    }

    /// Would break: a cluster whose network becomes slow goes on as it began.
    #[test]
    fn what_has_changed_is_found_out() {
        let mut micro_batches = MicroBatches::default();
        for (whole, halves) in [(60, 100), (100, 60), (60, 100)] {
            run(&mut micro_batches, 2 * SETTLED_MAX as usize, whole, halves);
            let last = run(&mut micro_batches, 100, whole, halves);
            let is_settled = if whole < halves { in_halves(&last) <= TURNS } else { in_halves(&last) >= 100 - TURNS };
            assert!(is_settled, "{last:?}");
        }
    }

    /// Would break: one pass that waited for a dead node decides for thousands.
    #[test]
    fn single_slow_passes_decide_nothing() {
        let mut micro_batches = MicroBatches::default();
        run(&mut micro_batches, 2, 100, 6000);
        run(&mut micro_batches, 2 * TURNS - 2, 100, 60);
        assert_eq!(micro_batches.way(SIZE()), Way::Halves);
    }

    /// Would break: what is right for prompts is done with single tokens.
    #[test]
    fn sizes_are_apart() {
        let mut micro_batches = MicroBatches::default();
        run(&mut micro_batches, 2 * TURNS, 100, 60);
        assert_eq!(micro_batches.way(PassSize::new(false, 127)), Way::Halves);
        assert_eq!(micro_batches.way(PassSize::new(false, 128)), Way::Whole);
        assert_eq!(micro_batches.way(PassSize::new(true, 100)), Way::Whole);
    }

    proptest! {
        /// Would break: a half without sequences, or one that has nearly everything.
        #[test]
        fn halves_are_about_equal(rows in proptest::collection::vec(1usize..600, 0..40)) {
            let cut = middle(&rows);
            prop_assert_eq!(cut.is_some(), rows.len() > 1);
            if let Some(cut) = cut {
                prop_assert!((1..rows.len()).contains(&cut));
                let (first, second): (usize, usize) = (rows[..cut].iter().sum(), rows[cut..].iter().sum());
                let longest = rows.iter().max().expect("not empty");
                prop_assert!(first.abs_diff(second) <= *longest);
            }
        }
    }
}
