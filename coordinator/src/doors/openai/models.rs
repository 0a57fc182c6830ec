//! `/v1/models`: the one that is served.

use std::sync::Arc;

use axum::{
    extract::{Path, State, rejection::PathRejection},
    response::Response,
};
use serde_json::{Value, json};

use crate::doors::openai::{
    door::{self, Door},
    error::ApiError,
};

/// The list of models.
pub(crate) async fn models(State(door): State<Arc<Door>>) -> Response {
    door::json(&json!({"object": "list", "data": [described(&door)]}))
}

/// The model of this name.
pub(crate) async fn model(
    State(door): State<Arc<Door>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::invalid("invalid_path", error.body_text()))?;
    if name == door.model() { Ok(door::json(&described(&door))) } else { Err(ApiError::no_model(&name, door.model())) }
}

fn described(door: &Door) -> Value {
    json!({
        "id": door.model(),
        "object": "model",
        "created": door.opened,
        "owned_by": "sida",
        "max_model_len": door.tokens_max(),
    })
}
