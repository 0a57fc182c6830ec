//! The same in fewer words, as Triton's `generate` and `generate_stream` have it: one text as a field of a JSON object,
//! its parameters beside it or in `parameters`, and the outputs as fields of the answer.

use std::{sync::Arc, time::Duration};

use axum::{extract::Request, response::Response};
use futures::{StreamExt, stream};
use serde_json::{Map, Value, json};
use sida_proto::inference::ModelInferResponse;

use crate::{
    doors::{
        messages::CallMetadata,
        open_inference::{
            parameters,
            question::{FINISH_REASON, Question, TEXT_INPUT, TEXT_OUTPUT},
            response::{Envelope, Generated},
            tensor,
            whole::{generations, tokens, whole},
        },
        openai::{
            body,
            call::Call,
            door::{self, Door},
            error::ApiError,
            events::{EventForm, events},
            fields::whole as whole_number,
        },
    },
    measures,
};

/// How events look: they end with the last, and an error is this protocol's.
const EVENTS: EventForm = EventForm { done: None, error: |error| json!({"error": error.message()}) };
/// Fields of other servers' models, which say nothing where they are empty.
const EMPTY: [&str; 2] = ["bad_words", "stop_words"];

/// What is asked for, and the id of the request.
pub(crate) struct Asked {
    id: String,
    question: Question,
    /// Whether tokens are to come one by one, if it says.
    streams: Option<bool>,
}

/// Answers whole.
pub(crate) async fn generate(door: &Door, call: &Call, request: Request) -> Result<Response, ApiError> {
    let Asked { id, question, streams } = read(request).await?;
    if streams == Some(true) {
        return Err(ApiError::field("stream", true, "false: generate_stream answers token by token"));
    }
    let envelope = envelope(door, id);
    let answered = whole(&door.coordinator, &envelope, question, caller(call)).await;
    Ok(door::json(&object(&answered.map_err(|error| call.refused(&error, TEXT_INPUT))?)))
}

/// Answers token by token, or in one event where that is asked for.
pub(crate) async fn generate_stream(door: &Arc<Door>, call: &Call, request: Request) -> Result<Response, ApiError> {
    let Asked { id, question, streams } = read(request).await?;
    let envelope = envelope(door, id);
    if streams == Some(false) {
        let answered = whole(&door.coordinator, &envelope, question, caller(call)).await;
        let only = object(&answered.map_err(|error| call.refused(&error, TEXT_INPUT))?);
        return Ok(events(stream::iter([Ok(only)]), door, call.clone(), EVENTS));
    }
    let params = generations(&question, caller(call)).swap_remove(0);
    let refused = |error| call.refused(&error, TEXT_INPUT);
    let mut tokens = Box::pin(tokens(&door.coordinator, params).await.map_err(refused)?);
    // What fails before the first token still gets a status.
    let first = tokens.next().await.transpose().map_err(refused)?;
    let refusing = call.clone();
    let parts = stream::iter(first.map(Ok)).chain(tokens).map(move |token| {
        let token = token.map_err(|error| refusing.refused(&error, TEXT_INPUT))?;
        let part = Generated { text: token.text, finish: token.finish.map(|finish| finish.reason) };
        Ok(object(&envelope.generation(&question.outputs, &[part])))
    });
    Ok(events(parts, door, call.clone(), EVENTS))
}

fn envelope(door: &Door, id: String) -> Envelope {
    Envelope { model: door.model().to_owned(), id }
}

/// Who asks by HTTP.
pub(crate) fn caller(call: &Call) -> CallMetadata {
    let Call { deadline, trace, .. } = *call;
    CallMetadata { deadline, trace, client: call.client(), door: measures::door::Door::OpenInference }
}

async fn read(request: Request) -> Result<Asked, ApiError> {
    let (head, body) = request.into_parts();
    parsed(&body::bytes(&head.headers, body).await?)
}

/// What the body of a request asks for.
pub(crate) fn parsed(bytes: &[u8]) -> Result<Asked, ApiError> {
    let not_json = |error| ApiError::invalid("invalid_json", format!("the body is no JSON object: {error}"));
    asked(serde_json::from_slice(bytes).map_err(not_json)?)
}

