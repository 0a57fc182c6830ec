//! Spans of time on the command line: `500ms`, `1m 30s`, `2.5s`, and `3` for seconds. Parses every flag that
//! takes one.

use std::time::Duration;

/// The span that `text` means.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    if let Ok(span) = humantime::parse_duration(text) {
        return Ok(span);
    }
    // humantime knows no fractions.
    let (number, unit_s) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.trim().parse::<f64>().ok().map(|number| number * unit_s);
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no span of time such as 500ms, 2.5s or 1m 30s"))
}

/// The same, of how long something may take: nothing takes no time.
pub(crate) fn parse_some(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        Duration::ZERO => Err("nothing can be done in no time".to_owned()),
        span => Ok(span),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        // Broken: a deadline would be a thousand times too long, or a span that is none would be taken for zero.
        assert_eq!(parse("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("2.5s"), Ok(Duration::from_millis(2500)));
        assert_eq!(parse("3"), Ok(Duration::from_secs(3)));
        assert_eq!(parse("0.5ms"), Ok(Duration::from_micros(500)));
        assert!(parse_some("0s").is_err() && parse_some("1ms").is_ok());
        for wrong in ["", "s", "-1s", "nan", "inf", "1e300s", "soon"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
