//! What callers ask for, and the checks that make a request of it: the one place where limits on requests are enforced,
//! whether they came by gRPC or from this process.

use std::time::Instant;

use sida_model::{CacheSize, GenerationConfig, ModelError, Tokenizer};
use sida_routing::admission::Limits;
use sida_rpc::Client;
use sida_telemetry::TraceContext;

use crate::{
    answer::{
        output::Pooling,
        request_error::{RequestError, TextOf},
        routing_mode::RoutingMode,
        sampler::{SamplerSettings, Sampling},
    },
    config::RequestLimits,
    intake::request::{GenerateOptions, Work},
};

/// A request for encoder states.
#[derive(Clone, Debug, Default)]
pub struct EncodeParams {
    /// The text.
    pub text: String,
    /// Who chooses the experts of its tokens.
    pub routing: RoutingMode,
    /// Which rows of encoder states come back.
    pub pooling: Pooling,
    /// Until when the answer is of use.
    pub deadline: Option<Instant>,
    /// The trace that the request is part of; `None` begins one.
    pub trace: Option<TraceContext>,
    /// Who asks, as far as that is known: those who ask much take turns with the others.
    pub client: Option<Client>,
}

/// A request for the likelihood of targets.
#[derive(Clone, Debug, Default)]
pub struct ScoreParams {
    /// The text.
    pub text: String,
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
}

/// A request to generate text.
#[derive(Clone, Debug, Default)]
pub struct GenerateParams {
    /// The text.
    pub text: String,
    /// Who chooses the experts of its tokens.
    pub routing: RoutingMode,
    /// Tokens at most; 0 for the model's default or, if it has none, the server's.
    pub max_tokens: usize,
    /// No end before so many tokens: neither of the sequence nor by a stop text, which ends the answer where it is complete.
    /// `None` for the model's default, mostly 0.
    pub min_tokens: Option<usize>,
    /// Goes on after an end of sequence, to measure generation.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The answer ends before one of these.
    pub stop: Vec<String>,
    /// Until when the answer is of use.
    pub deadline: Option<Instant>,
    /// The trace that the request is part of; `None` begins one.
    pub trace: Option<TraceContext>,
    /// Who asks, as far as that is known: those who ask much take turns with the others.
    pub client: Option<Client>,
}

/// The limits that requests are held to, and the tokenizer that measures them.
pub(crate) struct Acceptance<'a> {
    pub(crate) limits: &'a RequestLimits,
    pub(crate) batch: &'a Limits,
    pub(crate) cache_size: CacheSize,
    pub(crate) tokenizer: &'a Tokenizer,
    /// What the model does where a request does not say.
    pub(crate) generation: &'a GenerationConfig,
    pub(crate) has_encoder: bool,
}

