//! Which requests are predicted. A prediction is worth its time where it chooses experts, or where a plan lets experts be loaded
//! before they are used. Where hardly any has to be loaded, or each is quickly, a request in `exact` would be computed no sooner
//! for it: all that it tells is how good the predictor is. So there only some are predicted, as many as a small share of the
//! time is enough for, so that hit rates go on being measured and cost next to nothing. Whoever asks seldom is always
//! predicted.
//!
//! A request is predicted from its prompt to its last token or not at all: a net has to see every token of a sequence, and
//! rates of beginnings alone would not be those of the whole.

use std::time::Duration;

/// The share of the time that predictions may take that only measure.
pub const MEASURING_SHARE: f64 = 0.01;
/// What was not used is kept for so long.
const KEPT: Duration = Duration::from_millis(250);

/// What the next predictions that only measure are paid from.
#[derive(Clone, Debug, PartialEq)]
pub struct Measuring {
    share: f64,
    /// Seconds. Invariant: at most those that [`KEPT`] brings. Less than none where a prediction took more than there was.
    left: f64,
    filled: Duration,
}

impl Measuring {
    /// With this share of the time, from 0 to 1; at first it has what is kept at most.
    pub fn new(share: f64) -> Self {
        debug_assert!((0.0..=1.0).contains(&share), "a share of {share}");
        Self { share, left: share * KEPT.as_secs_f64(), filled: Duration::ZERO }
    }

    /// Which requests of a batch are predicted, given of each whether it is routed by its prediction, and whether any
    /// `gains_by_plans`. Of the requests that gain nothing, one is predicted at most, so that what a batch costs is known before
    /// the next.
    pub fn of_batch(
        &mut self,
        routed_by_it: impl IntoIterator<Item = bool>,
        gains_by_plans: bool,
        now: Duration,
    ) -> Vec<bool> {
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        self.left = (self.left + self.share * passed).min(self.share * KEPT.as_secs_f64());
        let mut measures = self.left > 0.0;
        routed_by_it.into_iter().map(|is| is || gains_by_plans || std::mem::take(&mut measures)).collect()
    }

    /// Predictions took so long together, given of each whether it only measured.
    pub fn spent(&mut self, took: Duration, measured: impl IntoIterator<Item = bool>) {
        let (mut all, mut only) = (0u32, 0u32);
        measured.into_iter().for_each(|is| (all, only) = (all + 1, only + u32::from(is)));
        self.left -= took.as_secs_f64() * f64::from(only) / f64::from(all.max(1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// One with nothing left.
    fn poor() -> Measuring {
        let mut measuring = Measuring::new(0.02);
        measuring.spent(ms(100), [true]);
        measuring
    }

    #[test]
    fn what_gains_by_it_is_predicted_whatever_that_costs() {
        // Would break: experts are loaded late, or a request that is to be routed by its prediction has none.
        for routed_by_it in [[false; 3], [true, false, true], [true; 3]] {
            assert_eq!(poor().of_batch(routed_by_it, true, ms(1)), [true; 3]);
            assert_eq!(poor().of_batch(routed_by_it, false, ms(1)), routed_by_it);
        }
    }

    #[test]
    fn the_first_that_gains_nothing_measures() {
        // Would break: no hit rate is known where plans are of no use, or every request pays for it.
        let mut measuring = Measuring::new(0.02);
        assert_eq!(measuring.of_batch([true, false, false], false, ms(0)), [true, true, false]);
        assert_eq!(measuring.of_batch([false, false], false, ms(0)), [true, false]);
        measuring.spent(ms(6), [true]);
        assert_eq!(measuring.of_batch([false], false, ms(49)), [false]);
        assert_eq!(measuring.of_batch([false], false, ms(51)), [true]);
        // Plans are of use from now on: at once, and without being counted.
        assert_eq!(measuring.of_batch([false, false], true, ms(51)), [true, true]);
        assert!(Measuring::new(0.0).of_batch([false], false, ms(10_000)) == [false]);
    }

    #[test]
    fn what_measures_beside_others_pays_its_part() {
        // Would break: beside a request that is routed by its prediction all others are predicted, too, for nothing.
        for (measured, left) in
            [(vec![true], 0.0), (vec![true, false], 0.0025), (vec![false, false], 0.005), (vec![], 0.005)]
        {
            let mut measuring = Measuring::new(0.02);
            measuring.spent(ms(5), measured);
            assert!((measuring.left - left).abs() < 1e-12, "{measuring:?}");
        }
    }

    #[test]
    fn what_is_not_used_is_lost_after_a_while() {
        // Would break: after a quiet night everything is predicted for minutes.
        let mut measuring = Measuring::new(0.02);
        measuring.of_batch([], false, Duration::from_secs(30_000));
        measuring.spent(ms(6), [true]);
        assert_eq!(measuring.of_batch([false], false, Duration::from_secs(30_000)), [false]);
        // A clock that is asked out of order gives nothing twice.
        assert_eq!(measuring.of_batch([false], false, Duration::from_secs(20_000)), [false]);
        assert_eq!(measuring.of_batch([false], false, Duration::from_secs(30_000)), [false]);
    }

    proptest! {
        #[test]
        fn it_takes_its_share_of_the_time(
            batches in prop::collection::vec((0u64..20_000, 1usize..9, 1u64..5_000), 1..400), share in 0.0f64..=0.2,
        ) {
            // Would break: a busy server spends more on measuring than it was given.
            let mut measuring = Measuring::new(share);
            let (mut now, mut spent, mut longest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
            for (pause, requests, took) in batches {
                now += Duration::from_micros(pause);
                let predicted = measuring.of_batch(vec![false; requests], false, now);
                prop_assert!(predicted[1..].iter().all(|is| !is));
                if predicted[0] {
                    let took = Duration::from_micros(took);
                    measuring.spent(took, [true]);
                    (spent, longest) = (spent + took, longest.max(took));
                }
                prop_assert!(spent.as_secs_f64() <= share * (now + KEPT).as_secs_f64() + longest.as_secs_f64() + 1e-9);
            }
        }
    }
}
