//! The requests that wait for the rows of a batch, so that work which no caller waits for any more can end in the
//! middle of a layer.

use std::time::Instant;

use sida_model::Spans;

use crate::{answer::request_error::RequestError, intake::request::Request};

/// The requests of a batch.
#[derive(Clone, Copy)]
pub(crate) struct Callers<'a> {
    /// The rows of each sequence.
    spans: &'a Spans,
    /// The request of each sequence; none for a health check, which never goes away.
    requests: &'a [&'a Request],
}

impl<'a> Callers<'a> {
    /// `requests` has one for each of `spans`, or is empty.
    pub(crate) fn new(spans: &'a Spans, requests: &'a [&'a Request]) -> Self {
        debug_assert!(requests.is_empty() || requests.len() == spans.len(), "rows of nobody");
        Self { spans, requests }
    }

    /// Whether anybody waits: nobody does for a health check.
    pub(crate) fn are_any(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Why no caller waits for any of the rows `tokens` any more, if that is so.
    pub(crate) fn gone(&self, tokens: &[u32], now: Instant) -> Option<RequestError> {
        let mut reason = None;
        for &token in tokens {
            let request = self.spans.holder(token as usize).and_then(|span| self.requests.get(span))?;
            reason = Some(request.over(now)?);
        }
        reason
    }
}
