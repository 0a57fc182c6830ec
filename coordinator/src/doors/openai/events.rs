//! An answer as it comes: server-sent events, `data: {...}` each, and OpenAI's `data: [DONE]` at the end. An error ends
//! them in its place, since the head has gone out already.

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

/// How a protocol writes its events.
#[derive(Clone, Copy)]
pub(crate) struct EventForm {
    /// What says that the answer is whole; `None`: nothing does.
    pub(crate) done: Option<&'static str>,
    /// What ends the answer in its place.
    pub(crate) error: fn(&ApiError) -> Value,
}

impl EventForm {
    /// OpenAI's.
    pub(crate) const OPENAI: Self = Self { done: Some("[DONE]"), error: ApiError::json };
}

/// How often a silent stream says that it lives: proxies close those that do not.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// `chunks` as events, until the node waits no longer for them or the call's key is taken away.
pub(crate) fn events(
    chunks: impl Stream<Item = Result<Value, ApiError>> + Send + 'static,
    door: &Door,
    call: Call,
    form: EventForm,
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
                refusal = call.loses_its_key() => Some(Err(refusal)),
            };
            Some(match next {
                Some(Ok(chunk)) => (data(chunk.to_string()), Some(chunks)),
                Some(Err(error)) => {
                    call.broke_off(&error);
                    (data((form.error)(&error).to_string()), None)
                }
                None => (data(form.done?), None),
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
