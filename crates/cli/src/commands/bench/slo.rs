//! What a request must keep to be worth something: `--slo ttft=200ms,tpot=50ms,e2e=2s`. Parsed by `bench`, asked by
//! [`super::samples`] for each answer.

use std::{fmt, str::FromStr, time::Duration};

use serde_json::{Value, json};

use crate::time_span;

/// Limits of one request; none of them: everything is good.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Slo {
    /// Until its first token.
    pub(crate) ttft: Option<Duration>,
    /// Per token after the first.
    pub(crate) tpot: Option<Duration>,
    /// Until its end.
    pub(crate) e2e: Option<Duration>,
}

const EXPECTED: &str = "expected one or more of ttft=TIME, tpot=TIME and e2e=TIME, as ttft=200ms,e2e=2s";

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut slo = Self::default();
        for part in text.split(',') {
            let (name, time) = part.split_once('=').ok_or_else(|| format!("{part:?} is no limit, {EXPECTED}"))?;
            let limit = match name.trim() {
                "ttft" => &mut slo.ttft,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                other => return Err(format!("{other:?} is not measured, {EXPECTED}")),
            };
            let time = time_span::parse(time.trim())?;
            if time.is_zero() {
                return Err(format!("{} is 0s, which nothing can keep", name.trim()));
            }
            if limit.replace(time).is_some() {
                return Err(format!("{} is given twice", name.trim()));
            }
        }
        Ok(slo)
    }
}

impl Slo {
    /// Whether a request kept every limit. One without a second token has no time per token to exceed, but one without a first
    /// token never showed any.
    pub(crate) fn is_met(&self, ttft: Option<Duration>, tpot: Option<Duration>, e2e: Duration) -> bool {
        self.ttft.is_none_or(|limit| ttft.is_some_and(|ttft| ttft <= limit))
            && self.tpot.is_none_or(|limit| tpot.is_none_or(|tpot| tpot <= limit))
            && self.e2e.is_none_or(|limit| e2e <= limit)
    }

    /// Whether it limits what only generated tokens have.
    pub(crate) fn is_of_tokens(&self) -> bool {
        self.ttft.is_some() || self.tpot.is_some()
    }

    fn limits(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let limits = [("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e)];
        limits.into_iter().filter_map(|(name, limit)| Some((name, limit?)))
    }

    /// As `--json` tells it.
    pub(crate) fn as_json(&self) -> Value {
        self.limits().map(|(name, limit)| (format!("{name}_ms"), json!(limit.as_secs_f64() * 1e3))).collect()
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits: Vec<String> = self.limits().map(|(name, limit)| format!("{name} {limit:?}")).collect();
        f.write_str(&limits.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn limits_parse() {
        // Broken: a limit would be left out, or be a thousand times too long, and every request be called good.
        let slo = Slo { ttft: Some(ms(200)), tpot: Some(ms(50)), e2e: Some(ms(2000)) };
        assert_eq!("ttft=200ms,tpot=50ms,e2e=2s".parse(), Ok(slo));
        assert_eq!("e2e = 1.5s".parse(), Ok(Slo { e2e: Some(ms(1500)), ..Slo::default() }));
        assert_eq!(slo.to_string(), "ttft 200ms, tpot 50ms, e2e 2s");
        assert_eq!(slo.as_json(), json!({"ttft_ms": 200.0, "tpot_ms": 50.0, "e2e_ms": 2000.0}));
        for (wrong, named) in [
            ("", "no limit"),
            ("ttft", "no limit"),
            ("latency=1s", "\"latency\""),
            ("ttft=soon", "soon"),
            ("ttft=0s", "0s"),
            ("ttft=-1s", "-1s"),
            ("ttft=nan", "nan"),
            ("e2e=1s,e2e=2s", "twice"),
            ("e2e=1s,", "no limit"),
        ] {
            let error = wrong.parse::<Slo>().unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_request_is_good_when_it_keeps_every_limit() {
        // Broken: goodput would count requests that were late, or leave out those that were not.
        let slo = Slo { ttft: Some(ms(200)), tpot: Some(ms(50)), e2e: Some(ms(2000)) };
        assert!(slo.is_met(Some(ms(200)), Some(ms(50)), ms(2000)));
        assert!(slo.is_met(Some(ms(1)), None, ms(1)));
        assert!(!slo.is_met(Some(ms(201)), Some(ms(50)), ms(2000)));
        assert!(!slo.is_met(Some(ms(200)), Some(ms(51)), ms(2000)));
        assert!(!slo.is_met(Some(ms(200)), Some(ms(50)), ms(2001)));
        assert!(!slo.is_met(None, None, ms(1)));
        assert!(Slo::default().is_met(None, None, Duration::MAX));
    }
}
