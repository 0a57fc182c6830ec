//! Figures as a person reads them, or as JSON. Called by `bench` at its end.

use std::fs;

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    budget::Budget,
    figures::{Figures, median},
};
use crate::{byte_size, plain_table::PlainTable};

/// One measured subject: a cluster with its budget.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    /// What tells it from the others: its budget or its endpoint.
    pub(crate) label: String,
    /// Everything it was asked, over all rounds.
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// Requests per second of each round.
    pub(crate) rounds_per_s: Vec<f64>,
    /// Bytes resident at the end, over all nodes.
    pub(crate) resident_bytes: u64,
    /// What could have been, of what the method uses.
    pub(crate) budget: Budget,
    /// What its nodes loaded during the measurement.
    pub(crate) loads: NodeLoads,
}

/// Loads and evictions, summed over expert-nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct NodeLoads {
    /// Ahead of their use.
    pub(crate) prefetched: u64,
    /// While a call waited.
    pub(crate) demanded: u64,
    /// Experts dropped for another.
    pub(crate) evicted: u64,
}

impl NodeLoads {
    /// What was added since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            prefetched: self.prefetched.saturating_sub(earlier.prefetched),
            demanded: self.demanded.saturating_sub(earlier.demanded),
            evicted: self.evicted.saturating_sub(earlier.evicted),
        }
    }
}

impl Measured {
    /// The median over rounds of this subject's throughput as a share of `base`'s in the same round, with
    /// the lowest and the highest.
    fn ratio_to(&self, base: &Self) -> Option<(f64, f64, f64)> {
        let rounds = self.rounds_per_s.iter().zip(&base.rounds_per_s);
        let ratios: Vec<f64> = rounds.filter(|(_, base)| **base > 0.0).map(|(own, base)| own / base).collect();
        let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = ratios.iter().copied().fold(0.0, f64::max);
        Some((median(&ratios)?, lowest, highest))
    }
}

/// Everything, for machines: what was asked and what was measured. One subject's figures are at the top;
/// several are a list, with the ratio of each one's throughput to the first's.
pub(crate) fn as_json(parameters: Value, subjects: &[Measured]) -> Value {
    let mut report = match subjects {
        [subject] => json!(subject),
        subjects => json!({"subjects": subjects, "throughput_ratios_to_first": ratios(subjects)}),
    };
    report["parameters"] = parameters;
    report["peak_rss_bytes"] = json!(peak_rss_bytes());
    report
}

fn ratios(subjects: &[Measured]) -> Vec<Value> {
    let ratios = subjects.iter().filter_map(|subject| subject.ratio_to(subjects.first()?));
    ratios.map(|(median, lowest, highest)| json!({"median": median, "lowest": lowest, "highest": highest})).collect()
}

/// A table with one line per subject, ending in a newline.
pub(crate) fn as_table(subjects: &[Measured], latency_of: &str) -> String {
    let mut table = PlainTable::new([
        "",
        "requests/s",
        "tokens/s",
        "p50 ms",
        "p90 ms",
        "p95 ms",
        "p99 ms",
        "forward p50 ms",
        "resident",
        "budget, of the experts used",
        "hash hits",
        "loads ahead / waited for",
    ]);
    for subject in subjects {
        let figures = &subject.figures;
        let latency = figures.latency_ms;
        let hits = figures.hash_hit_rate.map_or("-".to_owned(), |rate| format!("{:.1}%", 100.0 * rate));
        table.row([
            subject.label.clone(),
            format!("{:.1}", figures.requests_per_s),
            format!("{:.1}", figures.tokens_per_s),
            format!("{:.2}", latency.p50),
            format!("{:.2}", latency.p90),
            format!("{:.2}", latency.p95),
            format!("{:.2}", latency.p99),
            format!("{:.2}", figures.forward_ms.p50),
            byte_size::shown(subject.resident_bytes),
            subject.budget.to_string(),
            hits,
            format!("{} / {}", subject.loads.prefetched, subject.loads.demanded),
        ]);
    }
    let mut text = table.draw();
    text.push_str(&format!("latency is that of {latency_of}\n"));
    for subject in subjects.iter().skip(1) {
        if let Some((median, lowest, highest)) = subject.ratio_to(&subjects[0]) {
            let rounds = subject.rounds_per_s.len();
            text.push_str(&format!(
                "{} has {:.0}% of the throughput of {} (median of {rounds} rounds, {:.0}% to {:.0}%)\n",
                subject.label,
                100.0 * median,
                subjects[0].label,
                100.0 * lowest,
                100.0 * highest,
            ));
        }
    }
    for subject in subjects {
        for (code, count) in &subject.figures.failures {
            text.push_str(&format!("{}: {count} requests failed: {code}\n", subject.label));
        }
    }
    if let Some(bytes) = peak_rss_bytes() {
        text.push_str(&format!("peak memory of this process {}\n", byte_size::shown(bytes)));
    }
    text
}

/// The most memory this process has had resident; `None` where the kernel does not tell.
fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::commands::bench::figures::{Sample, Samples};

    fn measured(label: &str, rounds_per_s: &[f64]) -> Measured {
        let mut samples = Samples { wall: Duration::from_secs(1), ..Default::default() };
        samples.answered(Duration::from_millis(4), &[Sample { tokens: 2, ..Default::default() }]);
        Measured {
            label: label.into(),
            figures: samples.figures(),
            rounds_per_s: rounds_per_s.to_vec(),
            resident_bytes: 1 << 20,
            budget: Budget { bytes: 2 << 20, experts: 16, used_experts: 32, used_bytes: 4 << 20, share: 0.5 },
            loads: NodeLoads::default(),
        }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // Broken: a machine that slows down during the run would be taken for a slow budget.
        let subjects = [measured("100%", &[100.0, 50.0, 10.0]), measured("25%", &[90.0, 40.0, 9.0])];
        assert_eq!(subjects[1].ratio_to(&subjects[0]), Some((0.9, 0.8, 0.9)));
        let text = as_table(&subjects, "a request");
        assert!(text.contains("25% has 90% of the throughput of 100% (median of 3 rounds, 80% to 90%)"), "{text}");
        assert!(text.contains("1.0 MiB") && text.contains("2.0 MiB, 50% (16 of 32)"), "{text}");
        let json = as_json(json!({}), &subjects);
        assert_eq!(json["throughput_ratios_to_first"][1]["median"], 0.9);
        assert_eq!(json["subjects"][0]["latencies_ms"][0], 4.0);
        assert_eq!(json["subjects"][0]["budget"]["share"], 0.5);
        assert_eq!(as_json(json!({}), &subjects[..1])["latency_ms"]["max"], 4.0);
    }
}
