//! What a client may still have in this minute, in the headers by which OpenAI says it: `x-ratelimit-limit-requests`,
//! `-remaining-requests` and `-reset-requests`, and the same of tokens.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use sida_routing::client_limits::Standing;

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Puts what is limited, of requests and of tokens, into the headers of an answer.
pub(crate) fn tell([requests, tokens]: [Option<Standing>; 2], headers: &mut HeaderMap) {
    for (names, standing) in [(REQUESTS, requests), (TOKENS, tokens)] {
        let Some(Standing { allowed, remaining, full_in }) = standing else { continue };
        let [limit, left, reset] = names;
        headers.insert(limit, allowed.into());
        headers.insert(left, remaining.into());
        // As Go writes times, in seconds. Digits, a dot and a letter are a header's value.
        if let Ok(reset_in) = HeaderValue::try_from(format!("{:.3}s", full_in.as_secs_f64())) {
            headers.insert(reset, reset_in);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_limited_is_told_as_openai_does() {
        // Would break: clients that pace themselves by these headers find none, or those of what is not limited.
        let mut headers = HeaderMap::new();
        let standing = Standing { allowed: 60, remaining: 58, full_in: Duration::from_millis(1500) };
        tell([Some(standing), None], &mut headers);
        let told: Vec<_> = REQUESTS.iter().map(|name| headers[name].to_str().unwrap()).collect();
        assert_eq!((told, headers.len()), (vec!["60", "58", "1.500s"], 3));
    }
}
