//! When requests of an open loop are due. Pure: the same settings and the same seed give the same times. Read by
//! [`super::plan`], kept by [`super::load`].

use std::{str::FromStr, time::Duration};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1};

use super::load::Until;

/// More requests than this in one run are a mistake: their times alone would take 80 MiB.
pub(crate) const ARRIVALS_MAX: usize = 5_000_000;

/// More requests a second than one process sends.
const RATE_MAX: f64 = 1e6;

/// Requests a second on average, going evenly from one to the other over the run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    pub(crate) from: f64,
    pub(crate) to: f64,
}

impl Rate {
    /// The same all the time: more than 0.
    pub(crate) fn steady(text: &str) -> Result<Self, String> {
        let rate = per_second(text)?;
        if rate == 0.0 {
            return Err(format!("a rate of {text} sends nothing, expected more than 0"));
        }
        Ok(Self { from: rate, to: rate })
    }

    fn most(&self) -> f64 {
        self.from.max(self.to)
    }

    /// When `expected` requests should have been sent, in seconds, if the rate gets from `from` to `to` in `span_s`: where the
    /// integral of the rate is `expected`. `None`: never.
    fn time_s(&self, expected: f64, span_s: f64) -> Option<f64> {
        let slope = if self.from == self.to { 0.0 } else { (self.to - self.from) / span_s };
        let root = (self.from * self.from + 2.0 * slope * expected).sqrt();
        // In this form nothing is lost where the slope is small, and nothing divided by zero where it is none.
        let time = 2.0 * expected / (self.from + root);
        time.is_finite().then_some(time)
    }
}

/// `A..B`.
impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text.split_once("..").ok_or_else(|| format!("{text:?} is no ramp, expected A..B as 1..50"))?;
        let rate = Self { from: per_second(from)?, to: per_second(to)? };
        if rate.most() == 0.0 {
            return Err(format!("a ramp of {text} sends nothing, expected more than 0 at one end"));
        }
        Ok(rate)
    }
}

fn per_second(text: &str) -> Result<f64, String> {
    let rate = text.trim().parse::<f64>().ok().filter(|rate| (0.0..=RATE_MAX).contains(rate));
    rate.ok_or_else(|| format!("{text:?} is no rate, expected requests a second up to {RATE_MAX}"))
}

/// The times of a Poisson process: what many callers who know nothing of each other make together. Until a number of requests,
/// or before a time.
pub(crate) fn poisson(rate: Rate, seed: u64, until: Until) -> Result<Vec<Duration>, String> {
    let (most, span) = match until {
        Until::Requests(requests) => (usize::try_from(requests).unwrap_or(usize::MAX), Duration::MAX),
        Until::Elapsed(span) => (usize::MAX, span),
    };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut times = Vec::new();
    let mut expected = 0.0;
    while times.len() < most {
        // A steady process whose rate is 1, whose times are then read on the clock of the rate that is wanted.
        let gap: f64 = Exp1.sample(&mut random);
        expected += gap;
        let time = rate.time_s(expected, span.as_secs_f64()).and_then(|time| Duration::try_from_secs_f64(time).ok());
        match time.filter(|time| *time < span) {
            None => break,
            Some(_) if times.len() == ARRIVALS_MAX => return Err(too_many()),
            Some(time) => times.push(time),
        }
    }
    Ok(times)
}

fn too_many() -> String {
    format!("these are more than {ARRIVALS_MAX} requests in one run")
}

