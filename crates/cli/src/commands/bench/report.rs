//! Figures as a person reads them, or as JSON. Called by `bench` at its end.

use std::{fs, time::Duration};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use sida_telemetry::counted;

use super::{
    budget::Budget,
    figures::{Figures, median},
    replay,
    samples::{Samples, Seen},
};
use crate::{byte_size, node_state::NodeLoads, plain_table::PlainTable};

/// One measured subject: a cluster with its budget, or a server.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    /// What tells it from the others: its budget or its address.
    pub(crate) label: String,
    /// Everything it was asked, over all rounds.
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// Requests per second of each round.
    pub(crate) rounds_per_s: Vec<f64>,
    /// What its nodes hold; `None` of a server behind a URL.
    #[serde(flatten)]
    pub(crate) cluster: Option<Cluster>,
    /// The latency of every call, in milliseconds, and every request.
    #[serde(flatten, serialize_with = "each")]
    pub(crate) samples: Samples,
}

/// What the nodes of a measured cluster hold.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cluster {
    /// Bytes resident at the end, over all nodes.
    pub(crate) resident_bytes: u64,
    /// What could have been, of what the method uses.
    pub(crate) budget: Budget,
    /// What its nodes loaded during the measurement.
    pub(crate) loads: NodeLoads,
}

fn each<S: Serializer>(samples: &Samples, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Each<'a> {
        latencies_ms: &'a [f64],
        samples: &'a [Seen],
    }
    Each { latencies_ms: &samples.calls_ms, samples: &samples.seen }.serialize(serializer)
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
pub(crate) fn as_json(parameters: Value, subjects: &[Measured]) -> impl Serialize {
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Body<'a> {
        One(&'a Measured),
        Several { subjects: &'a [Measured], throughput_ratios_to_first: Vec<Value> },
    }
    #[derive(Serialize)]
    struct Report<'a> {
        #[serde(flatten)]
        body: Body<'a>,
        parameters: Value,
        peak_rss_bytes: Option<u64>,
    }
    let body = match subjects {
        [subject] => Body::One(subject),
        subjects => Body::Several { subjects, throughput_ratios_to_first: ratios(subjects) },
    };
    Report { body, parameters, peak_rss_bytes: peak_rss_bytes() }
}

fn ratios(subjects: &[Measured]) -> Vec<Value> {
    let ratios = subjects.iter().filter_map(|subject| subject.ratio_to(subjects.first()?));
    ratios.map(|(median, lowest, highest)| json!({"median": median, "lowest": lowest, "highest": highest})).collect()
}

/// Tables with one line per subject and one per kind of time, and what else is to be said, ending in a newline.
pub(crate) fn as_text(subjects: &[Measured], parameters: &Value) -> String {
    let mut text = summary(subjects).draw();
    let closed = parameters["arrivals"]["kind"] == "closed";
    let since = if closed { "was sent" } else { "was due, whether or not it could be sent then" };
    let of = parameters["latency_of"].as_str().unwrap_or("a request");
    text.push_str(&format!("latency is that of {of}, from when it {since}\n"));
    if let Some(told) = replay::told(parameters) {
        text.push_str(&format!("{told}\n"));
    }
    if let Some(times) = times(subjects) {
        text.push_str(&format!("\n{}\n", times.draw()));
    }
    for line in ratio_lines(subjects) {
        text.push_str(&line);
    }
    for subject in subjects {
        text.push_str(&told(subject, parameters));
    }
    if let Some(bytes) = peak_rss_bytes() {
        text.push_str(&format!("peak memory of this process {}\n", byte_size::shown(bytes)));
    }
    text
}

