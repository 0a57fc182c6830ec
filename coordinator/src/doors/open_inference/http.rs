//! The Open Inference Protocol by HTTP, on the port of OpenAI's clients. A model's name may have slashes, so that paths are read
//! from their end.

use std::sync::Arc;

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use serde_json::{Value, json};

use crate::doors::open_inference::{
    about::{self, is_ours},
    json_form,
    question::Question,
    response::Envelope,
    whole::whole,
};
use crate::doors::{
    messages::CallMetadata,
    openai::{body, call::Call, door::Door, error::ApiError},
};

/// The header that says how many bytes of a body are JSON, where raw tensors follow.
pub(crate) const JSON_LENGTH: &str = "inference-header-content-length";

/// The endpoints.
pub(crate) fn routes() -> Router<Arc<Door>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{*path}", any(model))
}

/// What is asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Metadata,
    Ready,
    Infer,
}

/// What a path behind `/v2/models/` asks of which model and version.
fn parse(path: &str) -> (&str, &str, Asked) {
    let (path, asked) = match path.rsplit_once('/') {
        Some((model, "infer")) => (model, Asked::Infer),
        Some((model, "ready")) => (model, Asked::Ready),
        _ => (path, Asked::Metadata),
    };
    let (model, version) = path.rsplit_once("/versions/").unwrap_or((path, ""));
    (model, version, asked)
}

async fn server() -> Response {
    answer(&about::server())
}

async fn live(State(door): State<Arc<Door>>) -> StatusCode {
    if door.coordinator.is_alive() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn ready(State(door): State<Arc<Door>>) -> StatusCode {
    if door.coordinator.probe().await.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn model(
    State(door): State<Arc<Door>>,
    Path(path): Path<String>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Response {
    let (name, version, asked) = parse(&path);
    let expected = if asked == Asked::Infer { Method::POST } else { Method::GET };
    if request.method() != expected {
        return error(StatusCode::METHOD_NOT_ALLOWED, &format!("{} is not a method of this path", request.method()));
    }
    if let Err(status) = is_ours(&door.coordinator, name, version) {
        return error(StatusCode::NOT_FOUND, status.message());
    }
    match asked {
        Asked::Ready => ready(State(door)).await.into_response(),
        Asked::Metadata => answer(&about::model(&door.coordinator)),
        Asked::Infer => infer(&door, &call, request).await.unwrap_or_else(|refusal| {
            let mut response = error(refusal.status, refusal.message());
            // It is counted by this.
            response.extensions_mut().insert(refusal.counted_as);
            response
        }),
    }
}

async fn infer(door: &Door, call: &Call, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = body::bytes(&head.headers, body).await?;
    let json_bytes = json_length(&head.headers)?.unwrap_or(bytes.len());
    let (request, raw) = json_form::request(bytes.into(), json_bytes)?;
    let model = door.coordinator.checkpoint().name().to_owned();
    let envelope = Envelope { model, id: request.id.clone() };
    let question = Question::of(request)?;
    if question.streams {
        return Err(ApiError::field("stream", true, "false: a response by HTTP is whole"));
    }
    let caller = CallMetadata { deadline: call.deadline, trace: call.trace, client: call.client() };
    let answered = whole(&door.coordinator, &envelope, question, caller).await;
    let (json, behind) = json_form::response(&answered.map_err(|error| call.refused(&error, "text_input"))?, &raw);
    if behind.is_empty() {
        return Ok(answer(&json));
    }
    let json = json.to_string();
    let length = HeaderValue::from(json.len());
    let mut response = Response::new(Body::from([json.as_bytes(), &behind].concat()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(JSON_LENGTH, length);
    Ok(response)
}

fn json_length(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    let wrong = || ApiError::field(JSON_LENGTH, String::from_utf8_lossy(value.as_bytes()), "a number of bytes");
    length.map(Some).ok_or_else(wrong)
}

fn answer(value: &Value) -> Response {
    crate::doors::openai::door::json(value)
}

/// An error as this protocol writes it.
fn error(status: StatusCode, message: &str) -> Response {
    (status, answer(&json!({"error": message}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_from_their_end() {
        // Would break: a model whose name has a slash is not found, or another version is answered for.
        for (path, expected) in [
            ("m", ("m", "", Asked::Metadata)),
            ("m/ready", ("m", "", Asked::Ready)),
            ("org/m/infer", ("org/m", "", Asked::Infer)),
            ("org/m/versions/1/infer", ("org/m", "1", Asked::Infer)),
            ("m/versions/2", ("m", "2", Asked::Metadata)),
            ("infer", ("infer", "", Asked::Metadata)),
        ] {
            assert_eq!(parse(path), expected, "{path}");
        }
    }
}
