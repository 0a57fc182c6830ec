//! What load the flags ask for. Read by `bench` before anything is started, so that what cannot work is told at once.

use std::{path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use clap::Args;
use serde_json::{Value, json};
use sida_telemetry::counted;

use super::{
    arrivals::{self, Rate},
    load::{Closed, Load, Open, Pattern, Until},
    slo::Slo,
};
use crate::{bad_configuration::BadConfiguration, text_file, time_span};

/// How requests are sent.
#[derive(Args, Clone, Debug)]
pub(crate) struct LoadArguments {
    /// Clients, each with one call under way [default: 1]. In an open loop: connections to --endpoint [default: 16]
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Requests of a call: sent together, answered when all of them are
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with_all = ["rate", "ramp", "arrivals"])]
    pub(crate) batch: usize,
    /// Send so many requests a second on average, at random times (a Poisson process), whatever became of earlier ones: an open
    /// loop
    #[arg(long, value_name = "R", value_parser = Rate::steady, conflicts_with_all = ["ramp", "arrivals"])]
    rate: Option<Rate>,
    /// The same with a rate that goes evenly from A to B over the run, as 1..50
    #[arg(long, value_name = "A..B", conflicts_with_all = ["arrivals", "requests"])]
    ramp: Option<Rate>,
    /// Send requests at the times of a file: seconds since the start, a number a line, in order
    #[arg(long, value_name = "FILE")]
    arrivals: Option<PathBuf>,
    /// With --rate and --ramp: the times are the same again with the same seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    arrival_seed: u64,
    /// Stop after so many requests, per subject and round
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    requests: Option<u64>,
    /// Stop after so much time, per subject and round [default: 5s, or all of --arrivals]
    #[arg(long, value_name = "TIME", value_parser = time_span::parse)]
    duration: Option<Duration>,
    /// Leave out the beginning: so many requests, or so much time as 10s. In a closed loop they are sent before, per subject
    /// [default: 4 calls per client; where a cluster is measured, every text once if that is more]. In an open loop they are
    /// the first of each round [default: none]
    #[arg(long, value_name = "N|TIME")]
    warmup: Option<Warmup>,
    /// Give up on a request after so much time
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time_span::parse)]
    timeout: Duration,
    /// Count requests that keep all of these limits (goodput), as ttft=200ms,tpot=50ms,e2e=2s: time to the first token, time per
    /// token after it, time to the end
    #[arg(long, value_name = "LIMITS")]
    slo: Option<Slo>,
}

/// What is left out of the measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Warmup {
    Requests(u64),
    Time(Duration),
}

impl FromStr for Warmup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(requests) => Ok(Self::Requests(requests)),
            Err(_) => time_span::parse(text).map(Self::Time),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) load: Load,
    /// What is sent before it.
    pub(crate) warming: Option<Load>,
    /// Clients, or connections.
    pub(crate) concurrency: usize,
    /// As `--json` tells it.
    pub(crate) parameters: Value,
}

/// When requests of an open loop are due.
struct Schedule {
    times: Arc<[Duration]>,
    /// What gave the times, as `--json` tells it.
    told: Value,
}

/// The longest run: what its samples take stays well below what a model takes.
const BATCH_MAX: usize = 4096;

/// Requests of an open loop that may be under way at a time.
const UNDER_WAY_MAX: usize = 1 << 16;

impl LoadArguments {
    /// The plan for `texts` different texts, all of which a cluster should have seen once.
    pub(crate) fn plan(&self, texts: Option<usize>) -> Result<Plan, BadConfiguration> {
        self.check()?;
        let slo = self.slo.unwrap_or_default();
        let until = match (self.requests, self.duration) {
            (Some(requests), _) => Some(Until::Requests(requests)),
            (None, duration) => duration.map(Until::Elapsed),
        };
        let timed = |pattern| Load { pattern, timeout: self.timeout, slo };
        let schedule = self.schedule(until)?;
        let concurrency = self.concurrency.unwrap_or(if schedule.is_some() { 16 } else { 1 });
        let mut parameters = json!({
            "concurrency": concurrency,
            "batch": self.batch,
            "timeout_s": self.timeout.as_secs_f64(),
            "slo": slo.as_json(),
        });
        let Some(Schedule { times, told }) = schedule else {
            parameters["arrivals"] = json!({"kind": "closed"});
            let until = until.unwrap_or(DEFAULT);
            let closed = |until| timed(Pattern::Closed(Closed { concurrency, batch: self.batch, until }));
            let warming = Some(closed(self.warming(concurrency, texts)));
            return Ok(Plan { load: closed(until), warming, concurrency, parameters });
        };
        let counts_from = self.counts_from(&times)?;
        parameters["arrivals"] = told;
        parameters["arrivals"]["due"] = json!(times.len());
        parameters["arrivals"]["counts_from_s"] = json!(counts_from.as_secs_f64());
        let open = Open { times, counts_from, under_way_max: UNDER_WAY_MAX };
        Ok(Plan { load: timed(Pattern::Open(open)), warming: None, concurrency, parameters })
    }