/// Of the cluster, nothing where no subject is one.
fn summary(subjects: &[Measured]) -> PlainTable {
    let of_clusters =
        ["forward p50 ms", "resident", "budget, of the experts used", "hash hits", "loads ahead / waited for"];
    let of_clusters = if subjects.iter().any(|subject| subject.cluster.is_some()) { &of_clusters[..] } else { &[] };
    let header = ["", "requests/s", "tokens/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms"];
    let mut table = PlainTable::new(header.into_iter().chain(of_clusters.iter().copied()));
    for subject in subjects {
        let figures = &subject.figures;
        let latency = figures.latency_ms;
        let mut row = vec![subject.label.clone()];
        row.extend([figures.requests_per_s, figures.tokens_per_s].map(|rate| format!("{rate:.1}")));
        row.extend([latency.p50, latency.p90, latency.p95, latency.p99].map(|ms| format!("{ms:.2}")));
        if let Some(cluster) = &subject.cluster {
            row.push(figures.forward_ms.map_or("-".to_owned(), |forward| format!("{:.2}", forward.p50)));
            row.push(byte_size::shown(cluster.resident_bytes));
            row.push(cluster.budget.to_string());
            row.push(figures.hash_hit_rate.map_or("-".to_owned(), |rate| format!("{:.1}%", 100.0 * rate)));
            row.push(format!("{} / {}", cluster.loads.prefetched, cluster.loads.demanded));
        }
        table.row(row);
    }
    table
}

/// When tokens came; nothing where none were generated.
fn times(subjects: &[Measured]) -> Option<PlainTable> {
    let mut table = PlainTable::new(["", "p50 ms", "p90 ms", "p99 ms", "max ms", "mean ms"]);
    let has_tokens = |subject: &&Measured| subject.figures.ttft_ms.is_some();
    for subject in subjects.iter().filter(has_tokens) {
        for (name, percentiles) in subject.figures.times() {
            let name = if subjects.len() > 1 { format!("{}: {name}", subject.label) } else { name.to_owned() };
            let cells = [percentiles.p50, percentiles.p90, percentiles.p99, percentiles.max, percentiles.mean];
            table.row([name].into_iter().chain(cells.map(|ms| format!("{ms:.2}"))));
        }
    }
    subjects.iter().any(|subject| has_tokens(&subject)).then_some(table)
}

fn ratio_lines(subjects: &[Measured]) -> impl Iterator<Item = String> {
    subjects.iter().skip(1).filter_map(|subject| {
        let (median, lowest, highest) = subject.ratio_to(&subjects[0])?;
        Some(format!(
            "{} has {:.0}% of the throughput of {} (median of {} rounds, {:.0}% to {:.0}%)\n",
            subject.label,
            100.0 * median,
            subjects[0].label,
            subject.rounds_per_s.len(),
            100.0 * lowest,
            100.0 * highest,
        ))
    })
}

/// What a machine that sends in time is late by at most. It is more where it has too much else to do.
const LATE: Duration = Duration::from_millis(10);

