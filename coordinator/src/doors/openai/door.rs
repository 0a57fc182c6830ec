//! What the endpoints of the door share: the coordinator behind it, the model's chat template, and how the node ends.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use serde_json::Value;
use sida_model::ChatTemplate;
use tokio_util::sync::CancellationToken;

use crate::{
    coordinator::Coordinator,
    doors::openai::{error::ApiError, fields::Fields},
};

/// What is behind the door.
pub(crate) struct Door {
    pub(crate) coordinator: Coordinator,
    /// `None`: the checkpoint has none. An error says why the one that it has cannot be used.
    pub(crate) template: Result<Option<ChatTemplate>, String>,
    /// Cancelled when the node waits no longer for what is in flight.
    pub(crate) late: CancellationToken,
    /// When the door was opened, in seconds of Unix.
    pub(crate) opened: u64,
}

impl Door {
    /// The door to `coordinator`.
    pub(crate) fn new(coordinator: Coordinator, late: CancellationToken) -> Self {
        let template = ChatTemplate::open(coordinator.checkpoint().dir()).map_err(|error| error.to_string());
        if let Err(error) = &template {
            tracing::warn!(error, "/v1/chat/completions is not served");
        }
        Self { coordinator, template, late, opened: now() }
    }

    /// The name of the only model.
    pub(crate) fn model(&self) -> &str {
        self.coordinator.checkpoint().name()
    }

    /// The most tokens that a prompt and its answer have together.
    pub(crate) fn tokens_max(&self) -> usize {
        let limits = &self.coordinator.config().request_limits;
        let positions_max = self.coordinator.checkpoint().config().positions_max.unwrap_or(usize::MAX);
        (limits.prompt_tokens_max + limits.tokens_max).min(positions_max)
    }

    /// Takes the field `model`, and refuses another model than the only one. Who leaves it out gets that.
    pub(crate) fn check_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        match fields.text("model")? {
            Some(asked) if asked != self.model() => Err(ApiError::no_model(&asked, self.model())),
            _ => Ok(()),
        }
    }

    /// The refusal of what is in flight at the end.
    pub(crate) fn ending(&self) -> ApiError {
        ApiError::unavailable("shutting_down", "this node is shutting down")
    }
}

/// Seconds of Unix.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An answer in JSON.
pub(crate) fn json(value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
