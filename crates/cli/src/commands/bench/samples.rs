//! What is collected while a load runs: every call goes in, and durations become histograms. Filled by [`super::load`], read by
//! [`super::figures`], the live line and the page.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::{Serialize, Serializer};

use super::{
    answer::{Answer, Call, Failure},
    slo::Slo,
    timings::Timings,
};

/// Requests that are kept one by one, for plots and `--json`. Histograms have all of them.
const SEEN_MAX: usize = 1_000_000;

/// Everything about the requests of a run, or of several.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    slo: Slo,
    /// Of calls whose requests were all answered.
    pub(crate) calls: Timings,
    pub(crate) calls_ms: Vec<f64>,
    /// From when a request was due to its end; the rest of these, too, are of requests that were answered.
    pub(crate) e2e: Timings,
    /// Until the first token.
    pub(crate) ttft: Timings,
    /// Per token after the first, of each answer.
    pub(crate) tpot: Timings,
    /// Between two messages with tokens.
    pub(crate) gaps: Timings,
    /// What the passes through the model took, where the server tells.
    pub(crate) forward: Timings,
    /// From when calls were due until they were sent: what this process was late by.
    pub(crate) late: Timings,
    /// Answered requests.
    pub(crate) requests: u64,
    /// Those that kept the limits.
    pub(crate) good: u64,
    pub(crate) tokens: u64,
    pub(crate) hash_hits: u64,
    pub(crate) hash_misses: u64,
    /// By code.
    pub(crate) failures: BTreeMap<String, Failures>,
    /// Requests whose server said when to come back.
    pub(crate) told_to_wait: u64,
    pub(crate) seen: Vec<Seen>,
    /// Wall time of the measured part.
    pub(crate) wall: Duration,
}

/// Failures of one code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failures {
    pub(crate) count: u64,
    /// What was said the first time.
    pub(crate) example: String,
}

/// One request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Seen {
    /// From the start of the measurement, seconds.
    pub(crate) due_s: f64,
    pub(crate) late_ms: f32,
    pub(crate) e2e_ms: f32,
    pub(crate) ttft_ms: Option<f32>,
    pub(crate) tpot_ms: Option<f32>,
    pub(crate) tokens: u64,
    /// The code of its failure.
    #[serde(serialize_with = "code")]
    pub(crate) failure: Option<Box<str>>,
}

fn code<S: Serializer>(failure: &Option<Box<str>>, serializer: S) -> Result<S::Ok, S::Error> {
    failure.as_deref().serialize(serializer)
}

impl Samples {
    /// Nothing yet.
    pub(crate) fn new(slo: Slo) -> Self {
        Self { slo, ..Self::default() }
    }

    /// The limits that make an answer a good one.
    pub(crate) fn slo(&self) -> &Slo {
        &self.slo
    }

    /// One call, of a run whose measurement began at `start`.
    pub(crate) fn add(&mut self, call: &Call, start: Instant) {
        self.late.record(call.sent.saturating_duration_since(call.due));
        for reply in &call.replies {
            let e2e = reply.ended.saturating_duration_since(call.due);
            let seen = match &reply.result {
                Ok(answer) => self.answered(answer, call.due, e2e),
                Err(failure) => self.failed(failure, e2e),
            };
            if self.seen.len() < SEEN_MAX {
                let due_s = call.due.saturating_duration_since(start).as_secs_f64();
                self.seen.push(Seen { due_s, late_ms: ms(call.sent.saturating_duration_since(call.due)), ..seen });
            }
        }
        // The time of a call that failed in part says nothing about how long answering takes.
        if call.replies.iter().all(|reply| reply.result.is_ok()) {
            let ended = call.replies.iter().map(|reply| reply.ended).max().unwrap_or(call.sent);
            let latency = ended.saturating_duration_since(call.due);
            self.calls.record(latency);
            if self.calls_ms.len() < SEEN_MAX {
                self.calls_ms.push(latency.as_secs_f64() * 1e3);
            }
        }
    }

