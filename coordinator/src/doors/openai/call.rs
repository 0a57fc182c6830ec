//! What every request of this door gets: a deadline of its caller's, an end when the node ends, and a count by how it ended
//! under the names that gRPC's requests are counted by. Put around the routes by [`crate::doors::openai::routes`].

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::HeaderMap,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body::{Frame, SizeHint};
use sida_rpc::{Client, KeyTakenAway, RequestId};
use sida_telemetry::TraceContext;
use tonic::Code;

use crate::{
    answer::request_error::RequestError,
    doors::{
        openai::{door::Door, error::ApiError, rate_limits},
        request_count,
    },
};

/// How long the caller waits, in seconds.
const TIMEOUT: &str = "x-request-timeout";
/// What paths are called that are no requests to the model.
const NOT_COUNTED: &str = "others";
/// A day: nobody waits for longer.
const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

/// A request, as its endpoint knows it.
#[derive(Clone)]
pub(crate) struct Call {
    /// Until when the answer is of use.
    pub(crate) deadline: Option<Instant>,
    pub(crate) trace: Option<TraceContext>,
    /// Whose it is, once that is known.
    client: Arc<OnceLock<Client>>,
    /// Tells when its key lets in no more, if it came by one.
    key_taken_away: Arc<OnceLock<KeyTakenAway>>,
    /// Its id, which the answer's is made of.
    pub(crate) id: Arc<str>,
    path: &'static str,
    end: Arc<OnceLock<Code>>,
}

impl Call {
    /// Whose it is, as far as that is known.
    pub(crate) fn client(&self) -> Option<Client> {
        self.client.get().cloned()
    }

    /// Completes when its key lets in no more, with what it is told then; never of a call without one.
    pub(crate) async fn loses_its_key(&self) -> ApiError {
        match self.key_taken_away.get() {
            Some(event) => {
                event.happens().await;
                ApiError::of_fault(&event.fault())
            }
            None => std::future::pending().await,
        }
    }

    /// The refusal that an `error` of the coordinator is told as. One that is a fault of ours is logged: its caller can do
    /// nothing about it.
    pub(crate) fn refused(&self, error: &RequestError, text_field: &str) -> ApiError {
        let refusal = ApiError::of_request(error, text_field);
        if refusal.counted_as == Code::Internal {
            let trace_id = self.trace.map(|trace| tracing::field::display(trace.trace_id()));
            let (path, request_id) = (self.path, &*self.id);
            tracing::error!(path, request_id, trace_id, %error, "a request failed by a fault of ours");
        }
        refusal
    }

    /// The answer broke off by an error, although its head said that all is well.
    pub(crate) fn broke_off(&self, error: &ApiError) {
        // Nobody else writes it before the answer ends.
        let _ = self.end.set(error.counted_as);
    }
}

/// Answers `request` by what is further in.
pub(crate) async fn answer(State(door): State<Arc<Door>>, mut request: Request, next: Next) -> Response {
    let method = request_count::http_method(request.method(), request.uri().path());
    let (end, client) = (Arc::default(), Arc::default());
    let open = OpenCall { method, since: Instant::now(), end, client, is_over: false };
    let deadline = match deadline(request.headers()) {
        Ok(deadline) => deadline,
        Err(refusal) => return counted(refusal.into_response(), open),
    };
    let extensions = request.extensions_mut();
    let id = extensions.get().map(|id: &RequestId| id.as_str().into()).unwrap_or_default();
    let (trace, path) = (extensions.get().copied(), method.unwrap_or(NOT_COUNTED));
    let (end, client) = (open.end.clone(), open.client.clone());
    extensions.insert(Call { deadline, trace, client, key_taken_away: Arc::default(), id, path, end });
    let response = tokio::select! {
        response = next.run(request) => response,
        () = door.late.cancelled() => door.ending().into_response(),
    };
    counted(response, open)
}

/// Notes whose `request` it is: behind what lets it in, which is within what counts it. Its answer tells what the client
/// may still have.
pub(crate) async fn introduced(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
    next: Next,
) -> Response {
    // A call has one client and one key, and comes by here once.
    if let Some(client) = request.extensions().get::<Client>() {
        let _ = call.client.set(client.clone());
    }
    if let Some(event) = request.extensions().get::<KeyTakenAway>() {
        let _ = call.key_taken_away.set(event.clone());
    }
    let mut response = tokio::select! {
        response = next.run(request) => response,
        refusal = call.loses_its_key() => refusal.into_response(),
    };
    if let Some(client) = call.client.get().filter(|_| call.path != NOT_COUNTED) {
        rate_limits::tell(door.coordinator.inner.client_uses.standing(client), response.headers_mut());
    }
    response
}

/// When the caller stops to wait, if it says.
fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, ApiError> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let expected = format!("a number of seconds above 0, at most {}", TIMEOUT_MAX.as_secs());
    let seconds = value.to_str().ok().and_then(|text| text.parse::<f64>().ok());
    match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(timeout) if !timeout.is_zero() && timeout <= TIMEOUT_MAX => Ok(Some(Instant::now() + timeout)),
        _ => Err(ApiError::field(TIMEOUT, String::from_utf8_lossy(value.as_bytes()), expected)),
    }
}

/// `response`, with whose last byte the call ends.
fn counted(response: Response, mut open: OpenCall) -> Response {
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        let counted_as = response.extensions().get().copied().unwrap_or(Code::InvalidArgument);
        let _ = open.end.set(counted_as);
    }
    open.is_over = response.body().is_end_stream();
    response.map(|inner| Body::new(OpenBody { inner, open }))
}

/// A call until it ends; it is counted when this is dropped.
struct OpenCall {
    /// `None`: not counted.
    method: Option<&'static str>,
    since: Instant,
    /// How it ended, where that was not well.
    end: Arc<OnceLock<Code>>,
    client: Arc<OnceLock<Client>>,
    /// Whether its last byte was taken.
    is_over: bool,
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let Some(method) = self.method else { return };
        let code = match self.end.get() {
            Some(code) => *code,
            None if self.is_over => Code::Ok,
            None => Code::Cancelled,
        };
        request_count::count_http(method, code, self.since.elapsed(), self.client.get());
    }
}

/// The body of an answer, until whose end the call is open.
struct OpenBody {
    inner: Body,
    open: OpenCall,
}

impl HttpBody for OpenBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        self.open.is_over |= matches!(frame, Poll::Ready(None)) || self.inner.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_timeout_is_a_number_of_seconds() {
        // Would break: a caller's deadline is a thousand times too long, or a typo makes it wait for ever.
        let of = |text: &'static str| {
            let headers = HeaderMap::from_iter([(TIMEOUT.parse().unwrap(), HeaderValue::from_static(text))]);
            deadline(&headers)
        };
        let before = Instant::now();
        let soon = of("0.5").unwrap().unwrap() - before;
        assert!(soon >= Duration::from_millis(500) && soon < Duration::from_secs(5), "{soon:?}");
        assert!(of("86400").is_ok() && deadline(&HeaderMap::new()).unwrap().is_none());
        for wrong in ["0", "-1", "nan", "inf", "1e300", "5s", "", "86401"] {
            assert_eq!(of(wrong).unwrap_err().json()["error"]["param"], TIMEOUT, "{wrong}");
        }
    }
}
