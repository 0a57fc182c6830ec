//! A text as it is generated: one answer or several choices, which go on step by step together until each has ended. Each
//! choice draws its tokens and has a text by itself; what is asked for, and how far the answer is, they share.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;
use rayon::prelude::*;
use sida_model::{GenerationConfig, ModelConfig, TokenRule, Tokenizer};

use crate::{
    answer::{
        answer_text::AnswerText,
        grammar::{Grammar, GrammarPlace},
        logprobs::Logprobs,
        output::{FinishReason, TokenLogprobs},
        request_error::RequestError,
        sampler::Sampler,
    },
    intake::request::GenerateOptions,
};

/// From so many sequences on, or choices of one, their next tokens are chosen from logits, or made text of, by several
/// threads.
pub(crate) const PARALLEL_MIN: usize = 16;

/// What is generated for one request.
pub(crate) struct Generation {
    pub(crate) options: GenerateOptions,
    /// The choices that go on, in order.
    pub(crate) choices: Vec<Choice>,
    /// Tokens that each of them has.
    pub(crate) generated: usize,
    pub(crate) first_token_at: Option<Instant>,
    /// Tokens of the choices that have ended, and why each has.
    pub(crate) ended_tokens: usize,
    pub(crate) ended: Vec<FinishReason>,
}

/// One of the answers.
pub(crate) struct Choice {
    /// Its number among all that were asked for.
    pub(crate) index: usize,
    sampler: Sampler,
    grammar: Option<GrammarPlace>,
    pub(crate) text: Arc<Mutex<AnswerText>>,
}

/// What a decode step says of the next tokens.
#[derive(Debug)]
pub(crate) enum NextTokens<'s> {
    /// The token that the device chose for each branch, as [`Generation::best_but`] says; none if no logit is a number.
    Chosen(Vec<Option<u32>>),
    /// The logits to choose from: (branches, vocab_size).
    Logits(&'s mut [f32]),
}

/// The next token of a choice.
pub(crate) struct Chosen {
    pub(crate) id: u32,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// The text it adds; empty where that is made elsewhere.
    pub(crate) text: String,
    /// Why it is the choice's last, if it is.
    pub(crate) reason: Option<FinishReason>,
}

/// What tokens are chosen and written by.
#[derive(Clone, Copy)]
pub(crate) struct Writing<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) tokenizer: &'a Tokenizer,
    /// Whether texts are made by another thread.
    pub(crate) is_beside: bool,
}

impl Generation {
    /// All choices before their first token, behind these tokens of the decoder.
    pub(crate) fn new(options: &GenerateOptions, decoder_tokens: &[u32]) -> Self {
        let choice = |index| Choice {
            index,
            sampler: Sampler::new(options.sampling.of_choice(index), decoder_tokens),
            grammar: options.grammar.as_ref().map(Grammar::begin),
            text: Arc::new(Mutex::new(AnswerText::new(options.stop.clone()))),
        };
        Self {
            options: options.clone(),
            choices: (0..options.choices.max(1)).map(choice).collect(),
            generated: 0,
            first_token_at: None,
            ended_tokens: 0,
            ended: Vec::new(),
        }
    }

    /// What the next token may be.
    fn rule<'a>(&self, model: &'a GenerationConfig) -> TokenRule<'a> {
        model.token_rule(self.generated, self.options.tokens_min, self.options.tokens_max)
    }

    /// Whether the next token of each choice is the most likely one but for at most one, and which that is: then a device can
    /// choose it. `None`: it is chosen from the logits.
    pub(crate) fn best_but(&self, model: &GenerationConfig) -> Option<Option<u32>> {
        let is_free = self.options.logprobs.is_none() && self.options.grammar.is_none();
        let is_best = is_free && self.choices.first()?.sampler.is_greedy();
        if is_best { self.rule(model).banned() } else { None }
    }

    /// Takes or chooses the next token of each choice. In the first step one branch decides for all of them.
    pub(crate) fn advance(&mut self, next: NextTokens<'_>, writing: Writing<'_>) -> Result<Vec<Chosen>, RequestError> {
        let step = Step {
            rule: self.rule(&writing.config.generation),
            options: &self.options,
            generated: self.generated + 1,
            writing,
        };
        let choices = self.choices.iter_mut();
        let vocab_size = writing.config.vocab_size;
        let chosen: Result<Vec<Chosen>, RequestError> = match next {
            NextTokens::Chosen(tokens) => {
                let tokens = tokens.iter().copied().cycle();
                choices.zip(tokens).map(|(choice, token)| step.settle(choice, token, None)).collect()
            }
            // Before the first token the same is asked of all choices, so that they share what becomes of the logits.
            NextTokens::Logits(row) if row.len() == vocab_size => {
                let logprobs = step.adjust(self.choices.first_mut(), row)?;
                let draw = |choice: &mut Choice| step.draw(choice, row, logprobs.as_ref());
                each(self.choices.iter_mut().collect(), draw).into_iter().collect()
            }
            NextTokens::Logits(logits) => {
                let draw = |(choice, row): (&mut Choice, &mut [f32])| {
                    let logprobs = step.adjust(Some(choice), row)?;
                    step.draw(choice, row, logprobs.as_ref())
                };
                each(choices.zip(logits.chunks_exact_mut(vocab_size)).collect(), draw).into_iter().collect()
            }
        };
        self.generated += 1;
        chosen
    }
}