/// The times of a trace: seconds since its start, a number a line, in order; blank lines and those that begin with `#` are left
/// out. Cut where `until` ends.
pub(crate) fn of_trace(content: &str, until: Option<Until>) -> Result<Vec<Duration>, String> {
    let mut times: Vec<Duration> = Vec::new();
    for (line, text) in content.lines().enumerate() {
        let (line, text) = (line + 1, text.trim());
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let time = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let time = time.ok_or_else(|| format!("line {line} is {text:?}, expected seconds since the start, as 1.25"))?;
        if times.last().is_some_and(|last| time < *last) {
            return Err(format!("line {line} is {text}, earlier than the time before it: times must be in order"));
        }
        match until {
            Some(Until::Requests(requests)) if times.len() as u64 >= requests => break,
            Some(Until::Elapsed(span)) if time >= span => break,
            _ if times.len() == ARRIVALS_MAX => return Err(too_many()),
            _ => times.push(time),
        }
    }
    if times.is_empty() { Err("no time is in it that would be reached".to_owned()) } else { Ok(times) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn times(from: f64, to: f64, seed: u64, until: Until) -> Vec<f64> {
        poisson(Rate { from, to }, seed, until).unwrap().iter().map(Duration::as_secs_f64).collect()
    }

    #[test]
    fn a_seed_gives_the_same_times_again() {
        // Broken: two servers could not be compared under the same load, or every run would be the same one.
        let until = Until::Elapsed(Duration::from_secs(60));
        assert_eq!(times(5.0, 9.0, 7, until), times(5.0, 9.0, 7, until));
        assert_ne!(times(5.0, 9.0, 7, until), times(5.0, 9.0, 8, until));
        // The times themselves, so that a new version of a crate does not change what a seed means without a word.
        let begin: Vec<u128> = poisson(Rate { from: 1.0, to: 1.0 }, 0, Until::Requests(3))
            .unwrap()
            .iter()
            .map(Duration::as_millis)
            .collect();
        assert_eq!(begin, [1372, 2721, 3086]);
    }

    #[test]
    fn a_steady_rate_is_a_poisson_process() {
        // Broken: the rate would not be the one that was asked for, or requests come evenly or in heaps, and queues be shorter or
        // longer than those that independent callers make.
        for (seed, rate) in [(1, 0.5), (2, 10.0), (3, 30.0)] {
            let times = times(rate, rate, seed, Until::Elapsed(HOUR));
            let expected = rate * 3600.0;
            assert!((times.len() as f64 - expected).abs() < 4.0 * expected.sqrt(), "{} {expected}", times.len());
            assert!(
                times.windows(2).all(|pair| pair[0] <= pair[1])
                    && times.iter().all(|time| (0.0..3600.0).contains(time))
            );
            // The gaps of a Poisson process vary as much as they are long.
            let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
            assert!((deviation / mean - 1.0).abs() < 0.15, "{deviation} {mean}");
        }
        let counted = times(1000.0, 1000.0, 4, Until::Requests(50));
        assert!(counted.len() == 50 && counted[49] < 1.0, "{counted:?}");
    }

    #[test]
    fn a_ramp_goes_evenly_from_one_rate_to_the_other() {
        // Broken: the server would see another ramp than the report says.
        for (from, to) in [(0.0, 20.0), (20.0, 0.0), (5.0, 15.0), (10.0, 10.0), (10.0, 10.000001)] {
            let times = times(from, to, 5, Until::Elapsed(HOUR));
            for part in 0..4 {
                let (begin, end) = (f64::from(part) * 900.0, f64::from(part + 1) * 900.0);
                let at = |time: f64| from + (to - from) * time / 3600.0;
                let expected = (at(begin) + at(end)) / 2.0 * 900.0;
                let found = times.iter().filter(|time| (begin..end).contains(*time)).count() as f64;
                assert!(
                    (found - expected).abs() < 4.0 * expected.sqrt() + 1.0,
                    "{from}..{to} {part}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn rates_parse() {
        // Broken: a rate that is none would send nothing for ever, or everything at once.
        assert_eq!(Rate::steady("2.5"), Ok(Rate { from: 2.5, to: 2.5 }));
        assert_eq!("1..50".parse(), Ok(Rate { from: 1.0, to: 50.0 }));
        assert_eq!("0.5..0".parse(), Ok(Rate { from: 0.5, to: 0.0 }));
        for wrong in ["", "0", "-1", "nan", "NaN", "inf", "1e7", "1..2", "fast"] {
            assert!(Rate::steady(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "1", "..", "1..", "..2", "0..0", "nan..1", "1..nan", "1..inf", "-1..2", "1..2..3"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn absurd_runs_end() {
        // Broken: the command would take all memory before it sent anything.
        let fast = Rate { from: 1e6, to: 1e6 };
        assert!(poisson(fast, 0, Until::Elapsed(HOUR)).unwrap_err().contains("5000000"));
        let ending = Rate { from: 1.0, to: 0.0 };
        let times = poisson(ending, 0, Until::Elapsed(Duration::from_secs(10))).unwrap();
        assert!(times.len() < 30);
    }

    #[test]
    fn traces_parse() {
        // Broken: a trace would be sent at other times than it says, or a typo in it be taken for zero.
        let trace = "# from production\n0\n0.25\n\n 0.25 \n1e1\n";
        let ms = |times: Vec<Duration>| times.iter().map(Duration::as_millis).collect::<Vec<_>>();
        assert_eq!(ms(of_trace(trace, None).unwrap()), [0, 250, 250, 10_000]);
        assert_eq!(ms(of_trace(trace, Some(Until::Requests(2))).unwrap()), [0, 250]);
        assert_eq!(ms(of_trace(trace, Some(Until::Elapsed(Duration::from_secs(10)))).unwrap()), [0, 250, 250]);
        for (wrong, named) in [
            ("", "no time"),
            ("# nothing\n", "no time"),
            ("0\nx\n", "line 2 is \"x\""),
            ("nan", "line 1"),
            ("inf", "line 1"),
            ("-1", "line 1"),
            ("1e300", "line 1"),
            ("2\n1\n", "line 2"),
            ("1, 2", "line 1"),
        ] {
            let error = of_trace(wrong, None).unwrap_err();
            assert!(error.contains(named), "{wrong:?}: {error}");
        }
        assert!(of_trace("5\n", Some(Until::Elapsed(Duration::from_secs(5)))).is_err());
    }
}
