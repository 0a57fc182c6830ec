//! What a measurement yields: throughput, goodput, percentiles. Made from [`super::samples`], printed by [`super::report`].

use std::collections::BTreeMap;

use serde::Serialize;

use super::{samples::Samples, timings::Percentiles};

/// The figures of one measurement, as `--json` prints them. Times are milliseconds; `null` where there is nothing to time.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    /// Answered requests.
    pub(crate) requests: u64,
    /// Failed ones, by code.
    pub(crate) failures: BTreeMap<String, u64>,
    /// What was said the first time, by code.
    pub(crate) failure_examples: BTreeMap<String, String>,
    pub(crate) wall_s: f64,
    pub(crate) requests_per_s: f64,
    pub(crate) tokens_per_s: f64,
    /// Requests a second that kept the limits of `--slo`, and their share of all that were due, failed ones among them. Without
    /// limits every answer keeps them.
    pub(crate) goodput_per_s: f64,
    pub(crate) good_share: f64,
    /// Of a call: a request, or all requests of a batch.
    pub(crate) latency_ms: Percentiles,
    /// Until the first token.
    pub(crate) ttft_ms: Option<Percentiles>,
    /// Per token after the first, of each answer.
    pub(crate) tpot_ms: Option<Percentiles>,
    /// Between messages with tokens.
    pub(crate) itl_ms: Option<Percentiles>,
    /// Of a request, from when it was due to its end.
    pub(crate) e2e_ms: Option<Percentiles>,
    /// By how much requests were sent later than they were due.
    pub(crate) late_ms: Option<Percentiles>,
    /// The forward alone, within the same runs: what the passes through the model took that a request was in.
    pub(crate) forward_ms: Option<Percentiles>,
    /// Of the (token, layer) pairs, the share whose expert was in the hash table; none without a predictor.
    pub(crate) hash_hit_rate: Option<f64>,
}

impl Figures {
    /// The figures of everything collected.
    pub(crate) fn of(samples: &Samples) -> Self {
        let per_second = |count| per_second(samples, count);
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let failures = samples.failures.iter();
        Self {
            requests: samples.requests,
            failures: failures.clone().map(|(code, failures)| (code.clone(), failures.count)).collect(),
            failure_examples: failures.map(|(code, failures)| (code.clone(), failures.example.clone())).collect(),
            wall_s: samples.wall.as_secs_f64(),
            requests_per_s: per_second(samples.requests),
            tokens_per_s: per_second(samples.tokens),
            goodput_per_s: per_second(samples.good),
            good_share: share(samples.good, samples.requests + samples.failed_requests()).unwrap_or(0.0),
            latency_ms: samples.calls.percentiles().unwrap_or_default(),
            ttft_ms: samples.ttft.percentiles(),
            tpot_ms: samples.tpot.percentiles(),
            itl_ms: samples.gaps.percentiles(),
            e2e_ms: samples.e2e.percentiles(),
            late_ms: samples.late.percentiles(),
            forward_ms: samples.forward.percentiles(),
            hash_hit_rate: share(samples.hash_hits, samples.hash_hits + samples.hash_misses),
        }
    }

    /// The times of requests under the names that people know, as far as there are any.
    pub(crate) fn times(&self) -> impl Iterator<Item = (&'static str, Percentiles)> {
        let times = [
            ("time to first token", self.ttft_ms),
            ("time per token after it", self.tpot_ms),
            ("gap between messages", self.itl_ms),
            ("end to end", self.e2e_ms),
            ("sent late by", self.late_ms),
        ];
        times.into_iter().filter_map(|(name, percentiles)| Some((name, percentiles?)))
    }

    /// Requests that were due.
    pub(crate) fn due(&self) -> u64 {
        self.requests + self.failures.values().sum::<u64>()
    }
}

/// Of what a run saw, so many a second.
pub(crate) fn per_second(samples: &Samples, count: u64) -> f64 {
    let wall_s = samples.wall.as_secs_f64();
    if wall_s > 0.0 { count as f64 / wall_s } else { 0.0 }
}

/// The middle of `values` (the mean of the two in the middle); `None` without any.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{
        super::{
            samples::tests::{call, failure},
            slo::Slo,
        },
        *,
    };

    #[test]
    fn rates_are_of_the_wall() {
        // Broken: the benchmark would report other numbers than it measured.
        let start = Instant::now();
        let mut samples = Samples::new(Slo { ttft: Some(Duration::from_millis(50)), ..Slo::default() });
        for first in 1..=100 {
            samples.add(&call(start, 0, first), start);
        }
        for _ in 0..25 {
            samples.add(&failure(start, 0, "429"), start);
        }
        samples.wall = Duration::from_secs(2);
        let figures = Figures::of(&samples);
        assert_eq!(
            (figures.requests, figures.due(), figures.requests_per_s, figures.tokens_per_s),
            (100, 125, 50.0, 150.0)
        );
        assert_eq!((figures.goodput_per_s, figures.good_share), (25.0, 0.4));
        assert_eq!((figures.hash_hit_rate, figures.failures["429"]), (Some(0.9), 25));
        assert_eq!(figures.ttft_ms.map(|ttft| (ttft.mean, ttft.max)), Some((50.5, 100.0)));
    }

    #[test]
    fn nothing_measured_is_no_panic() {
        // Broken: a benchmark whose every request fails would panic instead of saying so, or print NaN, which is no JSON.
        let start = Instant::now();
        let mut samples = Samples::default();
        samples.add(&failure(start, 0, "Unavailable"), start);
        let figures = Figures::of(&samples);
        assert_eq!((figures.requests, figures.requests_per_s, figures.good_share), (0, 0.0, 0.0));
        assert_eq!((figures.latency_ms, figures.ttft_ms), (Percentiles::default(), None));
        assert_eq!(figures.failure_examples["Unavailable"], "Unavailable was said");
        assert!(!serde_json::to_string(&Figures::of(&Samples::default())).unwrap().contains("NaN"));
    }

    #[test]
    fn medians() {
        // Broken: comparisons would be told by an outlier.
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 100.0]), Some(3.0));
    }
}
