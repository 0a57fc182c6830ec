//! Log-probabilities: ln of the softmax of logits as the model gave them, before penalties, bias, temperature and cut-offs,
//! which is vLLM's default, too.

use crate::answer::output::{TokenLogprob, TokenLogprobs};

/// ln of the sum of exp over logits, in double precision and from their largest on, so that no logit is too large for it.
pub(crate) struct LogSoftmax {
    max: f32,
    ln_sum: f64,
}

impl LogSoftmax {
    /// Of one row of logits.
    pub(crate) fn new(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        Self { max, ln_sum: sum.ln() }
    }

    /// ln p of the token that has this logit.
    pub(crate) fn of(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) - self.ln_sum
    }
}

/// The log-probabilities of one row of logits, which may be changed afterwards.
pub(crate) struct Logprobs {
    logits: Vec<f32>,
    softmax: LogSoftmax,
    top: Vec<TokenLogprob>,
}

impl Logprobs {
    /// With those of the `top_count` most likely tokens.
    pub(crate) fn new(logits: &[f32], top_count: usize) -> Self {
        let softmax = LogSoftmax::new(logits);
        Self { logits: logits.to_vec(), top: top(&softmax, logits, top_count), softmax }
    }

    /// What is told with a token that was chosen. None where the model's output is not a number.
    pub(crate) fn of(&self, token: u32) -> Option<TokenLogprobs> {
        told(&self.softmax, *self.logits.get(token as usize)?, &self.top)
    }
}

/// What is told with a token that was there already, by the logits in its place. None where they are not a number.
pub(crate) fn of_token(logits: &[f32], token: u32, top_count: usize) -> Option<TokenLogprobs> {
    let softmax = LogSoftmax::new(logits);
    told(&softmax, *logits.get(token as usize)?, &top(&softmax, logits, top_count))
}

fn told(softmax: &LogSoftmax, logit: f32, top: &[TokenLogprob]) -> Option<TokenLogprobs> {
    let logprob = softmax.of(logit) as f32;
    (!logprob.is_nan()).then(|| TokenLogprobs { logprob, top: top.to_vec() })
}

fn top(softmax: &LogSoftmax, logits: &[f32], count: usize) -> Vec<TokenLogprob> {
    let logprob = |id: u32| TokenLogprob { id, logprob: softmax.of(logits[id as usize]) as f32 };
    most_likely(logits, count).into_iter().map(logprob).collect()
}

/// The tokens with the largest logits, the largest first, of equal ones the lower id first. Only what is finite counts.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    let mut best: Vec<u32> = Vec::with_capacity(count + 1);
    let logit_of = |token: u32| logits[token as usize];
    for (token, &logit) in (0..).zip(logits).filter(|(_, logit)| logit.is_finite()) {
        if best.len() == count && best.last().is_none_or(|&last| logit <= logit_of(last)) {
            continue;
        }
        best.insert(best.partition_point(|&kept| logit_of(kept) >= logit), token);
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_is_stable() {
        // Would break: a log-probability is infinite or NaN where logits are large, or where one is not a number is not.
        let expected = -(1.0 + (-1.0f64).exp() + (-3.0f64).exp()).ln();
        assert!((LogSoftmax::new(&[1000.0, 999.0, 997.0]).of(1000.0) - expected).abs() < 1e-9);
        assert!(LogSoftmax::new(&[f32::NAN, 1.0]).of(1.0).is_nan());
    }

    #[test]
    fn the_most_likely_come_first() {
        // Would break: alternatives of a token are shown in another order, with another's probability, or one too many.
        let probabilities = [0.1f32, 0.5, 0.15, 0.05, 0.2];
        let logits = probabilities.map(|p| p.ln() + 7.0);
        for count in 0..=6 {
            let found = Logprobs::new(&logits, count).of(3).expect("a number");
            assert_eq!(of_token(&logits, 3, count).as_ref(), Some(&found), "a token that was there is told of alike");
            let top: Vec<u32> = found.top.iter().map(|entry| entry.id).collect();
            assert_eq!(top, [1, 4, 2, 0, 3][..count.min(5)]);
            assert!((found.logprob - 0.05f32.ln()).abs() < 1e-6, "{}", found.logprob);
            for TokenLogprob { id, logprob } in found.top {
                assert!((logprob - probabilities[id as usize].ln()).abs() < 1e-6, "{id}: {logprob}");
            }
        }
        assert_eq!(most_likely(&[1.0, 3.0, 3.0, f32::NAN, 1.0, f32::NEG_INFINITY], 3), [1, 2, 0]);
        assert!(Logprobs::new(&[f32::NAN, 1.0], 2).of(1).is_none());
        assert!(of_token(&[f32::NAN, 1.0], 1, 2).is_none());
    }
}
