//! Likelihoods from the decoder's output: ln p of the tokens of a target. Used for `Score`, by the engine.

use sida_model::{Backbone, ModelError, Tensor, tensor_rows};

use crate::request::RequestError;

/// Rows whose logits are held at a time: 32 MiB of them for a vocabulary of 32,000.
const ROWS_MAX: usize = 256;

/// The sum of ln p over `target`, whose tokens follow the rows of `h` (tokens, d_model) from `first_row` on.
pub(crate) fn log_likelihood(
    backbone: &Backbone,
    h: &Tensor,
    first_row: usize,
    target: &[u32],
) -> Result<f64, RequestError> {
    let mut sum = 0.0;
    for (chunk, tokens) in target.chunks(ROWS_MAX).enumerate() {
        let rows = h.narrow(0, first_row + chunk * ROWS_MAX, tokens.len()).map_err(ModelError::from)?;
        let logits = backbone.logits(&rows)?;
        let vocab_size = backbone.config().vocab_size;
        let add = |logits: &[f32]| {
            for (row, &token) in logits.chunks_exact(vocab_size).zip(tokens) {
                sum += log_softmax(row, token as usize);
            }
        };
        tensor_rows::rows(&logits, add).map_err(ModelError::from)?;
    }
    Ok(sum)
}

/// ln of the softmax of `logits` at `token`, summed in double precision.
fn log_softmax(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(logits[token] - max) - sum.ln()
}

/// The rows of `h` (tokens, d_model) at `wanted`, ascending; `None` if no row is wanted.
pub(crate) fn rows_of(h: &Tensor, wanted: &[usize]) -> Result<Option<Tensor>, ModelError> {
    let (rows, d_model) = h.dims2()?;
    if wanted.is_empty() || wanted.len() == rows {
        return Ok((!wanted.is_empty()).then(|| h.clone()));
    }
    let gather = |h: &[f32]| wanted.iter().flat_map(|row| &h[row * d_model..][..d_model]).copied().collect();
    Ok(Some(tensor_rows::from_rows(tensor_rows::rows(h, gather)?, d_model)?))
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

    #[test]
    fn rows_are_the_wanted_ones() {
        // Would break: a sequence is continued from another one's logits.
        let h = tensor_rows::from_rows((0..8).map(|v| v as f32).collect(), 2).expect("tensor");
        let rows = rows_of(&h, &[1, 3]).expect("rows").expect("some");
        assert_eq!(rows.to_vec2::<f32>().expect("values"), [[2.0, 3.0], [6.0, 7.0]]);
        assert!(rows_of(&h, &[]).expect("rows").is_none());
    }
}