    fn answered(&mut self, answer: &Answer, due: Instant, e2e: Duration) -> Seen {
        let ttft = answer.pace.first.map(|first| first.saturating_duration_since(due));
        let tpot = answer.pace.per_token(answer.tokens);
        self.e2e.record(e2e);
        ttft.into_iter().for_each(|ttft| self.ttft.record(ttft));
        tpot.into_iter().for_each(|tpot| self.tpot.record(tpot));
        answer.forward.into_iter().for_each(|forward| self.forward.record(forward));
        answer.pace.gaps.iter().for_each(|gap| self.gaps.record(*gap));
        self.requests += 1;
        self.good += u64::from(self.slo.is_met(ttft, tpot, e2e));
        self.tokens = self.tokens.saturating_add(answer.tokens);
        self.hash_hits += answer.hash_hits;
        self.hash_misses += answer.hash_misses;
        Seen { ttft_ms: ttft.map(ms), tpot_ms: tpot.map(ms), tokens: answer.tokens, ..Seen::of(e2e, None) }
    }

    fn failed(&mut self, failure: &Failure, e2e: Duration) -> Seen {
        let new = || Failures { count: 0, example: failure.message.clone() };
        self.failures.entry(failure.code.clone()).or_insert_with(new).count += 1;
        self.told_to_wait += u64::from(failure.retry_after.is_some());
        Seen::of(e2e, Some(failure.code.as_str().into()))
    }

    /// Requests that were not answered.
    pub(crate) fn failed_requests(&self) -> u64 {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// Adds what a later round saw. Walls add up: rounds follow each other.
    pub(crate) fn merge(&mut self, later: Self) {
        for (own, later) in [
            (&mut self.calls, &later.calls),
            (&mut self.e2e, &later.e2e),
            (&mut self.ttft, &later.ttft),
            (&mut self.tpot, &later.tpot),
            (&mut self.gaps, &later.gaps),
            (&mut self.forward, &later.forward),
            (&mut self.late, &later.late),
        ] {
            own.merge(later);
        }
        let begin_s = self.wall.as_secs_f64();
        let room = SEEN_MAX - self.seen.len();
        self.seen.extend(later.seen.into_iter().take(room).map(|seen| Seen { due_s: begin_s + seen.due_s, ..seen }));
        self.calls_ms.extend(later.calls_ms.into_iter().take(SEEN_MAX - self.calls_ms.len()));
        self.requests += later.requests;
        self.good += later.good;
        self.tokens = self.tokens.saturating_add(later.tokens);
        self.hash_hits += later.hash_hits;
        self.hash_misses += later.hash_misses;
        self.told_to_wait += later.told_to_wait;
        for (code, failures) in later.failures {
            let Failures { count, example } = failures;
            self.failures.entry(code).or_insert_with(|| Failures { count: 0, example }).count += count;
        }
        self.wall += later.wall;
    }
}

impl Seen {
    fn of(e2e: Duration, failure: Option<Box<str>>) -> Self {
        let e2e_ms = ms(e2e);
        Self { due_s: 0.0, late_ms: 0.0, e2e_ms, ttft_ms: None, tpot_ms: None, tokens: 0, failure }
    }

    /// When it ended, from the start of the measurement.
    pub(crate) fn ended_s(&self) -> f64 {
        self.due_s + f64::from(self.e2e_ms) / 1e3
    }
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{
        super::answer::{Pace, Reply},
        *,
    };

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// An answer of three tokens: the first after `first` milliseconds, the others 10 ms apart; due at `due`, sent 1 ms late.
    pub(crate) fn call(start: Instant, due: u64, first: u64) -> Call {
        let due = start + at(due);
        let mut pace = Pace::default();
        for token in 0..3 {
            pace.came(due + at(first + 10 * token));
        }
        let answer = Answer { tokens: 3, pace, forward: Some(at(5)), hash_hits: 9, hash_misses: 1 };
        let reply = Reply { ended: due + at(first + 25), result: Ok(answer) };
        Call { due, sent: due + at(1), replies: vec![reply] }
    }

