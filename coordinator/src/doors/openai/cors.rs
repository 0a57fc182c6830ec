//! Which web pages may ask this door from a browser. A browser asks for that first (CORS), without a key; what the page
//! itself asks needs the key that everybody needs.

use std::time::Duration;

use axum::http::{HeaderName, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::config::CorsOrigin;

/// How long a browser may remember what it was told.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// What a page may read of an answer's headers.
const READABLE: [HeaderName; 3] =
    [header::RETRY_AFTER, HeaderName::from_static("retry-after-ms"), HeaderName::from_static("x-request-id")];

/// Tells browsers that pages of these origins may ask; `None`: nobody is told anything, so that no page may.
pub(crate) fn layer(origins: &[CorsOrigin]) -> Option<CorsLayer> {
    let named = origins.iter().filter_map(|origin| match origin {
        CorsOrigin::Any => None,
        CorsOrigin::Of(origin) => Some(origin.clone()),
    });
    let allowed = match origins {
        [] => return None,
        origins if origins.contains(&CorsOrigin::Any) => AllowOrigin::any(),
        _ => AllowOrigin::list(named),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        // OpenAI's client for JavaScript sends a dozen headers of its own.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(READABLE)
        .max_age(REMEMBERED);
    Some(layer)
}
