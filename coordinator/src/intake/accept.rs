//! What callers ask for, and the checks that make a request of it: the one place where limits on requests are enforced,
//! whether they came by gRPC or from this process.

use std::time::Instant;

use sida_model::{CacheSize, ModelConfig, ModelError, Tokenizer};
use sida_routing::admission::Limits;
use sida_rpc::Client;
use sida_telemetry::{TraceContext, counted};

use crate::{
    answer::{
        grammar::{Grammar, ToolCalls},
        output::Pooling,
        request_error::{RequestError, TextOf},
        routing_mode::RoutingMode,
        sampling::Sampling,
    },
    config::RequestLimits,
    intake::{
        generation_check,
        prompt::{self, Prompt, PromptTokens},
        request::{EncodeOptions, GenerateOptions, Work},
    },
    measures::door::Door,
};

/// A request for encoder states.
#[derive(Clone, Debug, Default)]
pub struct EncodeParams {
    /// What is encoded.
    pub prompt: Prompt,
    /// Who chooses the experts of its tokens.
    pub routing: RoutingMode,
    /// Which rows of encoder states come back.
    pub pooling: Pooling,
    /// Cuts a prompt of too many tokens instead of refusing it. A text of too many bytes is refused all the same.
    pub truncate: bool,
    /// Divides a pooled row by its length.
    pub normalize: bool,
    /// Until when the answer is of use.
    pub deadline: Option<Instant>,
    /// The trace that the request is part of; `None` begins one.
    pub trace: Option<TraceContext>,
    /// Who asks, as far as that is known: those who ask much take turns with the others.
    pub client: Option<Client>,
    /// The lower, the sooner it is its turn among those of the same client; 0 is as good as any.
    pub priority: i32,
}

/// A request for the likelihood of targets.
#[derive(Clone, Debug, Default)]
pub struct ScoreParams {
    /// What comes before each target.
    pub prompt: Prompt,
    /// The candidates; at least one, none empty.
    pub targets: Vec<String>,
    /// Who chooses the experts of its tokens.
    pub routing: RoutingMode,
    /// Until when the answer is of use.
    pub deadline: Option<Instant>,
    /// The trace that the request is part of; `None` begins one.
    pub trace: Option<TraceContext>,
    /// Who asks, as far as that is known: those who ask much take turns with the others.
    pub client: Option<Client>,
    /// The lower, the sooner it is its turn among those of the same client; 0 is as good as any.
    pub priority: i32,
}

/// A request to generate text.
#[derive(Clone, Debug, Default)]
pub struct GenerateParams {
    /// What is answered.
    pub prompt: Prompt,
    /// Who chooses the experts of its tokens.
    pub routing: RoutingMode,
    /// How many answers are drawn, which share the prompt's pass; 0 is 1.
    pub choices: usize,
    /// Tells of each token how likely it was, and of so many most likely ones in its place, 0 to 20. `None`: nothing.
    pub logprobs: Option<usize>,
    /// Tokens of each choice at most; 0 for the model's default or, if it has none, the server's.
    pub max_tokens: usize,
    /// No end before so many tokens: neither of the sequence nor by a stop text, which ends the answer where it is complete.
    /// `None` for the model's default, mostly 0.
    pub min_tokens: Option<usize>,
    /// Goes on after an end of sequence, to measure generation.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The answer is JSON that follows this JSON Schema, unless it ends at `max_tokens`. What a text may be begins and ends
    /// with it: `min_tokens` and `ignore_eos` are refused beside it.
    pub json_schema: Option<String>,
    /// The answer calls tools, as models do that write calls between `<tool_call>` and `</tool_call>`; not beside a schema.
    pub tool_calls: Option<ToolCalls>,
    /// The answer ends before one of these.
    pub stop: Vec<String>,
    /// By which door it came.
    pub door: Door,
    /// Until when the answer is of use.
    pub deadline: Option<Instant>,
    /// The trace that the request is part of; `None` begins one.
    pub trace: Option<TraceContext>,
    /// Who asks, as far as that is known: those who ask much take turns with the others.
    pub client: Option<Client>,
    /// The lower, the sooner it is its turn among those of the same client; 0 is as good as any.
    pub priority: i32,
}

/// The limits that requests are held to, and the tokenizer that measures them.
pub(crate) struct Acceptance<'a> {
    pub(crate) limits: &'a RequestLimits,
    pub(crate) batch: &'a Limits,
    pub(crate) cache_size: CacheSize,
    pub(crate) tokenizer: &'a Tokenizer,
    /// The model, with what it does where a request does not say.
    pub(crate) model: &'a ModelConfig,
}

