//! Scores: ln p of the tokens of a target, from the decoder's output.

use sida_model::{Backend, ModelError};

/// Rows whose logits are held at a time; for a vocabulary of 32,000 they take 32 MiB.
const ROWS_MAX: usize = 256;

/// The sum of ln p over `target`, whose tokens follow the rows of `states` from `first_row` on.
pub(crate) fn log_likelihood<B: Backend>(
    backend: &mut B,
    states: &B::States,
    first_row: usize,
    target: &[u32],
) -> Result<f64, ModelError> {
    let vocab_size = backend.config().vocab_size;
    let mut sum = 0.0;
    for (chunk, tokens) in target.chunks(ROWS_MAX).enumerate() {
        let first = first_row + chunk * ROWS_MAX;
        let logits = backend.logits(states, &(first..first + tokens.len()).collect::<Vec<_>>())?;
        for (row, &token) in logits.chunks_exact(vocab_size).zip(tokens) {
            sum += log_softmax(row, token as usize);
        }
    }
    Ok(sum)
}

/// ln of the softmax of `logits` at `token`, summed in double precision.
fn log_softmax(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(logits[token] - max) - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_is_stable() {
        // Would break: the score of a target is infinite or NaN where logits are large.
        let expected = -(1.0 + (-1.0f64).exp() + (-3.0f64).exp()).ln();
        assert!((log_softmax(&[1000.0, 999.0, 997.0], 0) - expected).abs() < 1e-9);
        assert!(log_softmax(&[f32::NAN, 1.0], 1).is_nan());
    }
}