fn asked(mut all: Map<String, Value>) -> Result<Asked, ApiError> {
    let id = text(&mut all, "id")?.unwrap_or_default();
    let input = text(&mut all, TEXT_INPUT)?.ok_or_else(|| ApiError::missing(TEXT_INPUT, "a text"))?;
    match all.remove("parameters") {
        None | Some(Value::Null) => {}
        Some(Value::Object(parameters)) => all.extend(parameters),
        Some(other) => return Err(ApiError::field("parameters", other, "an object")),
    }
    let sampling = match all.remove("sampling_parameters") {
        Some(Value::String(text)) => Some(text),
        Some(object @ Value::Object(_)) => Some(object.to_string()),
        None | Some(Value::Null) => None,
        Some(other) => return Err(ApiError::field("sampling_parameters", other, "a JSON object")),
    };
    let streams = match all.remove("stream") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(streams)) => Some(streams),
        Some(other) => return Err(ApiError::field("stream", other, "true or false")),
    };
    let microseconds = all.remove("timeout").map(|value| {
        let found = whole_number(&value).and_then(|number| u64::try_from(number).ok());
        found.ok_or_else(|| ApiError::field("timeout", value, "microseconds, 0 or more"))
    });
    let timeout = microseconds.transpose()?.filter(|microseconds| (1..1 << 52).contains(microseconds));
    all.retain(|name, value| !(EMPTY.contains(&name.as_str()) && *value == ""));
    let question = Question {
        texts: vec![input],
        outputs: vec![TEXT_OUTPUT, FINISH_REASON],
        wanted: parameters::with(all, sampling.as_deref())?,
        streams: false,
        marks_last: false,
        timeout: timeout.map(Duration::from_micros),
    };
    Ok(Asked { id, question, streams })
}

fn text(all: &mut Map<String, Value>, name: &'static str) -> Result<Option<String>, ApiError> {
    match all.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(ApiError::field(name, other, "a text")),
    }
}

/// A response whose outputs have one element each, as one object.
fn object(response: &ModelInferResponse) -> Value {
    let ModelInferResponse { model_name, model_version, id, outputs, raw_output_contents, .. } = response;
    let mut all = json!({"model_name": model_name, "model_version": model_version});
    if !id.is_empty() {
        all["id"] = id.as_str().into();
    }
    for (output, raw) in outputs.iter().zip(raw_output_contents) {
        all[output.name.as_str()] = tensor::values(output, raw).into_iter().next().unwrap_or_default();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: Value) -> Result<Asked, ApiError> {
        asked(value.as_object().expect("an object").clone())
    }

    #[test]
    fn parameters_may_stand_anywhere() {
        // Would break: what Triton's documents show is refused, or what it asks for is left out.
        let beside = json!({"text_input": "a", "max_tokens": 9, "bad_words": "", "stop_words": "", "stream": true, "stop": ["x"]});
        let asked = of(beside).unwrap();
        assert_eq!((asked.question.texts, asked.streams), (vec!["a".to_owned()], Some(true)));
        assert_eq!((asked.question.wanted.tokens_max, asked.question.wanted.stop), (9, vec!["x".to_owned()]));
        let within = json!({
            "id": "7", "text_input": "a", "parameters": {"stream": false, "temperature": 0, "timeout": 1_000_000},
            "sampling_parameters": "{\"max_tokens\": \"3\"}",
        });
        let asked = of(within).unwrap();
        let question = &asked.question;
        assert_eq!(
            (asked.id.as_str(), asked.streams, question.timeout),
            ("7", Some(false), Some(Duration::from_secs(1)))
        );
        assert_eq!((question.wanted.sampling.temperature, question.wanted.tokens_max), (Some(0.0), 3));
    }

    #[test]
    fn what_is_wrong_is_named() {
        // Would break: a mistake in a request is answered as if it was none.
        for (wrong, param) in [
            (json!({}), "text_input"),
            (json!({"text_input": ["a"]}), "text_input"),
            (json!({"text_input": "a", "parameters": 1}), "parameters"),
            (json!({"text_input": "a", "stream": "yes"}), "stream"),
            (json!({"text_input": "a", "timeout": -1}), "timeout"),
            (json!({"text_input": "a", "bad_words": "b"}), "bad_words"),
            (json!({"text_input": "a", "parameters": {"n": 2}}), "n"),
            (json!({"text_input": "a", "sampling_parameters": 1}), "sampling_parameters"),
        ] {
            let error = of(wrong.clone()).err().expect("a refusal").json();
            assert_eq!(error["error"]["param"], param, "{wrong}");
        }
    }
}