impl Acceptance<'_> {
    /// The tokens of a prompt, of an encoder's text its end of sequence included. Too many are refused, or cut where it
    /// `truncates`. A decoder that reads it itself has room for so many more tokens `behind` it.
    pub(crate) fn prompt(&self, prompt: Prompt, truncates: bool, behind: usize) -> Result<PromptTokens, RequestError> {
        let (ids, of) = match prompt {
            // To a decoder blanks are tokens as others are.
            Prompt::Text(text) if self.has_encoder() && text.trim().is_empty() => return Err(RequestError::EmptyText),
            Prompt::Text(text) => (self.tokenize(&text, TextOf::Prompt)?, TextOf::Prompt),
            Prompt::Tokens(ids) if ids.is_empty() => {
                return Err(refused("tokens", "an empty list", "at least one token"));
            }
            Prompt::Tokens(ids) => (self.in_vocabulary(ids)?, TextOf::PromptTokens),
        };
        if ids.is_empty() {
            return Err(RequestError::EmptyText);
        }
        match truncates {
            true => Ok(prompt::cut(ids, self.prompt_tokens_max(behind), |id| self.model.generation.is_end(id))),
            false => Ok(PromptTokens { ids: at_most(ids, of, self.prompt_tokens_max(behind))?, truncated: 0 }),
        }
    }

    /// Tokens that all are in the vocabulary.
    pub(crate) fn in_vocabulary(&self, ids: Vec<u32>) -> Result<Vec<u32>, RequestError> {
        let vocab_size = self.model.vocab_size;
        match ids.iter().zip(1..).find(|&(&id, _)| id as usize >= vocab_size) {
            None => Ok(ids),
            Some((id, place)) => {
                let found = format!("{id} in place {place}");
                Err(refused("tokens", found, generation_check::tokens_of(vocab_size)))
            }
        }
    }

    /// The tokens of every target. Each and the prompt together have no more tokens than the model has positions, and all of
    /// them and the prompt must fit one batch.
    pub(crate) fn targets(&self, prompt_tokens: usize, targets: &[String]) -> Result<Vec<Vec<u32>>, RequestError> {
        within("targets (their number)", targets.len(), 1, self.limits.targets_max)?;
        if self.has_encoder() && targets.iter().any(|target| target.trim().is_empty()) {
            return Err(refused("targets", "an empty text", "texts with tokens"));
        }
        let positions = self.positions_max();
        let targets = targets.iter().zip(1..).map(|(target, number)| {
            let of = TextOf::Target(number);
            let ids = at_most(self.tokenize(target, of)?, of, self.prompt_tokens_max(0))?;
            let tokens = ids.len();
            match prompt_tokens + tokens > positions {
                true => Err(RequestError::NoRoom { of, tokens, prompt_tokens, positions }),
                false => Ok(ids),
            }
        });
        let targets = targets.collect::<Result<Vec<_>, _>>()?;
        if targets.iter().any(Vec::is_empty) {
            return Err(refused("targets", "a text without tokens", "texts with tokens"));
        }
        let tokens = targets.iter().map(Vec::len).sum::<usize>() + prompt_tokens;
        within("tokens of text and targets", tokens, 1, self.batch.tokens_max)?;
        Ok(targets)
    }

    /// The checked options of an encoding.
    pub(crate) fn encoding(
        &self,
        params: &EncodeParams,
        truncated_tokens: usize,
    ) -> Result<EncodeOptions, RequestError> {
        let EncodeParams { pooling, normalize, .. } = *params;
        if normalize && pooling == Pooling::None {
            return Err(refused("normalize", "set where each token has a row", "a pooled row to normalize"));
        }
        Ok(EncodeOptions { pooling, normalize, truncated_tokens })
    }

    /// The checked options of a generation from a prompt of so many tokens that follows its schema's `grammar`, if it has one.
    /// Prompt and answer together have no more tokens than the model has positions; the prompt leaves room for one.
    pub(crate) fn options(
        &self,
        params: &mut GenerateParams,
        prompt_tokens: usize,
        grammar: Option<Grammar>,
    ) -> Result<GenerateOptions, RequestError> {
        let (limits, model) = (self.limits, &self.model.generation);
        let room = self.positions_max().saturating_sub(prompt_tokens);
        let tokens_max = match params.max_tokens {
            0 => model.tokens_max.unwrap_or(limits.tokens_default).min(limits.tokens_max).min(room),
            tokens if tokens <= limits.tokens_max && tokens > room => {
                let positions = self.positions_max();
                let prompt = counted(prompt_tokens, "token");
                let expected = format!("1 to {room}: the model has {positions} positions, and the prompt {prompt}");
                return Err(refused("max_tokens", tokens, expected));
            }
            tokens => within("max_tokens", tokens, 1, limits.tokens_max)?,
        };
        let tokens_min = match params.min_tokens {
            // A grammar says when its text may end.
            None if grammar.is_some() => 0,
            None => model.tokens_min.min(tokens_max),
            Some(tokens) if tokens <= tokens_max => tokens,
            Some(tokens) => {
                let whose = if params.max_tokens == 0 { ", as the request does not give it" } else { "" };
                let expected = format!("at most max_tokens, which is {tokens_max}{whose}");
                return Err(refused("min_tokens", tokens, expected));
            }
        };
        generation_check::beside_grammar(grammar.as_ref(), tokens_min, params.ignore_eos)?;
        let sampling = params.sampling.settings(model.sampling);
        generation_check::sampling(&sampling, self.model.vocab_size)?;
        let logprobs = generation_check::logprobs(params.logprobs)?;
        let choices_max = limits.choices_max.min(self.batch.sequences_max);
        let choices = within("choices", params.choices.max(1), 1, choices_max)?;
        within("stop (their number)", params.stop.len(), 0, limits.stops_max)?;
        for stop in &params.stop {
            if stop.is_empty() {
                return Err(refused("stop", "an empty text", format!("texts of 1 to {} bytes", limits.stop_bytes_max)));
            }
            within("stop (bytes)", stop.len(), 1, limits.stop_bytes_max)?;
        }
        Ok(GenerateOptions {
            tokens_max,
            tokens_min,
            ignore_eos: params.ignore_eos,
            choices,
            logprobs,
            sampling,
            grammar,
            door: params.door,
            stop: std::mem::take(&mut params.stop),
        })
    }

    /// What is reserved for the keys and values of a request with so many tokens of prompt: it must fit the budget by
    /// itself.
    pub(crate) fn cache_bytes(&self, prompt_tokens: usize, work: &Work) -> Result<u64, RequestError> {
        let (needed, limit) = (self.needed_cache_bytes(prompt_tokens, work), self.batch.cache_bytes_max);
        if needed > limit { Err(RequestError::CacheTooSmall { needed, limit }) } else { Ok(needed) }
    }

    fn has_encoder(&self) -> bool {
        self.model.has_encoder()
    }

    /// The tokens of a sequence at most. The input of an encoder is no part of it.
    fn positions_max(&self) -> usize {
        self.model.positions_max.unwrap_or(usize::MAX)
    }

    fn prompt_tokens_max(&self, behind: usize) -> usize {
        self.limits.prompt_tokens_max.min(self.positions_max().saturating_sub(behind))
    }

    fn needed_cache_bytes(&self, prompt_tokens: usize, work: &Work) -> u64 {
        match work.sequences() {
            0 if self.has_encoder() => 0,
            // A prompt whose states are asked for is a sequence while they are computed.
            0 => self.cache_size.of_request(prompt_tokens, 1, 0),
            sequences => self.cache_size.of_request(prompt_tokens, sequences, work.decoded_tokens_max()),
        }
    }

    /// The tokens of a text as the model reads it, or of a target as the model writes it; however many, of a text of not
    /// too many bytes.
    fn tokenize(&self, text: &str, of: TextOf) -> Result<Vec<u32>, RequestError> {
        match of {
            TextOf::Target(_) => self.tokenize_by(text, of, Tokenizer::encode_answer),
            _ => self.tokenize_by(text, of, Tokenizer::encode),
        }
    }

    /// The same by one of the tokenizer's ways.
    pub(crate) fn tokenize_by(
        &self,
        text: &str,
        of: TextOf,
        encode: impl FnOnce(&Tokenizer, &str) -> Result<Vec<u32>, ModelError>,
    ) -> Result<Vec<u32>, RequestError> {
        let (bytes, limit) = (text.len(), self.limits.text_bytes_max);
        if bytes > limit {
            return Err(RequestError::TextTooLong { of, bytes, limit });
        }
        encode(self.tokenizer, text).map_err(|error| match error {
            ModelError::Tokenize { reason } => RequestError::Tokenize { of, reason },
            ModelError::TextTooLong { bytes, limit } => RequestError::TextTooLong { of, bytes, limit },
            error => error.into(),
        })
    }
}

/// The tokens of a text, if they are not too many.
fn at_most(ids: Vec<u32>, of: TextOf, limit: usize) -> Result<Vec<u32>, RequestError> {
    let tokens = ids.len();
    if tokens > limit { Err(RequestError::TooManyTokens { of, tokens, limit }) } else { Ok(ids) }
}

/// A count that is within its bounds.
pub(crate) fn within(field: &'static str, found: usize, min: usize, max: usize) -> Result<usize, RequestError> {
    if (min..=max).contains(&found) { Ok(found) } else { Err(refused(field, found, format!("{min} to {max}"))) }
}

/// The error that a field is not as expected.
pub(crate) fn refused(field: &'static str, found: impl ToString, expected: impl Into<String>) -> RequestError {
    RequestError::Argument { field, found: found.to_string(), expected: expected.into() }
}
