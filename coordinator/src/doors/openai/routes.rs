//! Which path is answered by whom.

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use sida_rpc::{AuthenticationLayer, Fault};
use tokio_util::sync::CancellationToken;

use crate::{
    coordinator::Coordinator,
    doors::{
        open_inference,
        openai::{
            about, call, chat_completions, completions, cors, door::Door, embeddings, error::ApiError, models, tokens,
        },
    },
};

/// Every path, as axum matches it. The name of a model may have slashes.
pub(crate) const PATHS: [&str; 9] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/{*model}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/openapi.json",
];

/// All endpoints over `coordinator`. What is in flight when `late` is cancelled is ended.
pub(crate) fn routes(coordinator: Coordinator, late: CancellationToken) -> Router {
    let gate = coordinator.config().server.gate.clone();
    let cors = cors::layer(&coordinator.config().http_cors_origins);
    let door = Arc::new(Door::new(coordinator, late));
    let [completions, chat_completions, embeddings, models, model, tokenize, detokenize, health, openapi] = PATHS;
    let routes = Router::new()
        .route(completions, post(completions::completions))
        .route(chat_completions, post(chat_completions::chat_completions))
        .route(embeddings, post(embeddings::embeddings))
        .route(models, get(models::models))
        .route(model, get(models::model))
        .route(tokenize, post(tokens::tokenize))
        .route(detokenize, post(tokens::detokenize))
        .route(health, get(about::health))
        .route(openapi, get(about::openapi))
        .merge(open_inference::http::routes())
        .fallback(nowhere)
        .method_not_allowed_fallback(other_method)
        .layer(middleware::from_fn_with_state(door.clone(), call::introduced))
        // Whoever may not call learns no more than that.
        .layer(AuthenticationLayer::new(gate, is_open, refuse))
        .layer(middleware::from_fn_with_state(door.clone(), call::answer))
        .with_state(door);
    let routes = routes.layer(middleware::from_fn(open_inference::http::in_own_form));
    match cors {
        // Outermost: what a browser asks before a page may has no key, and a refusal is for the page to read.
        Some(cors) => routes.layer(cors),
        None => routes,
    }
}

/// Whether a path is answered to callers without a key: probes have none, and the description tells nothing of this node.
fn is_open(path: &str) -> bool {
    ["/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"].contains(&path)
}

fn refuse(fault: Fault) -> Response {
    ApiError::of_fault(&fault).into_response()
}

async fn nowhere(request: Request) -> Response {
    let message = format!("there is no {}, see /openapi.json", request.uri().path());
    ApiError::http(StatusCode::NOT_FOUND, "not_found", message).into_response()
}

async fn other_method(request: Request) -> Response {
    let message = format!("{} is not a method of {}", request.method(), request.uri().path());
    ApiError::http(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response()
}
