//! The answer to a request for encoder states: all of its rows, or their mean, which may be of length 1.

use crate::answer::{output::Encoding, request_error::RequestError, trace::Trace};

/// Lengths below it are those of nothing: such a row stays as it is.
const LENGTH_MIN: f64 = 1e-12;

/// The answer made of encoder states (rows, d_model). Refuses states that are not numbers.
pub(crate) fn encoding(
    mut states: Vec<f32>,
    d_model: usize,
    tokens: EncodedTokens,
    normalize: bool,
    trace: Trace,
) -> Result<Encoding, RequestError> {
    if !states.iter().all(|value| value.is_finite()) {
        return Err(RequestError::NotANumber);
    }
    if normalize {
        states.chunks_exact_mut(d_model).for_each(normalize_row);
    }
    let EncodedTokens { prompt_tokens, truncated_tokens } = tokens;
    Ok(Encoding { rows: states.len() / d_model, states, d_model, prompt_tokens, truncated_tokens, trace })
}

/// How many tokens were encoded, and how many were left out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncodedTokens {
    pub(crate) prompt_tokens: usize,
    pub(crate) truncated_tokens: usize,
}

/// Divides a row by its Euclidean length, which is summed in double precision.
fn normalize_row(row: &mut [f32]) {
    let length = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if length >= LENGTH_MIN {
        row.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::routing_mode::RoutingMode;

    #[test]
    fn rows_are_normalized_each_by_itself() {
        // Would break: embeddings are compared by their lengths as well, or one of nothing becomes not a number.
        let encoded = |states: Vec<f32>, normalize| {
            let tokens = EncodedTokens { prompt_tokens: 3, truncated_tokens: 0 };
            encoding(states, 2, tokens, normalize, Trace::new(RoutingMode::Exact, 1, 1)).map(|encoding| encoding.states)
        };
        let states = vec![3.0, -4.0, 0.0, 0.0, 1e30, 0.0];
        assert_eq!(encoded(states.clone(), true).expect("numbers"), [0.6, -0.8, 0.0, 0.0, 1.0, 0.0]);
        assert_eq!(encoded(states.clone(), false).expect("numbers"), states);
        assert!(matches!(encoded(vec![f32::NAN, 0.0], true), Err(RequestError::NotANumber)));
    }
}
