//! The id of a request: `x-request-id` as the caller gave it, or a new one. It is echoed in the response, put
//! on every log line of the call, and passed on by handlers. Put in place by [`crate::server`].

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue, Request};
use sida_telemetry::TraceContext;
use tonic::body::Body;
use tracing::Instrument;
use uuid::Uuid;

use crate::{around::Within, ending::ResponseFuture};

const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The longest name taken from a caller; a longer one is replaced, since it goes into every log line.
const BYTES_MAX: usize = 128;

/// The name of a request: an extension of every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The name of a request that came through the server stack.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().cloned()
    }

    /// The name as text: visible ASCII.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The caller's name if it is fit for a log line, else a new one, with the header that echoes it.
    fn taken_or_made(header: Option<&HeaderValue>) -> (Self, HeaderValue) {
        let fit = |value: &&HeaderValue| {
            (1..=BYTES_MAX).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
        };
        if let Some((value, text)) = header.filter(fit).and_then(|value| Some((value, value.to_str().ok()?))) {
            return (Self(text.into()), value.clone());
        }
        let mut buffer = Uuid::encode_buffer();
        let made: &str = Uuid::new_v4().hyphenated().encode_lower(&mut buffer);
        let header = HeaderValue::from_str(made).expect("a UUID is visible ASCII");
        (Self(made.into()), header)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names requests.
pub(crate) fn named<S: Within>(inner: &mut S, mut request: Request<Body>) -> ResponseFuture<S::Error> {
    let (id, echo) = RequestId::taken_or_made(request.headers().get(HEADER));
    let trace = request.extensions().get::<TraceContext>().map(|context| tracing::field::display(context.trace_id()));
    let (method, request_id) = (request.uri().path(), id.as_str());
    let client = tracing::field::Empty;
    let span = tracing::info_span!("call", method, request_id, trace_id = trace, client);
    request.extensions_mut().insert(id);
    let response = span.in_scope(|| inner.call(request)).instrument(span);
    Box::pin(async move {
        let mut response = response.await?;
        response.headers_mut().insert(HEADER, echo);
        Ok(response)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fit_names_are_taken() {
        // Broken: a caller could write line breaks or megabytes into our logs, or go without a name.
        let taken = |bytes: &[u8]| RequestId::taken_or_made(Some(&HeaderValue::from_bytes(bytes).unwrap()));
        let (id, echo) = taken(b"req-42/a");
        assert_eq!((id.as_str(), id.to_string().as_str(), echo.as_bytes()), ("req-42/a", "req-42/a", &b"req-42/a"[..]));
        assert_eq!(taken(&[b'x'; BYTES_MAX]).0.as_str(), "x".repeat(BYTES_MAX));
        for unfit in [&b""[..], b"a b", "caf\u{e9}".as_bytes(), &[b'x'; 129]] {
            let (id, echo) = taken(unfit);
            assert_eq!(Uuid::parse_str(id.as_str()).unwrap().to_string().as_bytes(), echo.as_bytes());
        }
        assert_ne!(RequestId::taken_or_made(None).0, RequestId::taken_or_made(None).0);
    }
}
