//! The trace of an HTTP request that is not a gRPC call, as [`crate::trace`] has it of calls: `traceparent` as the caller gave
//! it, or a new one; an extension of the request for handlers to go on from; a span to the last byte of the answer. Put in
//! place by [`crate::http_server`].

use std::borrow::Cow;

use http::Request;
use sida_telemetry::{Span, TraceContext, trace_context::TRACEPARENT};
use tonic::body::Body;

use crate::{around::Within, ending::ResponseFuture, watched_response::watched};

/// Traces requests.
pub(crate) fn traced<S: Within>(inner: &mut S, mut request: Request<Body>) -> ResponseFuture<S::Error> {
    let header = request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok());
    let caller = header.and_then(TraceContext::from_traceparent);
    // OpenTelemetry's names for HTTP.
    let name = || Cow::Owned(format!("{} {}", request.method(), request.uri().path()));
    let mut span = Span::of_caller(caller, name).as_server();
    if span.is_recorded() {
        span.set("http.request.method", request.method().to_string());
        span.set("url.path", request.uri().path().to_owned());
    }
    request.extensions_mut().insert(span.context());
    let response = inner.call(request);
    if !span.is_recorded() {
        return Box::pin(response);
    }
    Box::pin(async move {
        let response = response.await?;
        span.set("http.response.status_code", i64::from(response.status().as_u16()));
        if response.status().is_server_error() {
            span.fail(&response.status());
        }
        Ok(watched(response, span))
    })
}