/// How the next token of each choice is made.
struct Step<'a> {
    rule: TokenRule<'a>,
    options: &'a GenerateOptions,
    /// Tokens of each choice with it.
    generated: usize,
    writing: Writing<'a>,
}

impl Step<'_> {
    /// Makes of a row of logits what the tokens of this choice, and of all that are at the same place, are drawn from; gives
    /// back the log-probabilities that it had before, if they are asked for.
    fn adjust(&self, choice: Option<&mut Choice>, row: &mut [f32]) -> Result<Option<Logprobs>, RequestError> {
        let logprobs = self.options.logprobs.map(|top_count| Logprobs::new(row, top_count));
        let Some(choice) = choice else { return Ok(logprobs) };
        choice.sampler.adjust(row);
        match &mut choice.grammar {
            // It says all that a token may be: one that the model's rule forces may be none of them.
            Some(grammar) => grammar.apply(row)?,
            None => self.rule.apply(row),
        }
        Ok(logprobs)
    }

    fn draw(&self, choice: &mut Choice, row: &[f32], logprobs: Option<&Logprobs>) -> Result<Chosen, RequestError> {
        let token = choice.sampler.next(row);
        if let (Some(grammar), Some(token)) = (&mut choice.grammar, token) {
            grammar.note(token)?;
        }
        self.settle(choice, token, logprobs)
    }

    /// Writes the token that was chosen, if there is one.
    fn settle(
        &self,
        choice: &mut Choice,
        token: Option<u32>,
        logprobs: Option<&Logprobs>,
    ) -> Result<Chosen, RequestError> {
        let Writing { config, tokenizer, is_beside } = self.writing;
        let id = token.ok_or(RequestError::NotANumber)?;
        let logprobs = logprobs.map(|logprobs| logprobs.of(id).ok_or(RequestError::NotANumber)).transpose()?;
        let last = self.ends_with(id, &config.generation);
        let (text, reason) = match is_beside {
            true => (String::new(), last),
            false => choice.text.lock().add(id, last, self.generated >= self.options.tokens_min, tokenizer)?,
        };
        Ok(Chosen { id, logprobs, text, reason })
    }

    /// Why the answer ends with this token, if it does, whatever its text is.
    fn ends_with(&self, id: u32, model: &GenerationConfig) -> Option<FinishReason> {
        if model.is_end(id) && !self.options.ignore_eos {
            Some(FinishReason::End)
        } else {
            (self.generated >= self.options.tokens_max).then_some(FinishReason::Length)
        }
    }
}

/// Does the same with each item, in order, or on several threads where there are many.
fn each<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Send + Sync) -> Vec<R> {
    match items.len() >= PARALLEL_MIN {
        true => items.into_par_iter().with_min_len(PARALLEL_MIN / 4).map(work).collect(),
        false => items.into_iter().map(work).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::sampling::SamplerSettings;

    #[test]
    fn a_device_chooses_only_where_one_token_is_banned() {
        // Would break: a GPU's greedy choice is a token that is never to be written.
        let generation = |tokens_min, temperature| {
            let sampling = SamplerSettings { temperature, ..SamplerSettings::default() };
            let options = GenerateOptions { tokens_max: 9, tokens_min, sampling, ..GenerateOptions::default() };
            Generation::new(&options, &[0])
        };
        let one_end = GenerationConfig::plain(0, vec![1]);
        let two_ends = GenerationConfig::plain(0, vec![1, 5]);
        assert_eq!(generation(0, 0.0).best_but(&one_end), Some(None));
        assert_eq!(generation(2, 0.0).best_but(&one_end), Some(Some(1)));
        assert_eq!(generation(0, 0.5).best_but(&one_end), None, "it is drawn");
        assert_eq!(generation(0, 0.0).best_but(&two_ends), Some(None));
        assert_eq!(generation(2, 0.0).best_but(&two_ends), None);
        let suppressed = GenerationConfig { suppress_tokens: vec![7], ..one_end.clone() };
        assert_eq!(generation(0, 0.0).best_but(&suppressed), Some(Some(7)));
        assert_eq!(generation(2, 0.0).best_but(&suppressed), None);
        let forced = GenerationConfig { forced_bos_token_id: Some(3), ..one_end };
        assert_eq!(generation(0, 0.0).best_but(&forced), None);
    }

    #[test]
    fn a_device_does_not_choose_what_needs_logits() {
        // Would break: on a GPU penalties, a bias or log-probabilities of a greedy answer are left out.
        let model = GenerationConfig::plain(0, vec![1]);
        let best = |sampling: SamplerSettings, logprobs| {
            let options = GenerateOptions { tokens_max: 9, sampling, logprobs, ..GenerateOptions::default() };
            Generation::new(&options, &[0]).best_but(&model)
        };
        let plain = SamplerSettings::default;
        assert_eq!(best(plain(), None), Some(None));
        assert_eq!(best(plain(), Some(0)), None);
        assert_eq!(best(SamplerSettings { repetition_penalty: 1.1, ..plain() }, None), None);
        assert_eq!(best(SamplerSettings { frequency_penalty: 0.1, ..plain() }, None), None);
        assert_eq!(best(SamplerSettings { presence_penalty: -0.1, ..plain() }, None), None);
        assert_eq!(best(SamplerSettings { logit_bias: [(3, 1.0)].into(), ..plain() }, None), None);
    }
}
