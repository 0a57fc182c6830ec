//! A refusal in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with the status that HTTP has for it. Made of
//! a [`RequestError`] where the coordinator refused, and by the endpoints where they do.

use std::{fmt::Display, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use sida_rpc::{Fault, Reason};
use tonic::Code;

use crate::answer::request_error::{RequestError, TextOf};

/// The longest message: one that repeats a long text is cut.
const MESSAGE_BYTES_MAX: usize = 1024;
/// How much of a value a message repeats.
const FOUND_CHARS_MAX: usize = 64;

/// What a caller did wrong, as OpenAI calls it.
const INVALID_REQUEST: &str = "invalid_request_error";
/// What it did not.
const SERVER_ERROR: &str = "server_error";

/// A refusal.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// The code that the request is counted by.
    pub(crate) counted_as: Code,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    /// `field` is not what it should be.
    pub(crate) fn field(field: impl Into<String>, found: impl Display, expected: impl Display) -> Self {
        let (field, found) = (field.into(), shortened(found));
        let message = format!("{field} is {found}, expected {expected}");
        Self { param: Some(field), ..Self::invalid("invalid_value", message) }
    }

    /// `field` cannot be taken, as `message` says.
    pub(crate) fn field_because(field: &str, message: impl Into<String>) -> Self {
        Self { param: Some(field.to_owned()), ..Self::invalid("invalid_value", message) }
    }

    /// `field` asks for what is not served.
    pub(crate) fn unsupported(field: impl Into<String>, why: impl Display) -> Self {
        let field = field.into();
        let message = format!("{field} is not supported: {why}");
        Self { param: Some(field), ..Self::invalid("unsupported_parameter", message) }
    }

    /// `field` has to be there.
    pub(crate) fn missing(field: impl Into<String>, expected: impl Display) -> Self {
        let field = field.into();
        let message = format!("{field} is missing, expected {expected}");
        Self { param: Some(field), ..Self::invalid("missing_required_parameter", message) }
    }

    /// The request is wrong in a way that is not of one field.
    pub(crate) fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::of(StatusCode::BAD_REQUEST, Code::InvalidArgument, INVALID_REQUEST, code, message)
    }

    /// Nothing is served by that name.
    pub(crate) fn no_model(found: &str, served: &str) -> Self {
        let found = shortened(format_args!("{found:?}"));
        let message = format!("the model {found} does not exist here, {served} is served");
        let error = Self::of(StatusCode::NOT_FOUND, Code::NotFound, INVALID_REQUEST, "model_not_found", message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// The model lacks what the endpoint needs.
    pub(crate) fn unable(code: &'static str, message: impl Into<String>) -> Self {
        Self::of(StatusCode::BAD_REQUEST, Code::Unimplemented, INVALID_REQUEST, code, message)
    }

    /// A refusal that HTTP has a status for.
    pub(crate) fn http(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::of(status, Code::InvalidArgument, INVALID_REQUEST, code, message)
    }

    /// This node does not serve now.
    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::of(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, SERVER_ERROR, code, message);
        Self { retry_after: Some(Duration::from_secs(1)), ..error }
    }

    /// What a layer before the endpoints refused.
    pub(crate) fn of_fault(fault: &Fault) -> Self {
        let (status, kind, code) = told_as(fault.reason());
        let retry_after = fault.retry_hint();
        Self { retry_after, ..Self::of(status, fault.reason().code(), kind, code, fault.message()) }
    }

    /// What the coordinator refused. `text_field` is the endpoint's name of the text that is answered.
    pub(crate) fn of_request(error: &RequestError, text_field: &str) -> Self {
        let param = field_of(error, text_field);
        let refusal = Self::of_fault(&Fault::from(error.clone()));
        match (error, &param) {
            // Their names in `sida.v1` mean nothing to who gave them by another.
            (RequestError::Argument { field: "choices" | "tokens" | "texts", found, expected }, Some(field)) => {
                let message = format!("{field} is {}, expected {expected}", shortened(found));
                Self { message, param, ..refusal }
            }
            _ => Self { param, ..refusal },
        }
    }

    fn of(
        status: StatusCode,
        counted_as: Code,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        Self { status, counted_as, kind, code, param: None, message, retry_after: None }
    }

    /// What is said to people.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The body, which is also what ends a stream.
    pub(crate) fn json(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

/// What a request is told that came by gRPC but has the same fields.
impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        let fault = Self::new(Reason::InvalidRequest, error.message);
        error.param.into_iter().fold(fault, |fault, field| fault.with("field", field))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(delay) = self.retry_after {
            // Whole seconds are what HTTP knows; OpenAI's clients look for milliseconds first.
            headers.insert(header::RETRY_AFTER, HeaderValue::from(delay.as_millis().div_ceil(1000).max(1) as u64));
            headers.insert("retry-after-ms", HeaderValue::from(delay.as_millis() as u64));
        }
        response.extensions_mut().insert(self.counted_as);
        // Another protocol on this port writes it anew.
        response.extensions_mut().insert(self);
        response
    }
}