    fn check(&self) -> Result<(), BadConfiguration> {
        for (name, value) in [("--concurrency", self.concurrency.unwrap_or(1)), ("--batch", self.batch)] {
            if !(1..=BATCH_MAX).contains(&value) {
                return Err(BadConfiguration::new(format!("{name} is {value}, expected 1 to {BATCH_MAX}")));
            }
        }
        if self.requests == Some(0) {
            return Err(BadConfiguration::new("--requests is 0, expected 1 or more"));
        }
        for (name, time) in [("--duration", self.duration), ("--timeout", Some(self.timeout))] {
            if time == Some(Duration::ZERO) {
                return Err(BadConfiguration::new(format!("{name} is 0s, expected more")));
            }
            if time.is_some_and(|time| time > TIME_MAX) {
                return Err(BadConfiguration::new(format!(
                    "{name} is longer than the {} days that are kept",
                    DAYS_MAX
                )));
            }
        }
        Ok(())
    }

    /// `None` in a closed loop.
    fn schedule(&self, until: Option<Until>) -> Result<Option<Schedule>, BadConfiguration> {
        if let Some(file) = &self.arrivals {
            let shown = file.display();
            let times = arrivals::of_trace(&text_file::read(file)?, until);
            let times = times.map_err(|problem| BadConfiguration::new(format!("--arrivals {shown}: {problem}")))?;
            if times.last().is_some_and(|last| *last > TIME_MAX) {
                return Err(BadConfiguration::new(format!("--arrivals {shown} has times after {DAYS_MAX} days")));
            }
            return Ok(Some(Schedule { times: times.into(), told: json!({"kind": "trace", "file": file}) }));
        }
        let Some(rate) = self.rate.or(self.ramp) else { return Ok(None) };
        let (flag, seed) = (if self.rate.is_some() { "--rate" } else { "--ramp" }, self.arrival_seed);
        let times = arrivals::poisson(rate, seed, until.unwrap_or(DEFAULT));
        let times = times.map_err(|problem| BadConfiguration::new(format!("{flag}: {problem}")))?;
        if times.is_empty() {
            return Err(BadConfiguration::new(format!("{flag} is so low that no request is due before the run ends")));
        }
        let told = json!({"kind": "poisson", "from_per_s": rate.from, "to_per_s": rate.to, "seed": seed});
        Ok(Some(Schedule { times: times.into(), told }))
    }

    /// Enough to touch every text, so that the measurement starts in the steady state.
    fn warming(&self, concurrency: usize, texts: Option<usize>) -> Until {
        match self.warmup {
            Some(Warmup::Requests(requests)) => Until::Requests(requests),
            Some(Warmup::Time(time)) => Until::Elapsed(time),
            None => {
                let calls = 4 * (concurrency * self.batch) as u64;
                Until::Requests(calls.max(texts.unwrap_or(0).min(1024) as u64))
            }
        }
    }

    /// Requests that are due from here on are counted.
    fn counts_from(&self, times: &[Duration]) -> Result<Duration, BadConfiguration> {
        let from = match self.warmup {
            None => Some(Duration::ZERO),
            Some(Warmup::Requests(requests)) => {
                usize::try_from(requests).ok().and_then(|first| times.get(first).copied())
            }
            Some(Warmup::Time(time)) => times.last().is_some_and(|last| time <= *last).then_some(time),
        };
        from.ok_or_else(|| {
            let (requests, last) = (times.len(), times.last().copied().unwrap_or_default());
            let requests = counted(requests, "request");
            BadConfiguration::new(format!("--warmup leaves none of {requests}, the last of them due after {last:.1?}"))
        })
    }

    /// Whether `--slo` limits what only generated tokens have.
    pub(crate) fn limits_tokens(&self) -> bool {
        self.slo.is_some_and(|slo| slo.is_of_tokens())
    }
}

/// How long a round takes if nobody says.
const DEFAULT: Until = Until::Elapsed(Duration::from_secs(5));

