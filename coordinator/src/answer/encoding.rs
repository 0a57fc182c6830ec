//! The answer to a request for encoder states, made of its rows: all of them, or their mean.

use crate::answer::{
    output::{Encoding, Pooling},
    request_error::RequestError,
    trace::Trace,
};

/// The answer made of a request's rows (tokens, d_model) of encoder states. Refuses states that are not numbers.
pub(crate) fn encoding(
    states: &[f32],
    d_model: usize,
    pooling: Pooling,
    prompt_tokens: usize,
    trace: Trace,
) -> Result<Encoding, RequestError> {
    let states = match pooling {
        Pooling::None => states.to_vec(),
        Pooling::Mean => mean(states, d_model),
    };
    if !states.iter().all(|value| value.is_finite()) {
        return Err(RequestError::NotANumber);
    }
    Ok(Encoding { rows: states.len() / d_model, states, d_model, prompt_tokens, trace })
}

/// The mean of (n, d_model) rows.
fn mean(rows: &[f32], d_model: usize) -> Vec<f32> {
    let count = (rows.len() / d_model) as f32;
    let mut sum = vec![0.0; d_model];
    for row in rows.chunks_exact(d_model) {
        sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    sum.iter().map(|sum| sum / count).collect()
}
