//! Many durations in little memory, and their percentiles. Filled by [`super::samples`].

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Kept in microseconds up to an hour, to three digits.
const US_MAX: u64 = 3_600_000_000;
const DIGITS: u8 = 3;

/// Durations that were measured. The histogram gives the percentiles; the rest of it is exact.
#[derive(Clone, Debug)]
pub(crate) struct Timings {
    histogram: Histogram<u64>,
    sum: Duration,
    least: Duration,
    most: Duration,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) min: f64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Default for Timings {
    fn default() -> Self {
        let histogram =
            Histogram::new_with_bounds(1, US_MAX, DIGITS).expect("the bounds are right for every histogram");
        Self { histogram, sum: Duration::ZERO, least: Duration::MAX, most: Duration::ZERO }
    }
}

impl Timings {
    pub(crate) fn record(&mut self, duration: Duration) {
        self.histogram.saturating_record(u64::try_from(duration.as_nanos().div_ceil(1000)).unwrap_or(US_MAX));
        self.sum = self.sum.saturating_add(duration);
        self.least = self.least.min(duration);
        self.most = self.most.max(duration);
    }

    /// Adds all of `other`.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("both have the same bounds");
        self.sum = self.sum.saturating_add(other.sum);
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    /// What the share `quantile` of them, 0 to 1, did not exceed, in milliseconds; 0 without any.
    pub(crate) fn quantile_ms(&self, quantile: f64) -> f64 {
        let at_most = self.most.as_secs_f64() * 1e3;
        (self.histogram.value_at_quantile(quantile) as f64 / 1e3).min(at_most)
    }

    /// The lengths that occurred, in milliseconds and to the histogram's three digits, and how often each.
    pub(crate) fn recorded_ms(&self) -> impl Iterator<Item = (f64, u64)> {
        let recorded = self.histogram.iter_recorded();
        recorded.map(|at| (at.value_iterated_to() as f64 / 1e3, at.count_at_value()))
    }

    /// `None` where nothing was measured.
    pub(crate) fn percentiles(&self) -> Option<Percentiles> {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        (!self.is_empty()).then(|| Percentiles {
            min: ms(self.least),
            mean: ms(self.sum) / self.histogram.len() as f64,
            p50: self.quantile_ms(0.5),
            p90: self.quantile_ms(0.9),
            p95: self.quantile_ms(0.95),
            p99: self.quantile_ms(0.99),
            max: ms(self.most),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        // Broken: the report would tell other numbers than were measured.
        let (mut timings, mut rest) = (Timings::default(), Timings::default());
        for ms in 1..=100 {
            if ms % 2 == 0 { &mut timings } else { &mut rest }.record(Duration::from_millis(ms));
        }
        timings.merge(&rest);
        let found = timings.percentiles().unwrap();
        for (found, expected) in [(found.p50, 50.0), (found.p90, 90.0), (found.p95, 95.0), (found.p99, 99.0)] {
            assert!((found - expected).abs() <= expected * 1e-3, "{found} {expected}");
        }
        assert_eq!((found.min, found.mean, found.max), (1.0, 50.5, 100.0));
        assert_eq!(timings.recorded_ms().map(|(_, count)| count).sum::<u64>(), 100);
        assert!(timings.recorded_ms().all(|(ms, _)| (1.0..100.2).contains(&ms)));
    }

    #[test]
    fn extremes_are_no_panic() {
        // Broken: a request that took no time, or a day, would end the benchmark, as would one that nobody answered.
        let mut timings = Timings::default();
        assert_eq!((timings.percentiles(), timings.quantile_ms(0.99)), (None, 0.0));
        timings.record(Duration::ZERO);
        timings.record(Duration::from_secs(86_400));
        let found = timings.percentiles().unwrap();
        assert_eq!((found.min, found.max), (0.0, 86_400_000.0));
        assert!(found.p99 >= 3_600_000.0);
    }
}
