//! How the next token is to be chosen: as a request asks for it, and with what the model says where the request does not.
//! `sampler` obeys.

use std::{collections::BTreeMap, sync::Arc};

use sida_model::generation::DefaultSampling;

/// How the next token is to be chosen, as a request asks for it. What it does not say is as the model's generation config
/// says, which for most models is greedy.
///
/// In this order, as transformers and vLLM have it: `logit_bias`, `repetition_penalty`, `frequency_penalty` and
/// `presence_penalty` change the logits, for greedy answers, too. Then tokens that cannot be next are ruled out. What is
/// drawn is divided by `temperature` and cut by `top_k`, `top_p` and `min_p`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token, always. Otherwise divides the logits; at most 100.
    pub temperature: Option<f32>,
    /// Draw among so many most likely tokens; 0: among all.
    pub top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability; 0 or 1: among all.
    pub top_p: Option<f32>,
    /// Draw among the tokens that are at least so many times as likely as the likeliest, 0 to 1; 0: among all.
    pub min_p: Option<f32>,
    /// Makes tokens less likely that the decoder has already, of a decoder-only model those of the prompt, too: positive
    /// logits are divided by it, negative ones multiplied. 0.01 to 100; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// Taken off a token's logit for each time that it was generated; -2 to 2.
    pub frequency_penalty: f32,
    /// Taken off a token's logit if it was generated at all; -2 to 2.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens; -100 to 100 for at most 1,024 tokens of the vocabulary.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Makes the draws repeat; drawn itself when missing. Of several choices, number i draws as a request alone would with
    /// a seed that is i higher.
    pub seed: Option<u64>,
}

/// The same, with what the model says. Checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SamplerSettings {
    pub(crate) temperature: f32,
    pub(crate) top_k: usize,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) repetition_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    /// Each token once. Shared by the choices of a request.
    pub(crate) logit_bias: Arc<[(u32, f32)]>,
    pub(crate) seed: Option<u64>,
}

impl Sampling {
    /// What is asked for, by a model with these defaults.
    pub(crate) fn settings(&self, default: DefaultSampling) -> SamplerSettings {
        SamplerSettings {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias.iter().map(|(&token, &bias)| (token, bias)).collect(),
            seed: self.seed,
        }
    }
}

impl SamplerSettings {
    /// Those of one of several choices: its draws are its own.
    pub(crate) fn of_choice(&self, choice: usize) -> Self {
        Self { seed: self.seed.map(|seed| seed.wrapping_add(choice as u64)), ..self.clone() }
    }
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Sampling::default().settings(DefaultSampling::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_does_not_say_is_the_models() {
        // Would break: a model that is to be drawn from answers greedily, or overrules who asks.
        let model = DefaultSampling { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.1, repetition_penalty: 1.2 };
        let settings = |sampling: Sampling| sampling.settings(model);
        let all = settings(Sampling::default());
        let expected = SamplerSettings {
            temperature: 0.7,
            top_k: 50,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.2,
            ..SamplerSettings::default()
        };
        assert_eq!(all, expected);
        let greedy = settings(Sampling { temperature: Some(0.0), seed: Some(3), ..Sampling::default() });
        assert_eq!(greedy, SamplerSettings { temperature: 0.0, seed: Some(3), ..all.clone() });
        let wide = settings(Sampling { top_k: Some(0), top_p: Some(1.0), ..Sampling::default() });
        assert_eq!(wide, SamplerSettings { top_k: 0, top_p: 1.0, ..all.clone() });
        let free = settings(Sampling { min_p: Some(0.0), repetition_penalty: Some(1.0), ..Sampling::default() });
        assert_eq!(free, SamplerSettings { min_p: 0.0, repetition_penalty: 1.0, ..all });
    }

    #[test]
    fn choices_have_seeds_of_their_own() {
        // Would break: all choices of a seeded request are the same text, or cannot be had again by themselves.
        let seed = |seed, choice| SamplerSettings { seed, ..SamplerSettings::default() }.of_choice(choice).seed;
        assert_eq!([seed(Some(7), 0), seed(Some(7), 2), seed(Some(u64::MAX), 1)], [Some(7), Some(9), Some(0)]);
        assert_eq!(seed(None, 3), None);
    }
}