/// The status, type and code by which a reason is told.
#[rustfmt::skip] // One line a reason.
fn told_as(reason: Reason) -> (StatusCode, &'static str, &'static str) {
    use Reason as R;
    match reason {
        R::InvalidRequest | R::MalformedMessage | R::MalformedDeadline => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "invalid_value"),
        R::EmptyText => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "empty_text"),
        R::TextTooLong => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "context_length_exceeded"),
        R::MetadataTooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, INVALID_REQUEST, "headers_too_large"),
        R::Unauthenticated => (StatusCode::UNAUTHORIZED, INVALID_REQUEST, "invalid_api_key"),
        R::ModelMismatch => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "model_mismatch"),
        R::NoPredictor => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "no_predictor"),
        R::Unsupported => (StatusCode::BAD_REQUEST, INVALID_REQUEST, "unsupported_value"),
        R::QueueFull => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full"),
        R::ClientShare => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "client_share"),
        R::ClientLimit => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded"),
        R::NoTime => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "no_time"),
        R::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, SERVER_ERROR, "deadline_exceeded"),
        R::Cancelled => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "cancelled"),
        R::ExpertUnavailable => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "expert_unavailable"),
        R::ExpertLoadFailed => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "expert_load_failed"),
        R::DeviceFailed => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "device_failed"),
        R::RetriesExhausted => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "retries_exhausted"),
        R::StaleEpoch => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "stale_epoch"),
        R::PredictorUnavailable => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "predictor_unavailable"),
        R::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, "shutting_down"),
        R::Internal => (StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, "internal_error"),
    }
}

/// The field that a refusal is about, as this door calls it.
fn field_of(error: &RequestError, text_field: &str) -> Option<String> {
    Some(match error {
        RequestError::Argument { field, .. } => match field.split(' ').next().unwrap_or(field) {
            "choices" => "n".to_owned(),
            "tokens" | "texts" | "prompts" => text_field.to_owned(),
            // What follows the name says what of it was measured.
            field => field.to_owned(),
        },
        RequestError::JsonSchema { .. } => "response_format".to_owned(),
        // What the operator calls it: no field of the request is wrong.
        RequestError::ClientLimit { limit, .. } | RequestError::ClientLimitBelow { limit, .. } => (*limit).to_owned(),
        RequestError::EmptyText => text_field.to_owned(),
        RequestError::TextTooLong { of, .. }
        | RequestError::TooManyTokens { of, .. }
        | RequestError::NoRoom { of, .. }
        | RequestError::Tokenize { of, .. } => match of {
            TextOf::Prompt | TextOf::PromptTokens => text_field.to_owned(),
            TextOf::Text(number) => format!("{text_field}[{}]", number - 1),
            TextOf::Target(number) => format!("targets[{}]", number - 1),
        },
        _ => return None,
    })
}

/// `found` as a message repeats it.
fn shortened(found: impl Display) -> String {
    let found = found.to_string();
    match found.char_indices().nth(FOUND_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &found[..end]),
        None => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_look_as_openais_do() {
        // Would break: clients cannot tell what to mend, or come back at once to a queue that is full.
        let full = RequestError::QueueFull { limit: 9, retry_after: Duration::from_millis(1100) };
        let response = ApiError::of_request(&full, "prompt").into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1100");
        assert_eq!(response.extensions().get(), Some(&Code::ResourceExhausted));
        let long = RequestError::TooManyTokens { of: TextOf::Prompt, tokens: 9, limit: 8 };
        let long = ApiError::of_request(&long, "messages").json();
        let expected = json!({"error": {
            "message": "the prompt has 9 tokens, more than the 8 allowed",
            "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded",
        }});
        assert_eq!(long, expected);
        let stops =
            RequestError::Argument { field: "stop (bytes)", found: "0".to_owned(), expected: "1 to 256".to_owned() };
        assert_eq!(ApiError::of_request(&stops, "prompt").json()["error"]["param"], "stop");
        let tokens = "at least one token".to_owned();
        let empty = RequestError::Argument { field: "tokens", found: "an empty list".to_owned(), expected: tokens };
        let empty = ApiError::of_request(&empty, "prompt");
        assert_eq!(empty.message(), "prompt is an empty list, expected at least one token");
    }

    #[test]
    fn a_message_repeats_little_of_what_was_sent() {
        // Would break: a megabyte that is no number comes back as an error of a megabyte.
        let error = ApiError::field("n", "é".repeat(5000), "a number").json();
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(message.len() < 300 && message.ends_with("..., expected a number"), "{message}");
    }
}
