//! What a model's files say of how it writes: the tokens that begin and end an answer, those that it must or must not
//! write, how long it is and how it is drawn where a request does not say. This is what transformers' `generate()` reads:
//! generation_config.json, or the same fields of config.json where there is no such file. Read by [`ModelConfig`].
//!
//! In reading order: `fields` (typed fields, with errors that name them), `ignored` (fields that change answers there and
//! are not served here), `token_rule` (what the next token of an answer may be), `repetition` (the penalty on what was
//! written).

mod fields;
mod ignored;
mod repetition;
mod token_rule;

use std::{collections::BTreeSet, path::Path};

use serde_json::{Map, Value};

pub(crate) use self::fields::Fields;
pub use self::{
    repetition::{REPETITION_PENALTY_MAX, REPETITION_PENALTY_MIN, penalize_repetition},
    token_rule::TokenRule,
};
use crate::{ModelConfig, ModelError};

/// The file's name in a model directory.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
/// transformers' own `max_length`, which says nothing of a model.
const MAX_LENGTH_UNSAID: usize = 20;
/// transformers' own `top_k` where tokens are drawn.
const TOP_K_UNSAID: usize = 50;
/// More tokens than any answer has.
const TOKENS_MAX: u64 = 1 << 31;

/// How a model writes, checked: every token is one of its vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// What a decoder starts from.
    pub decoder_start_token_id: u32,
    /// Any of these ends an answer. Invariant: ascending, not empty.
    pub eos_token_ids: Vec<u32>,
    /// Never written. Invariant: ascending, as the next.
    pub suppress_tokens: Vec<u32>,
    /// Not written first; after a forced first token, not second.
    pub begin_suppress_tokens: Vec<u32>,
    /// Written first.
    pub forced_bos_token_id: Option<u32>,
    /// One of these is written last in an answer that is as long as it may be. Invariant: ascending.
    pub forced_eos_token_ids: Vec<u32>,
    /// No end of sequence before so many tokens, where a request does not say.
    pub tokens_min: usize,
    /// Tokens at most, where a request does not say.
    pub tokens_max: Option<usize>,
    /// How tokens are drawn, where a request does not say.
    pub sampling: DefaultSampling,
    /// What the file asks for and is not served, such as `num_beams is 4`: answers differ from transformers' there.
    pub ignored: Vec<String>,
}

/// How tokens are drawn where a request does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DefaultSampling {
    /// 0: the most likely token, always.
    pub temperature: f32,
    /// Draw among so many most likely tokens; 0: among all.
    pub top_k: usize,
    /// Draw among the most likely tokens that together reach this probability; 0 or 1: among all.
    pub top_p: f32,
    /// Leave out tokens that are less than so many times as likely as the likeliest; 0: none.
    pub min_p: f32,
    /// How much less likely tokens become that the decoder has already; 1: not at all.
    pub repetition_penalty: f32,
}

impl Default for DefaultSampling {
    /// Greedy, and no token less likely for having been written.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 0.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl GenerationConfig {
    /// A model that starts and ends answers with these tokens and says nothing else.
    pub fn plain(decoder_start_token_id: u32, eos_token_ids: Vec<u32>) -> Self {
        Self {
            decoder_start_token_id,
            eos_token_ids,
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            forced_bos_token_id: None,
            forced_eos_token_ids: Vec::new(),
            tokens_min: 0,
            tokens_max: None,
            sampling: DefaultSampling::default(),
            ignored: Vec::new(),
        }
    }

