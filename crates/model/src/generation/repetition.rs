//! The penalty on tokens that a text has already: transformers' `repetition_penalty`. The reference and the coordinator
//! lower logits by the same rule.

/// The least and the most that such a penalty may be: beyond them logits leave the range of their numbers.
pub const REPETITION_PENALTY_MIN: f32 = 0.01;
/// See [`REPETITION_PENALTY_MIN`].
pub const REPETITION_PENALTY_MAX: f32 = 100.0;

/// Makes the logits of `tokens`, each named once, less likely by a `penalty` above 1, and more likely by one below: what is
/// positive is divided by it, what is negative multiplied. 1 changes nothing. `logits`: (vocab_size).
pub fn penalize_repetition(logits: &mut [f32], tokens: impl IntoIterator<Item = u32>, penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    for token in tokens {
        let logit = &mut logits[token as usize];
        *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token that is unlikely already would become likelier by having been written.
    #[test]
    fn what_was_written_becomes_less_likely() {
        let penalized = |penalty| {
            let mut logits = [3.0, -3.0, 0.0, 4.0, f32::NEG_INFINITY];
            penalize_repetition(&mut logits, [0, 1, 2, 4], penalty);
            logits
        };
        assert_eq!(penalized(2.0), [1.5, -6.0, 0.0, 4.0, f32::NEG_INFINITY]);
        assert_eq!(penalized(0.5), [6.0, -1.5, 0.0, 4.0, f32::NEG_INFINITY]);
        assert_eq!(penalized(1.0), [3.0, -3.0, 0.0, 4.0, f32::NEG_INFINITY]);
    }
}