impl Acceptance<'_> {
    /// The tokens of a prompt, of an encoder its end of sequence included.
    pub(crate) fn prompt(&self, text: &str) -> Result<Vec<u32>, RequestError> {
        // To a decoder blanks are tokens as others are.
        if self.has_encoder && text.trim().is_empty() {
            return Err(RequestError::EmptyText);
        }
        let tokens = self.tokens(text, TextOf::Prompt)?;
        if tokens.is_empty() { Err(RequestError::EmptyText) } else { Ok(tokens) }
    }

    /// The tokens of every target. All of them and the prompt must fit one batch.
    pub(crate) fn targets(&self, prompt_tokens: usize, targets: &[String]) -> Result<Vec<Vec<u32>>, RequestError> {
        within("targets (their number)", targets.len(), 1, self.limits.targets_max)?;
        if self.has_encoder && targets.iter().any(|target| target.trim().is_empty()) {
            return Err(refused("targets", "an empty text", "texts with tokens"));
        }
        let targets = targets.iter().zip(1..).map(|(target, number)| self.tokens(target, TextOf::Target(number)));
        let targets = targets.collect::<Result<Vec<_>, _>>()?;
        if targets.iter().any(Vec::is_empty) {
            return Err(refused("targets", "a text without tokens", "texts with tokens"));
        }
        let tokens = targets.iter().map(Vec::len).sum::<usize>() + prompt_tokens * self.readings(targets.len());
        within("tokens of text and targets", tokens, 1, self.batch.tokens_max)?;
        Ok(targets)
    }

    /// The checked options of a generation.
    pub(crate) fn options(&self, params: &mut GenerateParams) -> Result<GenerateOptions, RequestError> {
        let (limits, model) = (self.limits, self.generation);
        let tokens_max = match params.max_tokens {
            0 => model.tokens_max.unwrap_or(limits.tokens_default).min(limits.tokens_max),
            tokens => within("max_tokens", tokens, 1, limits.tokens_max)?,
        };
        let tokens_min = match params.min_tokens {
            None => model.tokens_min.min(tokens_max),
            Some(tokens) if tokens <= tokens_max => tokens,
            Some(tokens) => {
                let whose = if params.max_tokens == 0 { ", as the request does not give it" } else { "" };
                let expected = format!("at most max_tokens, which is {tokens_max}{whose}");
                return Err(refused("min_tokens", tokens, expected));
            }
        };
        let sampling = params.sampling.settings(model.sampling);
        let SamplerSettings { temperature, top_p, .. } = sampling;
        if !(0.0..=100.0).contains(&temperature) {
            return Err(refused("temperature", temperature, "0 to 100"));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(refused("top_p", top_p, "0 to 1"));
        }
        within("stop (their number)", params.stop.len(), 0, limits.stops_max)?;
        for stop in &params.stop {
            within("stop (bytes)", stop.len(), 1, limits.stop_bytes_max)?;
        }
        Ok(GenerateOptions {
            tokens_max,
            tokens_min,
            ignore_eos: params.ignore_eos,
            sampling,
            stop: std::mem::take(&mut params.stop),
        })
    }

    /// What is reserved for the keys and values of a request with so many tokens of prompt: it must fit the budget by
    /// itself.
    pub(crate) fn cache_bytes(&self, prompt_tokens: usize, work: &Work) -> Result<u64, RequestError> {
        let (needed, limit) = (self.needed_cache_bytes(prompt_tokens, work), self.batch.cache_bytes_max);
        if needed > limit { Err(RequestError::CacheTooSmall { needed, limit }) } else { Ok(needed) }
    }

    /// How often the prompt of a request with so many sequences is computed.
    pub(crate) fn readings(&self, sequences: usize) -> usize {
        if self.has_encoder { 1 } else { sequences.max(1) }
    }

    fn needed_cache_bytes(&self, prompt_tokens: usize, work: &Work) -> u64 {
        match work.sequences() {
            0 if self.has_encoder => 0,
            // A prompt whose states are asked for is a sequence while they are computed.
            0 => self.cache_size.of_request(prompt_tokens, 1, 0),
            sequences => self.cache_size.of_request(prompt_tokens, sequences, work.decoded_tokens_max()),
        }
    }

    fn tokens(&self, text: &str, of: TextOf) -> Result<Vec<u32>, RequestError> {
        let (bytes, limit) = (text.len(), self.limits.text_bytes_max);
        if bytes > limit {
            return Err(RequestError::TextTooLong { of, bytes, limit });
        }
        let ids = match of {
            TextOf::Prompt => self.tokenizer.encode(text),
            TextOf::Target(_) => self.tokenizer.encode_answer(text),
        };
        let ids = ids.map_err(|error| match error {
            ModelError::Tokenize { reason } => RequestError::Tokenize { of, reason },
            ModelError::TextTooLong { bytes, limit } => RequestError::TextTooLong { of, bytes, limit },
            error => error.into(),
        })?;
        let (tokens, limit) = (ids.len(), self.limits.prompt_tokens_max);
        if tokens > limit { Err(RequestError::TooManyTokens { of, tokens, limit }) } else { Ok(ids) }
    }
}

fn within(field: &'static str, found: usize, min: usize, max: usize) -> Result<usize, RequestError> {
    if (min..=max).contains(&found) { Ok(found) } else { Err(refused(field, found, format!("{min} to {max}"))) }
}

fn refused(field: &'static str, found: impl ToString, expected: impl Into<String>) -> RequestError {
    RequestError::Argument { field, found: found.to_string(), expected: expected.into() }
}
