//! Answers to requests for encoder states: the request's rows of a batch, pooled if that was asked. Called by the engine.

use crate::{
    engine::guarded,
    output::Encoding,
    request::{Pooling, Request, RequestError, Work},
    trace::Trace,
};

/// Answers a request for encoder states with its rows (tokens, d_model) of `states`.
pub(crate) fn answer(request: Request, mut trace: Trace, pooling: Pooling, states: &[f32], d_model: usize) {
    trace.timings.total = request.accepted.elapsed();
    let prompt_tokens = request.tokens.len();
    let encoding = guarded(|| {
        let states = match pooling {
            Pooling::None => states.to_vec(),
            Pooling::Mean => mean(states, d_model),
        };
        Ok(Encoding { rows: states.len() / d_model, states, d_model, prompt_tokens, trace })
    });
    let encoding = encoding.and_then(|encoding| {
        if encoding.states.iter().all(|value| value.is_finite()) { Ok(encoding) } else { Err(RequestError::NotANumber) }
    });
    if let Work::Encode { reply, .. } = request.work {
        // The caller may have gone, which is no error.
        drop(reply.send(encoding));
    }
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