    /// A request that failed after 7 ms.
    pub(crate) fn failure(start: Instant, due: u64, code: &str) -> Call {
        let due = start + at(due);
        let reply = Reply { ended: due + at(7), result: Err(Failure::new(code, format!("{code} was said"))) };
        Call { due, sent: due, replies: vec![reply] }
    }

    #[test]
    fn times_count_from_when_a_request_was_due() {
        // Broken: a request that waited for this process would look quick, which is how a benchmark leaves out the very
        // requests that a slow server delays.
        let start = Instant::now();
        let mut samples = Samples::new(Slo { ttft: Some(at(100)), ..Slo::default() });
        samples.add(&call(start, 1000, 80), start);
        samples.add(&call(start, 2000, 120), start);
        assert_eq!((samples.requests, samples.good, samples.tokens), (2, 1, 6));
        let of = |timings: &Timings| timings.percentiles().map(|of| (of.min, of.max));
        assert_eq!(of(&samples.ttft), Some((80.0, 120.0)));
        assert_eq!(of(&samples.e2e), Some((105.0, 145.0)));
        assert_eq!(of(&samples.calls), Some((105.0, 145.0)));
        assert_eq!(of(&samples.tpot), Some((10.0, 10.0)));
        assert_eq!(of(&samples.late), Some((1.0, 1.0)));
        assert_eq!(of(&samples.forward), Some((5.0, 5.0)));
        assert_eq!(
            (samples.seen[1].due_s, samples.seen[1].ttft_ms, samples.seen[1].ended_s()),
            (2.0, Some(120.0), 2.145)
        );
    }

    #[test]
    fn failures_are_counted_by_code_and_not_timed() {
        // Broken: refused requests, which return at once, would make the service look fast; or each message be a line.
        let start = Instant::now();
        let mut samples = Samples::default();
        samples.add(&failure(start, 0, "429"), start);
        samples.add(&failure(start, 5, "429"), start);
        samples.add(&failure(start, 9, "timeout"), start);
        assert_eq!((samples.requests, samples.good, samples.failed_requests()), (0, 0, 3));
        assert!(samples.e2e.is_empty() && samples.calls.is_empty() && samples.calls_ms.is_empty());
        assert_eq!(samples.failures["429"], Failures { count: 2, example: "429 was said".to_owned() });
        assert_eq!(samples.seen[2].failure.as_deref(), Some("timeout"));
    }

    #[test]
    fn a_call_that_failed_in_part_has_no_latency() {
        // Broken: batches with refused requests would look quick.
        let start = Instant::now();
        let mut half = call(start, 0, 10);
        half.replies.extend(failure(start, 0, "500").replies);
        let mut samples = Samples::default();
        samples.add(&half, start);
        assert_eq!((samples.requests, samples.failed_requests(), samples.calls_ms.len()), (1, 1, 0));
        half.replies.truncate(1);
        half.replies.extend(call(start, 0, 40).replies);
        samples.add(&half, start);
        assert_eq!(samples.calls_ms, [65.0]);
    }

    #[test]
    fn rounds_follow_each_other() {
        // Broken: later rounds would be drawn over the first, or their failures be lost.
        let start = Instant::now();
        let round = || {
            let mut round = Samples::default();
            round.add(&call(start, 500, 10), start);
            round.add(&failure(start, 600, "500"), start);
            round.wall = at(1000);
            round
        };
        let mut samples = round();
        samples.merge(round());
        assert_eq!((samples.requests, samples.failed_requests(), samples.wall), (2, 2, at(2000)));
        assert_eq!(samples.seen.iter().map(|seen| seen.due_s).collect::<Vec<_>>(), [0.5, 0.6, 1.5, 1.6]);
        assert_eq!(samples.calls_ms.len(), 2);
    }
}
