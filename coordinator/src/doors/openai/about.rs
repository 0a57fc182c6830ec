//! Whether the node serves, and what it serves as a description for programs.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::doors::openai::{
    door::{self, Door},
    error::ApiError,
};

/// The OpenAPI description of this door.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// Whether requests are answered: 200, or 503.
pub(crate) async fn health(State(door): State<Arc<Door>>) -> Response {
    match door.coordinator.is_ready().await {
        true => door::json(&json!({"status": "ok"})),
        false => ApiError::unavailable("not_ready", "this node does not serve now").into_response(),
    }
}

/// What there is.
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::doors::openai::{
        chat_completions::ChatRequest,
        completions::CompletionRequest,
        embeddings::EmbeddingRequest,
        fields::{Fields, HARMLESS},
        routes::PATHS,
        tokens::{TokenizeRequest, read_tokens},
    };

    fn description() -> Value {
        serde_json::from_str(OPENAPI).expect("JSON")
    }

    fn keys(value: &Value) -> BTreeSet<&str> {
        value.as_object().expect("an object").keys().map(String::as_str).collect()
    }

    #[test]
    fn every_path_is_described() {
        // Would break: programs made from the description miss an endpoint, or call one that is not there.
        let described = description();
        let served = PATHS.map(|path| path.replace("{*", "{"));
        assert_eq!(keys(&described["paths"]), served.iter().map(String::as_str).collect());
    }

    #[test]
    fn every_field_is_described() {
        // Would break: a client made from the description cannot say what the endpoint takes, or says what is refused.
        let described = description();
        let check = |schema: &str, request: Value, harmless: bool, read: &dyn Fn(&mut Fields)| {
            let mut fields = Fields::of(request, "").expect("an object");
            read(&mut fields);
            let mut asked = fields.asked.clone();
            asked.insert("model");
            asked.extend(HARMLESS.iter().filter(|_| harmless));
            assert_eq!(keys(&described["components"]["schemas"][schema]["properties"]), asked, "{schema}");
        };
        let messages = json!({"messages": [{"role": "user", "content": "Hi"}]});
        check("CompletionRequest", json!({"prompt": "a"}), true, &|fields| drop(CompletionRequest::read(fields)));
        check("ChatCompletionRequest", messages.clone(), true, &|fields| drop(ChatRequest::read(fields, b"{}")));
        check("EmbeddingRequest", json!({"input": "a"}), true, &|fields| drop(EmbeddingRequest::read(fields, 1)));
        check("TokenizeRequest", messages, false, &|fields| drop(TokenizeRequest::read(fields)));
        check("DetokenizeRequest", json!({"tokens": []}), false, &|fields| drop(read_tokens(fields)));
    }
}
