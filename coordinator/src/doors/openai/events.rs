//! An answer as it comes: server-sent events, `data: {...}` each, and `data: [DONE]` at the end. An error ends them in its
//! place, since the head has gone out already.

use std::{convert::Infallible, time::Duration};

use axum::{
    http::HeaderValue,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt, stream};
use serde_json::Value;

use crate::doors::openai::{call::Call, door::Door, error::ApiError};

/// What says that the answer is whole.
const DONE: &str = "[DONE]";
/// How often a silent stream says that it lives: proxies close those that do not.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// `chunks` as events, until the node waits no longer for them.
pub(crate) fn events(
    chunks: impl Stream<Item = Result<Value, ApiError>> + Send + 'static,
    door: &Door,
    call: Call,
) -> Response {
    let (late, ending) = (door.late.clone(), door.ending());
    let events = stream::unfold(Some(chunks.boxed()), move |chunks| {
        let (late, ending, call) = (late.clone(), ending.clone(), call.clone());
        async move {
            let mut chunks = chunks?;
            let next = tokio::select! {
                biased;
                next = chunks.next() => next,
                () = late.cancelled() => Some(Err(ending)),
            };
            Some(match next {
                Some(Ok(chunk)) => (data(chunk.to_string()), Some(chunks)),
                Some(Err(error)) => {
                    call.broke_off(&error);
                    (data(error.json().to_string()), None)
                }
                None => (data(DONE), None),
            })
        }
    });
    let alive = KeepAlive::new().interval(SIGN_OF_LIFE);
    let mut response = Sse::new(events).keep_alive(alive).into_response();
    // nginx would keep events back until a buffer is full.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn data(text: impl AsRef<str>) -> Result<Event, Infallible> {
    Ok(Event::default().data(text))
}
