//! When a net learns from traffic, which of it, and whether it has become better.
//!
//! It learns once a quarter of what may be kept is new. It is tested on the newest third of that quarter and learns from all
//! that is older: so neither the net that serves, which learnt before any of it came, nor the one that would take its place
//! has seen what both are tested on, and both are asked about the newest traffic there is.

/// The share of what may be kept that is new when a net learns: one in so many.
const NEW: usize = 4;
/// The share of the new that nets are tested on: one in so many.
const TESTED: usize = 3;
/// By how many standard errors a net must be better: that far by chance comes one of 44 that are just as good.
const STANDARD_ERRORS: f64 = 2.0;

/// How much traffic is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learning {
    /// Tokens, at most.
    pub tokens_max: usize,
}

/// What a sequence says of a candidate, beside the net that serves: predictions that were right of the one less those of the
/// other, over all tokens and layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gain {
    /// Of first choices.
    pub first: i64,
    /// Of any choice.
    pub any: i64,
}

impl Learning {
    /// Whether it is time, `new` tokens after the last time.
    pub fn is_due(&self, new: usize) -> bool {
        new >= self.tokens_max.div_ceil(NEW).max(1)
    }

    /// How many of the sequences that are kept, the oldest first, are learnt from: those behind them are tested on. `None` where
    /// one or the other would be nothing.
    pub fn learnt(&self, lengths: &[usize]) -> Option<usize> {
        let wanted = self.tokens_max.div_ceil(NEW * TESTED);
        let mut tested = 0;
        let newest = lengths.iter().rev().take_while(|&&tokens| {
            let is_wanted = tested < wanted;
            tested += tokens;
            is_wanted
        });
        let tested = newest.count();
        Some(lengths.len() - tested).filter(|&learnt| learnt > 0 && tested > 0)
    }
}

/// Whether a candidate is better than the net that serves: its first choice is right more often, by more than chance makes of
/// two that are alike, and what it names at all is right no less often. `gains` are those of the sequences that both were
/// tested on: within a sequence tokens depend on each other, so that only sequences count as independent.
pub fn is_better(gains: &[Gain]) -> bool {
    let count = gains.len() as f64;
    let sum: f64 = gains.iter().map(|gain| gain.first as f64).sum();
    let squares: f64 = gains.iter().map(|gain| (gain.first as f64 - sum / count).powi(2)).sum();
    // Of a single sequence nobody knows how far chance goes.
    let error = (count / (count - 1.0) * squares).sqrt();
    gains.len() > 1 && sum > STANDARD_ERRORS * error && gains.iter().map(|gain| gain.any).sum::<i64>() >= 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A net would be tested on what it, or the one that serves, has learnt from, or learn from nothing.
        #[test]
        fn what_is_tested_is_new(lengths in prop::collection::vec(1usize..40, 0..60), tokens_max in 1usize..2000) {
            let learning = Learning { tokens_max };
            let Some(learnt) = learning.learnt(&lengths) else {
                // All of it fits into the test, or it is nothing.
                prop_assert!(lengths.iter().skip(1).sum::<usize>() < tokens_max.div_ceil(12));
                return Ok(());
            };
            prop_assert!(learnt > 0 && learnt < lengths.len());
            let tested = |from: usize| lengths[from..].iter().sum::<usize>();
            // Enough, and no more: but for a part of one sequence, a third of what is new when it is time.
            prop_assert!(tested(learnt) >= tokens_max.div_ceil(12) && tested(learnt + 1) < tokens_max.div_ceil(12));
            let new = tokens_max.div_ceil(4);
            prop_assert!(learning.is_due(new) && !learning.is_due(new - 1) && tokens_max.div_ceil(12) <= new);
        }

        /// Among nets that are alike, chance would choose; or one that is better everywhere would never be taken.
        #[test]
        fn only_what_is_surely_better_is_taken(firsts in prop::collection::vec(-20i64..20, 2..50), any in -3i64..3) {
            let gains: Vec<Gain> = firsts.iter().map(|&first| Gain { first, any }).collect();
            let opposite: Vec<Gain> = firsts.iter().map(|&first| Gain { first: -first, any: -any }).collect();
            prop_assert!(!(is_better(&gains) && is_better(&opposite)));
            prop_assert!(!is_better(&gains) || (any >= 0 && firsts.iter().sum::<i64>() > 0));
            let all_better: Vec<Gain> = firsts.iter().map(|_| Gain { first: 3, any: 0 }).collect();
            prop_assert!(is_better(&all_better));
        }
    }

    /// A candidate would be taken because of a single sequence, or of one that outweighs all others.
    #[test]
    fn chance_is_not_enough() {
        let gains = |firsts: &[i64]| firsts.iter().map(|&first| Gain { first, any: 0 }).collect::<Vec<_>>();
        for chance in [&[][..], &[9], &[0, 0, 0], &[40, -1, 1, 0], &[3, -3, 2, -1], &[-2, -2]] {
            assert!(!is_better(&gains(chance)), "{chance:?}");
        }
        assert!(is_better(&gains(&[2, 1, 3, 2])));
        // A better first choice at the price of what is named at all.
        assert!(!is_better(&[Gain { first: 2, any: -1 }, Gain { first: 2, any: 0 }]));
    }
}
