//! Whether a pass goes through the model whole or in micro-batches: by turns, so that the dense layers of one are computed
//! while the experts of another are, or side by side, so that threads need not meet. Asked by the coordinator before each
//! pass.
//!
//! Micro-batches hide the way to the expert-nodes and back, what these compute, and what one thread does while others wait;
//! but each expert is asked several times for fewer rows, which may cost more. Which weighs more depends on machines, network
//! and model, so it is tried: passes of about the same size take turns, and the faster way is kept for some hundred passes,
//! then tried again. A row has the same bits either way.

use std::{collections::BTreeMap, time::Duration};

/// Passes of each way in a trial, in turns.
const TURNS: usize = 8;
/// Passes between two trials at first. Twice as many each time that the same way was faster again.
const SETTLED_MIN: u32 = 256;
const SETTLED_MAX: u32 = 4096;
/// Micro-batches are kept if they take less than this much of a whole pass's time.
const WORTH_IT: f64 = 0.99;

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
    /// In micro-batches.
    Parts,
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
        parts: Vec<f64>,
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
            Some(Stage::Trial { whole, parts, .. }) if whole.len() > parts.len() => Way::Parts,
            Some(Stage::Trial { .. }) | None => Way::Whole,
        }
    }

    /// A pass of this size and of `rows` rows went that way.
    pub fn note(&mut self, size: PassSize, way: Way, rows: usize, took: Duration) {
        let stage = self.sizes.entry(size).or_insert_with(|| Stage::trial(None));
        match stage {
            Stage::Trial { whole, parts, before } => {
                let samples = if way == Way::Whole { &mut *whole } else { &mut *parts };
                samples.push(took.as_secs_f64() / rows.max(1) as f64);
                if whole.len() < TURNS || parts.len() < TURNS {
                    return;
                }
                let is_worth_it = median(parts) < WORTH_IT * median(whole);
                let way = if is_worth_it { Way::Parts } else { Way::Whole };
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
        Self::Trial { whole: Vec::with_capacity(TURNS), parts: Vec::with_capacity(TURNS), before }
    }
}

/// Where sequences of so many rows each are cut into at most `count` micro-batches, in their order: the end of each, which is
/// the sequence nearest to its share of the rows. None of them is empty.
pub fn cuts(rows: &[usize], count: usize) -> Vec<usize> {
    let count = count.min(rows.len());
    // The rows before each sequence, and after the last.
    let mut before = vec![0];
    before.extend(rows.iter().scan(0, |all, rows| {
        *all += rows;
        Some(*all)
    }));
    let all = before[rows.len()];
    let mut cuts = vec![0];
    for part in 1..=count {
        // At least one sequence for this part, and for each after it.
        let ends = cuts[part - 1] + 1..=rows.len() - (count - part);
        let missed = |end: &usize| (before[*end] * count).abs_diff(all * part);
        // The later of equals, so that the last part has what is left even where that is without rows.
        cuts.extend(ends.rev().min_by_key(missed));
    }
    cuts.split_off(1)
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

    /// Runs passes that take so long per row whole and in parts; returns the ways they went.
    fn run(micro_batches: &mut MicroBatches, passes: usize, whole: u64, parts: u64) -> Vec<Way> {
        let pass = |_| {
            let way = micro_batches.way(SIZE());
            let per_row = if way == Way::Whole { whole } else { parts };
            micro_batches.note(SIZE(), way, 100, Duration::from_micros(100 * per_row));
            way
        };
        (0..passes).map(pass).collect()
    }

    fn in_parts(ways: &[Way]) -> usize {
        ways.iter().filter(|way| **way == Way::Parts).count()
    }

    /// Would break: the slower way is kept, or tried so often that it costs something.
    #[test]
    fn the_faster_way_is_found_and_kept() {
        for (whole, parts, expected) in [(100, 60, Way::Parts), (60, 100, Way::Whole), (100, 99, Way::Whole)] {
            let mut micro_batches = MicroBatches::default();
            let trial = run(&mut micro_batches, 2 * TURNS, whole, parts);
            assert_eq!(in_parts(&trial), TURNS);
            assert!(trial.chunks(2).all(|turn| turn == [Way::Whole, Way::Parts]), "in turns: {trial:?}");
            let kept = run(&mut micro_batches, SETTLED_MIN as usize, whole, parts);
            assert!(kept.iter().all(|way| *way == expected));
            let many = run(&mut micro_batches, 100_000, whole, parts);
            let others = many.iter().filter(|way| **way != expected).count();
            assert!((TURNS..=100_000 / 400).contains(&others), "{others}");
        }
    }

    /// Would break: a cluster whose network becomes slow goes on as it began.
    #[test]
    fn what_has_changed_is_found_out() {
        let mut micro_batches = MicroBatches::default();
        for (whole, parts) in [(60, 100), (100, 60), (60, 100)] {
            run(&mut micro_batches, 2 * SETTLED_MAX as usize, whole, parts);
            let last = run(&mut micro_batches, 100, whole, parts);
            let is_settled = if whole < parts { in_parts(&last) <= TURNS } else { in_parts(&last) >= 100 - TURNS };
            assert!(is_settled, "{last:?}");
        }
    }

    /// Would break: one pass that waited for a dead node, or one that had nothing to compute, decides for thousands.
    #[test]
    fn single_slow_or_quick_passes_decide_nothing() {
        for unusual in [6000, 1] {
            let mut micro_batches = MicroBatches::default();
            run(&mut micro_batches, 2, unusual, unusual);
            run(&mut micro_batches, 2 * TURNS - 4, 100, 60);
            run(&mut micro_batches, 2, 100, unusual);
            assert_eq!(micro_batches.way(SIZE()), Way::Parts, "{unusual}");
            let mut micro_batches = MicroBatches::default();
            run(&mut micro_batches, 2, unusual, unusual);
            run(&mut micro_batches, 2 * TURNS - 2, 60, 100);
            assert_eq!(micro_batches.way(SIZE()), Way::Whole, "{unusual}");
        }
    }

    /// Would break: what was found out once stands for long, or trials cost as much where nothing ever changes.
    #[test]
    fn what_is_found_again_stands_for_twice_as_long() {
        let mut micro_batches = MicroBatches::default();
        let mut passes = 0;
        for (whole, parts, expected) in [
            (60, 100, (Way::Whole, 256)),
            (60, 100, (Way::Whole, 512)),
            (100, 60, (Way::Parts, 256)),
            (100, 60, (Way::Parts, 512)),
            (100, 60, (Way::Parts, 1024)),
            (100, 60, (Way::Parts, 2048)),
            (100, 60, (Way::Parts, 4096)),
            (100, 60, (Way::Parts, 4096)),
            (60, 100, (Way::Whole, 256)),
        ] {
            run(&mut micro_batches, passes + 2 * TURNS, whole, parts);
            let Stage::Settled { way, passes: found, left } = micro_batches.sizes[&SIZE()] else { panic!("a trial") };
            assert_eq!(((way, found), left), (expected, found));
            passes = found as usize;
        }
    }

    /// Would break: passes of one kind that have more rows than those of the other look slower.
    #[test]
    fn time_is_counted_per_row() {
        for (whole_rows, parts_rows) in [(64, 127), (127, 64)] {
            let mut micro_batches = MicroBatches::default();
            for _ in 0..TURNS {
                micro_batches.note(SIZE(), Way::Whole, whole_rows, Duration::from_micros(100 * whole_rows as u64));
                micro_batches.note(SIZE(), Way::Parts, parts_rows, Duration::from_micros(90 * parts_rows as u64));
            }
            assert_eq!(micro_batches.way(SIZE()), Way::Parts, "{whole_rows} rows whole, {parts_rows} in parts");
        }
    }

    /// Would break: passes that were begun before a trial's end decide it alone, or bring the coordinator down.
    #[test]
    fn a_trial_needs_passes_of_both_ways() {
        for (first, last) in [(Way::Whole, Way::Parts), (Way::Parts, Way::Whole)] {
            let mut micro_batches = MicroBatches::default();
            (0..2 * TURNS).for_each(|_| micro_batches.note(SIZE(), first, 100, Duration::from_micros(100)));
            assert_eq!(micro_batches.way(SIZE()), last, "it is tried next");
            (1..TURNS).for_each(|_| micro_batches.note(SIZE(), last, 100, Duration::from_micros(100)));
            assert!(matches!(micro_batches.sizes[&SIZE()], Stage::Trial { .. }));
            micro_batches.note(SIZE(), last, 100, Duration::from_micros(100));
            assert!(matches!(micro_batches.sizes[&SIZE()], Stage::Settled { way: Way::Whole, .. }));
        }
    }

    /// Would break: what is right for prompts is done with single tokens.
    #[test]
    fn sizes_are_apart() {
        let mut micro_batches = MicroBatches::default();
        run(&mut micro_batches, 2 * TURNS, 100, 60);
        assert_eq!(micro_batches.way(PassSize::new(false, 127)), Way::Parts);
        assert_eq!(micro_batches.way(PassSize::new(false, 128)), Way::Whole);
        assert_eq!(micro_batches.way(PassSize::new(true, 100)), Way::Whole);
    }

    proptest! {
        /// Would break: a micro-batch without sequences, or one that has nearly everything.
        #[test]
        fn parts_are_as_equal_as_can_be(rows in proptest::collection::vec(0usize..600, 0..40), count in 1usize..9) {
            let cuts = cuts(&rows, count);
            let count = count.min(rows.len());
            prop_assert_eq!(cuts.len(), count);
            prop_assert_eq!(cuts.last().copied().unwrap_or(0), rows.len());
            let missed = |end: usize, part: usize| {
                let share = rows.iter().sum::<usize>() as f64 * part as f64 / count as f64;
                (rows[..end].iter().sum::<usize>() as f64 - share).abs()
            };
            let mut first = 0;
            for (part, end) in (1..).zip(cuts) {
                prop_assert!(first < end && end <= rows.len() - (count - part), "an empty part");
                for other in first + 1..=rows.len() - (count - part) {
                    prop_assert!(missed(end, part) <= missed(other, part) + 1e-6, "{other} is nearer than {end}");
                }
                first = end;
            }
        }
    }
}
