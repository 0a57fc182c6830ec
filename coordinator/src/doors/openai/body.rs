//! The JSON body of a request: of the right type, within a limit of bytes, and UTF-8. The limit of time is the
//! connection's.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use futures::TryStreamExt;
use sida_rpc::{Reason, why_unread};

use crate::{
    config::REQUEST_BYTES_MAX,
    doors::openai::{error::ApiError, fields::Fields},
};

/// The fields of the request's object.
pub(crate) async fn fields(request: Request) -> Result<Fields, ApiError> {
    parsed(&text(request).await?)
}

/// The text of that object.
pub(crate) async fn text(request: Request) -> Result<Vec<u8>, ApiError> {
    let (head, body) = request.into_parts();
    check_type(&head.headers)?;
    bytes(&head.headers, body).await
}

/// The fields of an object in JSON.
pub(crate) fn parsed(bytes: &[u8]) -> Result<Fields, ApiError> {
    let not_utf8 = |error| ApiError::invalid("invalid_json", format!("the body is not UTF-8: {error}"));
    let text = std::str::from_utf8(bytes).map_err(not_utf8)?;
    let not_json = |error| ApiError::invalid("invalid_json", format!("the body is not JSON: {error}"));
    Fields::of(serde_json::from_str(text).map_err(not_json)?, "")
}

/// All of a body, within its limits.
pub(crate) async fn bytes(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, ApiError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        let found = String::from_utf8_lossy(encoding.as_bytes());
        let message = format!("content-encoding is {found}, expected none: bodies are not compressed here");
        return Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    if announced.is_some_and(|bytes: u64| bytes > REQUEST_BYTES_MAX as u64) {
        return Err(too_long());
    }
    collect(body).await
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let found = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let essence = found.as_deref().unwrap_or("missing").split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("content-type is {essence}, expected application/json");
    Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
}

/// All bytes of `body`. Its memory grows with what has come, not with what was announced.
async fn collect(body: Body) -> Result<Vec<u8>, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(more) = stream.try_next().await.map_err(|error| unread(&error))? {
        if bytes.len() + more.len() > REQUEST_BYTES_MAX {
            return Err(too_long());
        }
        bytes.extend_from_slice(&more);
    }
    Ok(bytes)
}

/// Why a body was not read to its end.
fn unread(error: &axum::Error) -> ApiError {
    match why_unread(error) {
        Some(fault) if fault.reason() == Reason::DeadlineExceeded => {
            ApiError::http(StatusCode::REQUEST_TIMEOUT, "request_timeout", fault.message())
        }
        Some(fault) => ApiError::of_fault(fault),
        None => ApiError::invalid("invalid_body", "the body ended before it was whole, or its pieces have no lengths"),
    }
}

fn too_long() -> ApiError {
    let message = format!("the body has more than the {REQUEST_BYTES_MAX} bytes allowed");
    ApiError::http(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}
