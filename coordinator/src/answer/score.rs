//! Scores: ln p of the tokens of a target, from the decoder's output.

use sida_model::{Backend, ModelError};

use crate::answer::logprobs::LogSoftmax;

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
            sum += LogSoftmax::new(row).of(row[token as usize]);
        }
    }
    Ok(sum)
}
