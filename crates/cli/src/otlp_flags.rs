//! Where traces go and how many, as flags say it. Parses `--otlp-endpoint` and `--otlp-sampling`.

use http::Uri;

/// The address of a collector. Traces go without TLS: a collector is beside who sends to it, and sends on.
pub(crate) fn endpoint(text: &str) -> Result<String, String> {
    const EXPECTED: &str = "expected http://HOST:PORT";
    let uri: Option<Uri> = text.parse().ok();
    let parts = uri.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.host()?)));
    match parts {
        Some(("http", host)) if !host.is_empty() => Ok(text.to_owned()),
        Some(("https", _)) => Err(format!("https is not supported, {EXPECTED}")),
        _ => Err(format!("this is no URL of a collector, {EXPECTED}")),
    }
}

/// A part of all traces.
pub(crate) fn sampling(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected 0 to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_sent_to_is_refused() {
        // Would break: a process starts whose traces arrive nowhere, or its error speaks of how it was built.
        for fine in ["http://127.0.0.1:4317", "http://collector:4317/", "http://[::1]:4317"] {
            assert_eq!(endpoint(fine).as_deref(), Ok(fine));
        }
        assert!(endpoint("https://collector.example:4317").is_err_and(|told| told.starts_with("https is not")));
        for wrong in ["", "foo", "collector:4317", "http://", "grpc://collector:4317", "http://a b:4317"] {
            assert!(endpoint(wrong).is_err_and(|told| told.starts_with("this is no URL")), "{wrong}");
        }
    }

    #[test]
    fn a_part_of_traces_is_at_most_all() {
        // Would break: a percentage is taken for a part, and every request is traced.
        assert_eq!((sampling("0"), sampling("0.5"), sampling("1")), (Ok(0.0), Ok(0.5), Ok(1.0)));
        for wrong in ["2", "-1", "1.01", "NaN", "inf", "10%", ""] {
            assert!(sampling(wrong).is_err(), "{wrong}");
        }
    }
}
