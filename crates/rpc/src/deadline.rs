//! The caller's deadline. gRPC sends it as a timeout in the header `grpc-timeout`; this layer turns it into a
//! point in time that handlers can read ([`Deadline`]) and ends the call with DEADLINE_EXCEEDED when it comes,
//! streams included. Put in place by [`crate::server`].
//!
//! tonic's own server would know only the time up to the response's headers, and report CANCELLED.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request};
use tokio::time::{Instant, Sleep};
use tonic::{Status, body::Body};

use crate::{
    around::Within,
    ending::{Ending, ResponseFuture, ends_by},
    status::{Fault, Reason},
};

const HEADER: &str = "grpc-timeout";

/// Until when the caller waits: an extension of the request. Absent when the caller set none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// The deadline of a request that came through the server stack.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().copied()
    }

    /// Time left; zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Ends calls at their deadline.
pub(crate) fn ended_in_time<S: Within>(inner: &mut S, mut request: Request<Body>) -> ResponseFuture<S::Error> {
    let timeout = match timeout(request.headers()) {
        Ok(Some(timeout)) => timeout,
        Ok(None) => return Box::pin(inner.call(request)),
        Err(fault) => return Box::pin(std::future::ready(Ok(Status::from(fault).into_http()))),
    };
    let at = Instant::now() + timeout;
    request.extensions_mut().insert(Deadline(at));
    let ending = Expiry { at, timeout, sleep: Box::pin(tokio::time::sleep_until(at)) };
    ends_by(inner.call(request), Box::pin(ending) as Ending)
}

/// Completes when the deadline has come.
struct Expiry {
    at: Instant,
    timeout: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl Future for Expiry {
    type Output = Status;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Status> {
        // The clock is asked too: tonic's timer may wake the call before ours has fired.
        if self.sleep.as_mut().poll(cx).is_pending() && Instant::now() < self.at {
            return Poll::Pending;
        }
        let message = format!("the caller's {:?} are over", self.timeout);
        Poll::Ready(Fault::new(Reason::DeadlineExceeded, message).into())
    }
}

/// The header's value: at most 8 digits and a unit (gRPC over HTTP/2, Requests, `Timeout`). A malformed one is
/// refused: a caller who set a deadline must not wait without one.
pub(crate) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Fault> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(parse);
    let malformed = || Fault::new(Reason::MalformedDeadline, format!("{HEADER} is {value:?}"));
    parsed.map(Some).ok_or_else(malformed)
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_defines_them() {
        // Broken: a caller's deadline would be a thousand times too long or too short.
        let cases = [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("4m", Some(Duration::from_millis(4))),
            ("5u", Some(Duration::from_micros(5))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("0m", Some(Duration::ZERO)),
            ("100000000n", None),
            ("+5m", None),
            ("-5m", None),
            ("5", None),
            ("m", None),
            ("5s", None),
            ("", None),
            ("5é", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_longest_timeout_is_a_time() {
        // Broken: adding it to the clock would panic on a caller's word.
        let _ = Instant::now() + parse("99999999H").unwrap();
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "\\PC{0,12}") {
            // Broken: a malformed header would end the connection of every other call on it.
            let _ = parse(&text);
        }
    }
}