/// Goodput, failures, and whether the schedule was kept.
fn told(subject: &Measured, parameters: &Value) -> String {
    let (label, figures) = (&subject.label, &subject.figures);
    let mut text = String::new();
    if parameters["slo"].as_object().is_some_and(|limits| !limits.is_empty()) {
        let limits = subject.samples.slo();
        text.push_str(&format!(
            "{label}: goodput {:.1} requests/s, {:.1}% of {} requests ({limits})\n",
            figures.goodput_per_s,
            100.0 * figures.good_share,
            figures.due(),
        ));
    }
    for (code, count) in &figures.failures {
        let example = figures.failure_examples.get(code).map_or("", String::as_str);
        text.push_str(&format!("{label}: {} failed: {code}: {example}\n", counted(*count, "request")));
    }
    if subject.samples.told_to_wait > 0 {
        let told = subject.samples.told_to_wait;
        let done = match parameters["arrivals"]["kind"] == "closed" {
            true => "clients waited as they were asked",
            false => "an open loop does not wait",
        };
        text.push_str(&format!("{label}: {told} refusals said when to come back: {done}\n"));
    }
    if let Some(late) = figures.late_ms.filter(|late| late.p99 > LATE.as_secs_f64() * 1e3) {
        text.push_str(&format!(
            "{label}: 1% of requests were sent {:.0} ms late or more: this machine was too busy to keep the schedule\n",
            late.p99,
        ));
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
pub(crate) mod tests {
    use std::time::Instant;

    use super::{
        super::{
            samples::tests::{call, failure},
            slo::Slo,
        },
        *,
    };

    pub(crate) fn measured(label: &str, rounds_per_s: &[f64]) -> Measured {
        let start = Instant::now();
        let slo = Slo { e2e: Some(Duration::from_millis(50)), ..Slo::default() };
        let mut samples = Samples::new(slo);
        samples.wall = Duration::from_secs(1);
        samples.add(&call(start, 0, 15), start);
        samples.add(&call(start, 10, 35), start);
        Measured {
            label: label.into(),
            figures: Figures::of(&samples),
            samples,
            rounds_per_s: rounds_per_s.to_vec(),
            cluster: Some(Cluster {
                resident_bytes: 1 << 20,
                budget: Budget { bytes: 2 << 20, experts: 16, used_experts: 32, used_bytes: 4 << 20, share: 0.5 },
                loads: NodeLoads::default(),
            }),
        }
    }

    fn parameters(kind: &str) -> Value {
        json!({"arrivals": {"kind": kind}, "latency_of": "a request", "slo": {"e2e_ms": 50.0}})
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // Broken: a machine that slows down during the run would be taken for a slow budget.
        let subjects = [measured("100%", &[100.0, 50.0, 10.0]), measured("25%", &[90.0, 40.0, 9.0])];
        assert_eq!(subjects[1].ratio_to(&subjects[0]), Some((0.9, 0.8, 0.9)));
        let text = as_text(&subjects, &parameters("closed"));
        assert!(text.contains("25% has 90% of the throughput of 100% (median of 3 rounds, 80% to 90%)"), "{text}");
        assert!(text.contains("1.0 MiB") && text.contains("2.0 MiB, 50% (16 of 32)"), "{text}");
        let json = serde_json::to_value(as_json(json!({}), &subjects)).unwrap();
        assert_eq!(json["throughput_ratios_to_first"][1]["median"], 0.9);
        assert_eq!(json["subjects"][0]["latencies_ms"][0], 40.0);
        assert_eq!(json["subjects"][0]["budget"]["share"], 0.5);
    }

    #[test]
    fn json_has_everything_of_one_subject_at_its_top() {
        // Broken: scripts that read the figures would find none.
        let json = serde_json::to_value(as_json(parameters("poisson"), &[measured("url", &[2.0])])).unwrap();
        for times in ["latency_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms", "forward_ms"] {
            for percentile in ["min", "mean", "p50", "p90", "p95", "p99", "max"] {
                assert!(json[times][percentile].is_number(), "{times} {percentile}");
            }
        }
        assert_eq!((&json["latency_ms"]["max"], &json["ttft_ms"]["max"]), (&json!(60.0), &json!(35.0)));
        assert_eq!((&json["requests"], &json["good_share"], &json["failures"]), (&json!(2), &json!(0.5), &json!({})));
        let sample = json!({"due_s": 0.01, "late_ms": 1.0, "e2e_ms": 60.0, "ttft_ms": 35.0, "tpot_ms": 10.0, "tokens": 3, "failure": null});
        assert_eq!(json["samples"][1], sample);
        assert_eq!(json["parameters"]["arrivals"]["kind"], "poisson");
    }

    #[test]
    fn a_person_is_told_what_times_count_from_and_what_failed() {
        // Broken: figures of an open and of a closed loop could not be told apart, and failures pass unseen.
        let start = Instant::now();
        let mut subject = measured("http://peer/v1", &[2.0]);
        subject.cluster = None;
        subject.samples.add(&failure(start, 0, "429"), start);
        subject.samples.late.record(Duration::from_millis(500));
        subject.figures = Figures::of(&subject.samples);
        let text = as_text(&[subject.clone()], &parameters("poisson"));
        for told in [
            "from when it was due",
            "time to first token",
            "goodput 1.0 requests/s, 33.3% of 3 requests (e2e 50ms)",
            "1 request failed: 429: 429 was said",
            "500 ms late or more",
        ] {
            assert!(text.contains(told), "{told}: {text}");
        }
        assert!(!text.contains("resident") && !text.contains("budget"), "{text}");
        let mut replaying = parameters("closed");
        assert!(!text.contains("routers"), "{text}");
        replaying["routes"] = json!({"file": "a.csv"});
        assert!(as_text(&[subject.clone()], &replaying).contains("recorded in a.csv"));
        assert!(as_text(&[subject], &parameters("closed")).contains("from when it was sent"));
    }
}