    /// Reads the fields of a config.json or generation_config.json at `path`. Start and end are those that `model` has
    /// where the file does not name them.
    ///
    /// Where a decoder reads the prompt, transformers counts it in `min_length` and `max_length`, and forces a first token
    /// only behind a prompt of one: these three are not followed there.
    pub(crate) fn read(json: &Map<String, Value>, path: &Path, model: &ModelConfig) -> Result<Self, ModelError> {
        let (base, has_encoder) = (&model.generation, model.has_encoder());
        let fields = Fields { json, path, vocab_size: model.vocab_size };
        let start = match fields.token("decoder_start_token_id")? {
            Some(start) => Some(start),
            None => fields.token("bos_token_id")?,
        };
        // Nothing is padded here, but a file that names no token is wrong.
        fields.token("pad_token_id")?;
        let eos_token_ids = fields.tokens("eos_token_id")?;
        // Both lengths count the start token, which is not part of an answer.
        let min_length = fields.count("min_length", 0, TOKENS_MAX)?.map(|length| length.saturating_sub(1));
        let max_length = fields.count("max_length", 2, TOKENS_MAX)?.filter(|&length| length != MAX_LENGTH_UNSAID);
        let max_length = max_length.map(|length| length - 1);
        let forced_bos_token_id = fields.token("forced_bos_token_id")?;
        let mut ignored = ignored::ignored(json, path.ends_with(GENERATION_CONFIG));
        if !has_encoder {
            let counted = [("min_length", min_length.filter(|&length| length > 0)), ("max_length", max_length)];
            let counted = counted.into_iter().filter_map(|(field, length)| Some(format!("{field} is {}", length? + 1)));
            ignored.extend(counted);
            ignored.extend(forced_bos_token_id.map(|token| format!("forced_bos_token_id is {token}")));
        }
        let config = Self {
            decoder_start_token_id: start.unwrap_or(base.decoder_start_token_id),
            eos_token_ids: if eos_token_ids.is_empty() { base.eos_token_ids.clone() } else { eos_token_ids },
            suppress_tokens: fields.tokens("suppress_tokens")?,
            begin_suppress_tokens: fields.tokens("begin_suppress_tokens")?,
            forced_bos_token_id: forced_bos_token_id.filter(|_| has_encoder),
            forced_eos_token_ids: fields.tokens("forced_eos_token_id")?,
            tokens_min: fields
                .count("min_new_tokens", 0, TOKENS_MAX)?
                .or(min_length.filter(|_| has_encoder))
                .unwrap_or(0),
            tokens_max: fields.count("max_new_tokens", 1, TOKENS_MAX)?.or(max_length.filter(|_| has_encoder)),
            sampling: DefaultSampling::read(&fields)?,
            ignored,
        };
        config.check(&fields)?;
        Ok(config)
    }

    /// Refuses a config by which some answer could not go on.
    fn check(&self, fields: &Fields<'_>) -> Result<(), ModelError> {
        let is_suppressed = |token: &u32| self.suppress_tokens.binary_search(token).is_ok();
        let expected = "a token that suppress_tokens does not name";
        if let Some(forced) = self.forced_bos_token_id.filter(is_suppressed) {
            return Err(fields.refuse("forced_bos_token_id", forced, expected));
        }
        if let Some(&forced) = self.forced_eos_token_ids.iter().find(|token| is_suppressed(token)) {
            return Err(fields.refuse("forced_eos_token_id", forced, expected));
        }
        let lists = [&self.suppress_tokens, &self.begin_suppress_tokens, &self.eos_token_ids];
        let banned: BTreeSet<u32> = lists.into_iter().flatten().copied().collect();
        if banned.len() == fields.vocab_size {
            return Err(fields.refuse("suppress_tokens", "every token", "to leave one that can begin an answer"));
        }
        Ok(())
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.eos_token_ids.binary_search(&token).is_ok()
    }
}

impl DefaultSampling {
    /// Only `do_sample` has tokens drawn; the other fields say how, also for a request that asks for it. The penalty on
    /// repetition counts for greedy answers, too.
    fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        let is_drawn = fields.flag("do_sample")?.unwrap_or(false);
        let temperature = fields.number("temperature", 0.0, 100.0)?.unwrap_or(1.0);
        let top_k = fields.count("top_k", 0, TOKENS_MAX)?;
        Ok(Self {
            temperature: if is_drawn { temperature } else { 0.0 },
            top_k: top_k.unwrap_or(if is_drawn { TOP_K_UNSAID } else { 0 }),
            top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(0.0),
            min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
            repetition_penalty: fields
                .number("repetition_penalty", REPETITION_PENALTY_MIN.into(), REPETITION_PENALTY_MAX.into())?
                .unwrap_or(1.0),
        })
    }
}
