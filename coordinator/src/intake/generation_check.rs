//! The checks of what a request asks of each token: how it is chosen, and how many are told of it. A value out of its range
//! is refused by its field's name, and so is what is not a number.

use std::ops::RangeInclusive;

use sida_model::generation::{REPETITION_PENALTY_MAX, REPETITION_PENALTY_MIN};

use crate::{
    answer::{grammar::Grammar, request_error::RequestError, sampling::SamplerSettings},
    intake::accept::{refused, within},
};

/// Most likely tokens that are told with each token, as OpenAI has it.
const LOGPROBS_MAX: usize = 20;
/// Tokens that a request may bias.
const LOGIT_BIAS_TOKENS_MAX: usize = 1024;

/// Refuses settings that no logits of a model with this vocabulary can follow.
pub(crate) fn sampling(settings: &SamplerSettings, vocab_size: usize) -> Result<(), RequestError> {
    number("temperature", settings.temperature, 0.0..=100.0)?;
    number("top_p", settings.top_p, 0.0..=1.0)?;
    number("min_p", settings.min_p, 0.0..=1.0)?;
    number("repetition_penalty", settings.repetition_penalty, REPETITION_PENALTY_MIN..=REPETITION_PENALTY_MAX)?;
    number("frequency_penalty", settings.frequency_penalty, -2.0..=2.0)?;
    number("presence_penalty", settings.presence_penalty, -2.0..=2.0)?;
    within("logit_bias (its tokens)", settings.logit_bias.len(), 0, LOGIT_BIAS_TOKENS_MAX)?;
    for &(token, bias) in &*settings.logit_bias {
        number("logit_bias", bias, -100.0..=100.0)?;
        if token as usize >= vocab_size {
            return Err(refused("logit_bias", format!("for token {token}"), tokens_of(vocab_size)));
        }
    }
    Ok(())
}

/// How many most likely tokens are told with each token, if any are.
pub(crate) fn logprobs(asked: Option<usize>) -> Result<Option<usize>, RequestError> {
    asked.map(|count| within("logprobs", count, 0, LOGPROBS_MAX)).transpose()
}

/// Refuses what would go on where a grammar ends.
pub(crate) fn beside_grammar(
    grammar: Option<&Grammar>,
    tokens_min: usize,
    ignore_eos: bool,
) -> Result<(), RequestError> {
    match grammar {
        Some(_) if tokens_min > 0 => Err(refused("min_tokens", tokens_min, "0 where an answer follows a schema")),
        Some(_) if ignore_eos => Err(refused("ignore_eos", ignore_eos, "false where an answer follows a schema")),
        _ => Ok(()),
    }
}

/// What ids of a vocabulary are, for errors.
pub(crate) fn tokens_of(vocab_size: usize) -> String {
    format!("tokens from 0 to {}", vocab_size.saturating_sub(1))
}

fn number(field: &'static str, found: f32, range: RangeInclusive<f32>) -> Result<(), RequestError> {
    // What is not a number is in no range.
    if range.contains(&found) {
        return Ok(());
    }
    Err(refused(field, found, format!("{} to {}", range.start(), range.end())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The field that is refused.
    fn field(settings: SamplerSettings) -> Option<&'static str> {
        match sampling(&settings, 10) {
            Err(RequestError::Argument { field, .. }) => Some(field),
            Err(error) => panic!("{error}"),
            Ok(()) => None,
        }
    }

    #[test]
    fn each_number_has_its_range() {
        // Would break: a value out of its range reaches the logits, and the answer is noise or not a number.
        type Set = fn(&mut SamplerSettings, f32);
        let fields: [(&str, Set, f32, f32); 7] = [
            ("temperature", |settings, value| settings.temperature = value, 0.0, 100.0),
            ("top_p", |settings, value| settings.top_p = value, 0.0, 1.0),
            ("min_p", |settings, value| settings.min_p = value, 0.0, 1.0),
            ("repetition_penalty", |settings, value| settings.repetition_penalty = value, 0.01, 100.0),
            ("frequency_penalty", |settings, value| settings.frequency_penalty = value, -2.0, 2.0),
            ("presence_penalty", |settings, value| settings.presence_penalty = value, -2.0, 2.0),
            ("logit_bias", |settings, value| settings.logit_bias = [(9, value)].into(), -100.0, 100.0),
        ];
        for (name, set, min, max) in fields {
            let with = |value| {
                let mut settings = SamplerSettings::default();
                set(&mut settings, value);
                field(settings)
            };
            assert_eq!((with(min), with(max)), (None, None), "{name}");
            for absurd in [min.next_down(), max.next_up(), f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(with(absurd), Some(name), "{absurd}");
            }
        }
    }

    #[test]
    fn counts_and_tokens_are_bounded() {
        // Would break: a token beyond the vocabulary is looked up, or a request makes every step long.
        let with = |bias: Vec<(u32, f32)>| field(SamplerSettings { logit_bias: bias.into(), ..Default::default() });
        assert_eq!(with(vec![(9, 1.0)]), None);
        assert_eq!(with(vec![(10, 1.0)]), Some("logit_bias"));
        assert_eq!(with(vec![(u32::MAX, 1.0)]), Some("logit_bias"));
        assert_eq!(with(vec![(1, 1.0); 1024]), None);
        assert_eq!(with(vec![(1, 1.0); 1025]), Some("logit_bias (its tokens)"));
        assert!(matches!(
            (logprobs(None), logprobs(Some(0)), logprobs(Some(20))),
            (Ok(None), Ok(Some(0)), Ok(Some(20)))
        ));
        assert!(logprobs(Some(21)).is_err() && logprobs(Some(usize::MAX)).is_err());
    }
}
