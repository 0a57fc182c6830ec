//! The trace of a call: `traceparent` as the caller gave it, or a new one. It becomes an extension of the request for
//! handlers to go on from, and a span from the call's arrival to the last byte of its answer. Put in place by
//! [`crate::server`].

use std::borrow::Cow;

use http::Request;
use sida_telemetry::{Span, TraceContext, trace_context::TRACEPARENT};
use tonic::{Code, body::Body, metadata::MetadataMap};

use crate::{
    around::Within,
    ending::ResponseFuture,
    watched_response::{Watcher, watched},
};

/// Calls that carry other calls, which have traces of their own, or that nobody waits for.
const UNTRACED: [&str; 2] = ["/grpc.", "/sida.v1.Experts/Lane"];

/// The trace of a request that came through the server stack.
pub fn context_of<T>(request: &tonic::Request<T>) -> Option<TraceContext> {
    request.extensions().get().copied()
}

/// Tells the server of a call which trace it is part of.
pub fn pass_on(context: TraceContext, metadata: &mut MetadataMap) {
    let text = context.to_string().parse().expect("a traceparent is visible ASCII");
    metadata.insert(TRACEPARENT, text);
}

/// Traces calls.
pub(crate) fn traced<S: Within>(inner: &mut S, mut request: Request<Body>) -> ResponseFuture<S::Error> {
    let path = request.uri().path();
    if UNTRACED.iter().any(|untraced| path.starts_with(untraced)) {
        return Box::pin(inner.call(request));
    }
    let header = request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok());
    let caller = header.and_then(TraceContext::from_traceparent);
    // OpenTelemetry's names for RPCs; the span's is `package.Service/Method`.
    let name = || Cow::Owned(path.trim_start_matches('/').to_owned());
    let mut span = Span::of_caller(caller, name).as_server().with("rpc.system", "grpc");
    if span.is_recorded()
        && let Some((service, method)) = path.trim_start_matches('/').split_once('/')
    {
        span.set("rpc.service", service.to_owned());
        span.set("rpc.method", method.to_owned());
    }
    request.extensions_mut().insert(span.context());
    let response = inner.call(request);
    if !span.is_recorded() {
        return Box::pin(response);
    }
    Box::pin(async move { Ok(watched(response.await?, span)) })
}

/// The span ends with the response.
impl Watcher for Span {
    fn ended_with(&mut self, code: Code) {
        self.set("rpc.grpc.status_code", i64::from(code as i32));
        if code != Code::Ok {
            self.fail(&code);
        }
    }
}