/// Longer times than this are a mistake, and clocks could not add them up.
const DAYS_MAX: u64 = 30;
const TIME_MAX: Duration = Duration::from_secs(DAYS_MAX * 24 * 3600);

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        load: LoadArguments,
    }

    fn plan(flags: &str) -> Result<Plan, String> {
        let line = Line::try_parse_from(["bench"].into_iter().chain(flags.split_whitespace()));
        line.map_err(|error| error.to_string())?.load.plan(Some(100)).map_err(|error| error.to_string())
    }

    fn closed(flags: &str) -> (Closed, Closed) {
        let plan = plan(flags).unwrap();
        match (plan.load.pattern, plan.warming.map(|load| load.pattern)) {
            (Pattern::Closed(load), Some(Pattern::Closed(warming))) => (load, warming),
            other => panic!("{flags}: {other:?}"),
        }
    }

    fn open(flags: &str) -> Open {
        match plan(flags).unwrap().load.pattern {
            Pattern::Open(open) => open,
            other => panic!("{flags}: {other:?}"),
        }
    }

    #[test]
    fn without_a_rate_it_is_a_closed_loop() {
        // Broken: the commands in the documents would measure something else than they did.
        let (load, warming) = closed("");
        assert_eq!(load, Closed { concurrency: 1, batch: 1, until: DEFAULT });
        assert_eq!(warming.until, Until::Requests(100));
        let (load, warming) = closed("--concurrency 8 --batch 4 --requests 50");
        assert_eq!(load, Closed { concurrency: 8, batch: 4, until: Until::Requests(50) });
        assert_eq!(warming, Closed { until: Until::Requests(128), ..load });
        assert_eq!(closed("--warmup 3").1.until, Until::Requests(3));
        assert_eq!(closed("--warmup 3s").1.until, Until::Elapsed(Duration::from_secs(3)));
    }

    #[test]
    fn a_rate_is_an_open_loop() {
        // Broken: a rate would be waited for by clients, or the warm-up be counted.
        let steady = open("--rate 100 --requests 50");
        assert_eq!((steady.times.len(), steady.counts_from), (50, Duration::ZERO));
        assert_eq!(open("--rate 100 --requests 50 --warmup 10").counts_from, steady.times[10]);
        assert_eq!(open("--rate 100 --duration 2s --warmup 500ms").counts_from, Duration::from_millis(500));
        assert_ne!(open("--rate 100 --requests 50 --arrival-seed 1").times, steady.times);
        assert!(open("--ramp 0..100 --duration 2s").times.len() > 50);
        let told = plan("--ramp 1..50 --duration 2s --slo e2e=1s").unwrap();
        assert_eq!(told.parameters["arrivals"]["to_per_s"], 50.0);
        assert_eq!((told.parameters["slo"]["e2e_ms"].clone(), told.concurrency), (json!(1000.0), 16));
    }

    #[test]
    fn a_trace_is_an_open_loop() {
        // Broken: the trace would be cut after five seconds, or sent without what it says.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("arrivals.txt");
        fs::write(&file, "0\n0.5\n30\n").unwrap();
        let flags = |more: &str| format!("--arrivals {} {more}", file.display());
        assert_eq!(open(&flags("")).times.len(), 3);
        assert_eq!(open(&flags("--requests 1")).times.len(), 1);
        assert_eq!(open(&flags("--duration 1s")).times.len(), 2);
        fs::write(&file, "never\n").unwrap();
        let error = plan(&flags("")).unwrap_err();
        assert!(error.contains("arrivals.txt") && error.contains("line 1 is \"never\""), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        // Broken: a wrong flag would be found out after the run, or never.
        for (flags, named) in [
            ("--rate 0", "sends nothing"),
            ("--rate nan", "\"nan\" is no rate"),
            ("--rate=-1", "\"-1\" is no rate"),
            ("--rate inf", "no rate"),
            ("--ramp 5", "no ramp"),
            ("--ramp 0..0", "sends nothing"),
            ("--ramp 1..5 --requests 5", "--requests"),
            ("--rate 1 --ramp 1..2", "--ramp"),
            ("--rate 1 --arrivals x", "--arrivals"),
            ("--rate 1 --batch 2", "--batch"),
            ("--rate 0.001 --duration 1s", "--rate is so low"),
            ("--rate 1000000 --duration 1h", "--rate: these are more than"),
            ("--arrivals no/such/file", "no/such/file"),
            ("--rate 10 --requests 5 --warmup 5", "--warmup leaves none of 5"),
            ("--rate 10 --duration 1s --warmup 2s", "--warmup leaves none"),
            ("--warmup soon", "soon"),
            ("--requests 0", "--requests is 0"),
            ("--duration 0s", "--duration is 0s"),
            ("--timeout 0s", "--timeout is 0s"),
            ("--duration 5000years", "--duration is longer"),
            ("--concurrency 0", "--concurrency is 0"),
            ("--batch 5000", "--batch is 5000"),
            ("--slo fast=1s", "\"fast\" is not measured"),
        ] {
            let error = plan(flags).unwrap_err();
            assert!(error.contains(named), "{flags}: {error}");
        }
    }
}
