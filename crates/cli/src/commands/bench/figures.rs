//! What a measurement yields: samples in, throughput and latency percentiles out. Made by [`super::load`],
//! printed by [`super::report`].

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies are kept in microseconds up to an hour, to three digits.
const LATENCY_US_MAX: u64 = 3_600_000_000;

/// One request that was answered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    /// Tokens it generated, or tokens of its text where nothing is generated.
    pub(crate) tokens: u64,
    /// What its passes through the model took, all sequences of their batches together.
    pub(crate) forward: Duration,
    pub(crate) hash_hits: u64,
    pub(crate) hash_misses: u64,
}

/// Collects while the load runs.
#[derive(Default)]
pub(crate) struct Samples {
    /// One per request, or one per batch where requests are sent together. Milliseconds.
    pub(crate) latencies_ms: Vec<f64>,
    /// The forward of each request that was answered. Milliseconds.
    pub(crate) forwards_ms: Vec<f64>,
    pub(crate) requests: u64,
    pub(crate) total: Sample,
    /// By gRPC status code.
    pub(crate) failures: BTreeMap<String, u64>,
    /// Wall time of the measured part.
    pub(crate) wall: Duration,
}

/// The figures of one measurement, as `--json` prints them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) requests: u64,
    pub(crate) failures: BTreeMap<String, u64>,
    pub(crate) wall_s: f64,
    pub(crate) requests_per_s: f64,
    pub(crate) tokens_per_s: f64,
    pub(crate) latency_ms: Latency,
    /// The forward alone, within the same runs: what the passes through the model took that a request was in.
    pub(crate) forward_ms: Latency,
    /// Of the (token, layer) pairs, the share whose expert was in the hash table; none without a predictor.
    pub(crate) hash_hit_rate: Option<f64>,
    pub(crate) latencies_ms: Vec<f64>,
}

/// Milliseconds of a request, or of a whole batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Latency {
    pub(crate) min: f64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Samples {
    /// One answered call: `samples` of it, which took `latency` together.
    pub(crate) fn answered(&mut self, latency: Duration, samples: &[Sample]) {
        self.latencies_ms.push(latency.as_secs_f64() * 1e3);
        self.requests += samples.len() as u64;
        for sample in samples {
            self.forwards_ms.push(sample.forward.as_secs_f64() * 1e3);
            self.total.tokens += sample.tokens;
            self.total.hash_hits += sample.hash_hits;
            self.total.hash_misses += sample.hash_misses;
        }
    }

    /// One refused call.
    pub(crate) fn failed(&mut self, code: String) {
        *self.failures.entry(code).or_default() += 1;
    }

    /// Adds what another client or an earlier round saw. Walls add up: rounds follow each other.
    pub(crate) fn merge(&mut self, other: Self) {
        self.latencies_ms.extend(other.latencies_ms);
        self.forwards_ms.extend(other.forwards_ms);
        self.requests += other.requests;
        self.total.tokens += other.total.tokens;
        self.total.hash_hits += other.total.hash_hits;
        self.total.hash_misses += other.total.hash_misses;
        for (code, count) in other.failures {
            *self.failures.entry(code).or_default() += count;
        }
        self.wall += other.wall;
    }

    /// The figures of everything collected.
    pub(crate) fn figures(&self) -> Figures {
        let wall_s = self.wall.as_secs_f64();
        let per_second = |count: u64| if wall_s > 0.0 { count as f64 / wall_s } else { 0.0 };
        let predicted = self.total.hash_hits + self.total.hash_misses;
        Figures {
            requests: self.requests,
            failures: self.failures.clone(),
            wall_s,
            requests_per_s: per_second(self.requests),
            tokens_per_s: per_second(self.total.tokens),
            latency_ms: Latency::of(&self.latencies_ms),
            forward_ms: Latency::of(&self.forwards_ms),
            hash_hit_rate: (predicted > 0).then(|| self.total.hash_hits as f64 / predicted as f64),
            latencies_ms: self.latencies_ms.clone(),
        }
    }
}

impl Latency {
    /// Of latencies in milliseconds; all zero without any.
    fn of(latencies_ms: &[f64]) -> Self {
        let Ok(mut histogram) = Histogram::<u64>::new_with_bounds(1, LATENCY_US_MAX, 3) else {
            return Self::default();
        };
        for latency in latencies_ms {
            histogram.saturating_record((latency * 1e3).round() as u64);
        }
        if histogram.is_empty() {
            return Self::default();
        }
        let quantile = |q| histogram.value_at_quantile(q) as f64 / 1e3;
        Self {
            min: latencies_ms.iter().copied().fold(f64::INFINITY, f64::min),
            mean: latencies_ms.iter().sum::<f64>() / latencies_ms.len() as f64,
            p50: quantile(0.5),
            p90: quantile(0.9),
            p95: quantile(0.95),
            p99: quantile(0.99),
            max: latencies_ms.iter().copied().fold(0.0, f64::max),
        }
    }
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
    use super::*;

    #[test]
    fn percentiles_and_rates() {
        // Broken: the benchmark would report other numbers than it measured.
        let mut samples = Samples { wall: Duration::from_secs(2), ..Default::default() };
        for ms in 1..=100 {
            let forward = Duration::from_micros(500 * ms);
            let sample = Sample { tokens: 3, forward, hash_hits: 9, hash_misses: 1 };
            samples.answered(Duration::from_millis(ms), &[sample, sample]);
        }
        let figures = samples.figures();
        assert_eq!(figures.requests, 200);
        assert_eq!(figures.requests_per_s, 100.0);
        assert_eq!(figures.tokens_per_s, 300.0);
        assert_eq!(figures.hash_hit_rate, Some(0.9));
        let latency = figures.latency_ms;
        for (found, expected) in [(latency.p50, 50.0), (latency.p90, 90.0), (latency.p99, 99.0), (latency.max, 100.0)] {
            assert!((found - expected).abs() <= expected * 1e-3, "{found} {expected}");
        }
        assert_eq!(latency.mean, 50.5);
        assert!((figures.forward_ms.p50 - 25.0).abs() < 0.1 && figures.forward_ms.max == 50.0);
    }

    #[test]
    fn nothing_measured_is_no_panic() {
        // Broken: a benchmark whose every request fails would panic instead of saying so.
        let mut samples = Samples::default();
        samples.failed("Unavailable".into());
        let figures = samples.figures();
        assert_eq!((figures.requests, figures.requests_per_s, figures.latency_ms), (0, 0.0, Latency::default()));
        assert_eq!(figures.failures["Unavailable"], 1);
    }

    #[test]
    fn medians() {
        // Broken: comparisons would be told by an outlier.
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 100.0]), Some(3.0));
    }
}
