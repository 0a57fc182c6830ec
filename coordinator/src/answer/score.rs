//! Scores: ln p of the tokens of a target, from the decoder's output.

use rayon::prelude::*;
use sida_model::Backend;

use crate::answer::{
    logprobs::{self, LogSoftmax},
    output::TargetScore,
    request_error::RequestError,
};

/// Rows whose logits are held at a time; for a vocabulary of 32,000 they take 32 MiB.
const ROWS_MAX: usize = 256;

/// The sum of ln p over `target`, whose tokens follow the rows of `states` from `first_row` on; and of each token how
/// likely it was, with so many most likely ones in its place, where that is asked for.
pub(crate) fn score<B: Backend>(
    backend: &mut B,
    states: &B::States,
    first_row: usize,
    target: &[u32],
    top_count: Option<usize>,
) -> Result<TargetScore, RequestError> {
    let vocab_size = backend.config().vocab_size;
    let (mut sum, mut all) = (0.0, Vec::new());
    for (chunk, tokens) in target.chunks(ROWS_MAX).enumerate() {
        let first = first_row + chunk * ROWS_MAX;
        let logits = backend.logits(states, &(first..first + tokens.len()).collect::<Vec<_>>())?;
        let rows = logits.par_chunks_exact(vocab_size).zip(tokens);
        let ln_p = |(row, &token): (&[f32], &u32)| LogSoftmax::new(row).of(row[token as usize]);
        // Added in the order of the tokens, so that the sum does not depend on the number of threads.
        sum += rows.clone().map(ln_p).collect::<Vec<f64>>().iter().sum::<f64>();
        if let Some(count) = top_count {
            let told = rows.map(|(row, &token)| logprobs::of_token(row, token, count).ok_or(RequestError::NotANumber));
            all.append(&mut told.collect::<Result<Vec<_>, _>>()?);
        }
    }
    match sum.is_nan() {
        true => Err(RequestError::NotANumber),
        false => Ok(TargetScore { log_likelihood: sum as f32, tokens: target.len(), logprobs: all }),
    }
}
