//! The answer to a request for encoder states: all of its rows, or their mean.

use crate::answer::{output::Encoding, request_error::RequestError, trace::Trace};

/// The answer made of encoder states (rows, d_model). Refuses states that are not numbers.
pub(crate) fn encoding(
    states: Vec<f32>,
    d_model: usize,
    prompt_tokens: usize,
    trace: Trace,
) -> Result<Encoding, RequestError> {
    if !states.iter().all(|value| value.is_finite()) {
        return Err(RequestError::NotANumber);
    }
    Ok(Encoding { rows: states.len() / d_model, states, d_model, prompt_tokens, trace })
}
