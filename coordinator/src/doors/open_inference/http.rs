//! The Open Inference Protocol by HTTP, on the port of OpenAI's clients. A model's name may have slashes, so that paths are read
//! from their end.

use std::sync::Arc;

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{any, get},
};
use serde_json::{Value, json};

use crate::doors::open_inference::{
    about::{self, is_ours},
    generate, json_form,
    question::Question,
    response::Envelope,
    whole::whole,
};
use crate::doors::openai::{body, call::Call, door::Door, error::ApiError};

/// The header that says how many bytes of a body are JSON, where raw tensors follow.
pub(crate) const JSON_LENGTH: &str = "inference-header-content-length";

/// The endpoints.
pub(crate) fn routes() -> Router<Arc<Door>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        // Of every model.
        .route("/v2/models/stats", get(statistics))
        .route("/v2/models/{*path}", any(model))
}

/// Writes refusals of this protocol's paths as it writes them, wherever on the way they come from.
pub(crate) async fn in_own_form(request: Request, next: Next) -> Response {
    let rest = request.uri().path().strip_prefix(ROOT);
    let is_ours = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let mut response = next.run(request).await;
    if let Some(refusal) = response.extensions_mut().remove::<ApiError>().filter(|_| is_ours) {
        *response.body_mut() = Body::from(json!({"error": refusal.message()}).to_string());
    }
    response
}

/// What paths of this protocol begin with.
const ROOT: &str = "/v2";

/// What is asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Metadata,
    Ready,
    Config,
    Statistics,
    Infer,
    Generate,
    GenerateStream,
}

/// What stands behind the name of a model.
const ENDINGS: [(&str, Asked); 6] = [
    ("ready", Asked::Ready),
    ("config", Asked::Config),
    ("stats", Asked::Statistics),
    ("infer", Asked::Infer),
    ("generate", Asked::Generate),
    ("generate_stream", Asked::GenerateStream),
];

/// What a path behind `/v2/models/` asks of which model and version.
fn parse(path: &str) -> (&str, &str, Asked) {
    let ending = |(model, ending)| Some((model, ENDINGS.into_iter().find(|(name, _)| *name == ending)?.1));
    let (path, asked) = path.rsplit_once('/').and_then(ending).unwrap_or((path, Asked::Metadata));
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
    if door.coordinator.is_ready().await { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn model(
    State(door): State<Arc<Door>>,
    Path(path): Path<String>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let (name, version, asked) = parse(&path);
    let expected = match asked {
        Asked::Infer | Asked::Generate | Asked::GenerateStream => Method::POST,
        Asked::Metadata | Asked::Ready | Asked::Config | Asked::Statistics => Method::GET,
    };
    if request.method() != expected {
        let message = format!("{} is not a method of this path, expected {expected}", request.method());
        return Err(ApiError::http(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
    }
    is_ours(&door.coordinator, name, version)
        .map_err(|status| ApiError::http(StatusCode::NOT_FOUND, "model_not_found", status.message()))?;
    match asked {
        Asked::Ready => Ok(ready(State(door)).await.into_response()),
        Asked::Metadata => Ok(answer(&about::model(&door.coordinator))),
        Asked::Config => Ok(answer(&about::config(&door.coordinator))),
        Asked::Statistics => Ok(statistics(State(door)).await),
        Asked::Infer => infer(&door, &call, request).await,
        Asked::Generate => generate::generate(&door, &call, request).await,
        Asked::GenerateStream => generate::generate_stream(&door, &call, request).await,
    }
}

async fn statistics(State(door): State<Arc<Door>>) -> Response {
    answer(&crate::doors::open_inference::statistics::json(&door.coordinator))
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
    let answered = whole(&door.coordinator, &envelope, question, generate::caller(call)).await;
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
            ("org/m/generate", ("org/m", "", Asked::Generate)),
            ("m/versions/1/generate_stream", ("m", "1", Asked::GenerateStream)),
            ("m/config", ("m", "", Asked::Config)),
            ("m/stats", ("m", "", Asked::Statistics)),
        ] {
            assert_eq!(parse(path), expected, "{path}");
        }
    }
}
