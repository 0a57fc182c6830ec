//! What a request adds to logits and takes off them before a token is chosen: its bias, and the penalties on tokens that
//! are there already. Most requests ask for none, and their logits are left as they are.

use std::collections::BTreeMap;

use sida_model::generation::penalize_repetition;

use crate::answer::sampling::SamplerSettings;

/// The adjustments of one sequence.
pub(crate) struct Adjustments {
    /// How often each token was generated: 0 for those that the decoder had before.
    seen: BTreeMap<u32, u32>,
}

impl Adjustments {
    /// Of a sequence that goes on from these tokens of the decoder. None where nothing is asked for.
    pub(crate) fn new(settings: &SamplerSettings, decoder_tokens: &[u32]) -> Option<Self> {
        let counts_all = settings.repetition_penalty != 1.0;
        let counts_generated = settings.frequency_penalty != 0.0 || settings.presence_penalty != 0.0;
        if !counts_all && !counts_generated && settings.logit_bias.is_empty() {
            return None;
        }
        let seen = if counts_all { decoder_tokens.iter().map(|&token| (token, 0)).collect() } else { BTreeMap::new() };
        Some(Self { seen })
    }

    /// Changes logits as the settings say: (vocab_size).
    pub(crate) fn apply(&self, settings: &SamplerSettings, logits: &mut [f32]) {
        for &(token, bias) in &*settings.logit_bias {
            logits[token as usize] += bias;
        }
        penalize_repetition(logits, self.seen.keys().copied(), settings.repetition_penalty);
        for (&token, &count) in self.seen.iter().filter(|&(_, &count)| count > 0) {
            logits[token as usize] -= count as f32 * settings.frequency_penalty + settings.presence_penalty;
        }
    }

    /// A token was generated.
    pub(crate) fn note(&mut self, token: u32) {
        *self.seen.entry(token).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The logits [4, -4, 1, 0, 2] after a decoder that had tokens 0 and 3 has generated 1, 1 and 4.
    fn adjusted(settings: SamplerSettings) -> Option<[f32; 5]> {
        let mut adjustments = Adjustments::new(&settings, &[0, 3])?;
        [1, 1, 4].into_iter().for_each(|token| adjustments.note(token));
        let mut logits = [4.0, -4.0, 1.0, 0.0, 2.0];
        adjustments.apply(&settings, &mut logits);
        Some(logits)
    }

    #[test]
    fn each_adjustment_is_what_it_says() {
        // Would break: a penalty counts tokens that it should not, or has another size than other servers give it.
        let plain = SamplerSettings::default;
        assert_eq!(adjusted(plain()), None, "nothing is asked for");
        let frequency = SamplerSettings { frequency_penalty: 0.5, ..plain() };
        assert_eq!(adjusted(frequency), Some([4.0, -5.0, 1.0, 0.0, 1.5]));
        let presence = SamplerSettings { presence_penalty: -1.5, ..plain() };
        assert_eq!(adjusted(presence), Some([4.0, -2.5, 1.0, 0.0, 3.5]));
        let repetition = SamplerSettings { repetition_penalty: 2.0, ..plain() };
        assert_eq!(adjusted(repetition), Some([2.0, -8.0, 1.0, 0.0, 1.0]));
        let bias = SamplerSettings { logit_bias: [(2, 100.0), (3, -0.25)].into(), ..plain() };
        assert_eq!(adjusted(bias), Some([4.0, -4.0, 101.0, -0.25, 2.0]));
    }

    #[test]
    fn the_bias_is_penalized_too() {
        // Would break: adjustments come in another order than in transformers and vLLM: together they give other tokens.
        let settings = SamplerSettings {
            logit_bias: [(0, 2.0), (1, 6.0)].into(),
            repetition_penalty: 2.0,
            frequency_penalty: 0.25,
            presence_penalty: 1.0,
            ..SamplerSettings::default()
        };
        // (4 + 2) / 2; (-4 + 6) / 2 - 2 * 0.25 - 1; 1; 0 / 2; 2 / 2 - 0.25 - 1.
        assert_eq!(adjusted(settings), Some([3.0, -0.5, 1.0, 0.0, -0.25]));
    }
}
