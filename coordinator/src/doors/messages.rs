//! Requests made of wire messages, and wire messages made of answers.

use std::time::{Duration, Instant};

use sida_proto::{v1, wire::rows};
use sida_rpc::Client;
use sida_telemetry::TraceContext;

use crate::{
    answer::{
        output::{Encoding, Finish, FinishReason, Pooling, Scores, TargetScore, Token, TokenLogprob, TokenLogprobs},
        request_error::RequestError,
        routing_mode::{Alpha, RoutingMode},
        sampling::Sampling,
        trace::Trace,
    },
    intake::{
        accept::{EncodeParams, GenerateParams, ScoreParams, refused},
        prompt::Prompt,
    },
    measures::door::Door,
};

/// What a gRPC call carries beside its message.
#[derive(Clone)]
pub(crate) struct CallMetadata {
    /// Until when the caller waits.
    pub(crate) deadline: Option<Instant>,
    /// Which trace the call is part of.
    pub(crate) trace: Option<TraceContext>,
    /// Whose call it is.
    pub(crate) client: Option<Client>,
    /// By which door it came.
    pub(crate) door: Door,
}

/// What a message asks to be encoded.
pub(crate) enum EncodeCall {
    /// One prompt.
    One(EncodeParams),
    /// Several texts.
    Each(Vec<EncodeParams>),
}

/// The request behind a message, or those for each of its texts. Limits are checked where they are accepted.
pub(crate) fn encode_call(message: v1::EncodeRequest, caller: CallMetadata) -> Result<EncodeCall, RequestError> {
    let pooling = match v1::Pooling::try_from(message.pooling) {
        Ok(v1::Pooling::Unspecified | v1::Pooling::Mean) => Pooling::Mean,
        Ok(v1::Pooling::None) => Pooling::None,
        Err(_) => return Err(unknown("pooling", message.pooling)),
    };
    let v1::EncodeRequest { text, tokens, texts, truncate, normalize, priority, .. } = message;
    let (CallMetadata { deadline, trace, client, .. }, routing) = (caller, routing(message.routing)?);
    let params = |prompt| {
        let client = client.clone();
        EncodeParams { prompt, routing, pooling, truncate, normalize, deadline, trace, client, priority }
    };
    if texts.is_empty() {
        return Ok(EncodeCall::One(params(prompt(text, tokens)?)));
    }
    if !text.is_empty() || !tokens.is_empty() {
        return Err(refused("texts", "given beside text or tokens", "one of the three"));
    }
    Ok(EncodeCall::Each(texts.into_iter().map(|text| params(text.into())).collect()))
}

/// The request behind a message.
pub(crate) fn score_params(message: v1::ScoreRequest, caller: CallMetadata) -> Result<ScoreParams, RequestError> {
    let CallMetadata { deadline, trace, client, .. } = caller;
    let routing = routing(message.routing)?;
    let prompt = prompt(message.text, message.tokens)?;
    let v1::ScoreRequest { targets, priority, .. } = message;
    Ok(ScoreParams { prompt, targets, routing, deadline, trace, client, priority })
}

/// The request behind a message.
pub(crate) fn generate_params(
    message: v1::GenerateRequest,
    caller: CallMetadata,
) -> Result<GenerateParams, RequestError> {
    Ok(GenerateParams {
        routing: routing(message.routing)?,
        prompt: prompt(message.text, message.tokens)?,
        choices: message.choices as usize,
        logprobs: message.logprobs.map(|count| count as usize),
        max_tokens: message.max_tokens as usize,
        min_tokens: message.min_tokens.map(|count| count as usize),
        ignore_eos: message.ignore_eos,
        sampling: Sampling {
            temperature: message.temperature,
            top_k: message.top_k.map(|count| count as usize),
            top_p: message.top_p,
            min_p: message.min_p,
            repetition_penalty: message.repetition_penalty,
            frequency_penalty: message.frequency_penalty,
            presence_penalty: message.presence_penalty,
            logit_bias: message.logit_bias.into_iter().collect(),
            seed: message.seed,
        },
        stop: message.stop,
        json_schema: (!message.json_schema.is_empty()).then_some(message.json_schema),
        tool_calls: None,
        deadline: caller.deadline,
        trace: caller.trace,
        client: caller.client,
        priority: message.priority,
        door: caller.door,
    })
}

/// The prompt that is in one of two fields.
fn prompt(text: String, tokens: Vec<u32>) -> Result<Prompt, RequestError> {
    match (text.is_empty(), tokens.is_empty()) {
        (_, true) => Ok(Prompt::Text(text)),
        (true, false) => Ok(Prompt::Tokens(tokens)),
        (false, false) => Err(refused("tokens", "given beside text", "one of the two")),
    }
}

fn routing(options: Option<v1::RoutingOptions>) -> Result<RoutingMode, RequestError> {
    let v1::RoutingOptions { mode, alpha } = options.unwrap_or_default();
    let alpha = match v1::AlphaSource::try_from(alpha) {
        Ok(v1::AlphaSource::Unspecified | v1::AlphaSource::Router) => Alpha::Router,
        Ok(v1::AlphaSource::Predicted) => Alpha::Predicted,
        Err(_) => return Err(unknown("routing.alpha", alpha)),
    };
    match v1::RoutingMode::try_from(mode) {
        Ok(v1::RoutingMode::Unspecified | v1::RoutingMode::Exact) => Ok(RoutingMode::Exact),
        Ok(v1::RoutingMode::Hash) => Ok(RoutingMode::Hash { alpha }),
        Ok(v1::RoutingMode::Guided) => Ok(RoutingMode::Guided),
        Err(_) => Err(unknown("routing.mode", mode)),
    }
}

fn unknown(field: &'static str, found: i32) -> RequestError {
    refused(field, found, "a value that this version knows")
}

impl From<Token> for v1::GenerateResponse {
    fn from(token: Token) -> Self {
        Self {
            text: token.text,
            token_id: token.id,
            finish: token.finish.map(v1::Finish::from),
            choice: token.choice as u32,
            logprobs: token.logprobs.map(v1::Logprobs::from),
        }
    }
}

impl From<TokenLogprobs> for v1::Logprobs {
    fn from(logprobs: TokenLogprobs) -> Self {
        let top = |TokenLogprob { id, logprob }| v1::TokenLogprob { token_id: id, logprob };
        Self { logprob: logprobs.logprob, top: logprobs.top.into_iter().map(top).collect() }
    }
}

impl From<Finish> for v1::Finish {
    fn from(finish: Finish) -> Self {
        let reason = match finish.reason {
            FinishReason::End => v1::FinishReason::End,
            FinishReason::Length => v1::FinishReason::Length,
            FinishReason::Stop => v1::FinishReason::Stop,
        };
        Self {
            reason: reason.into(),
            prompt_tokens: finish.prompt_tokens as u32,
            generated_tokens: finish.generated_tokens as u32,
            trace: Some((&finish.trace).into()),
        }
    }
}

impl From<Scores> for v1::ScoreResponse {
    fn from(scores: Scores) -> Self {
        let target =
            |score: &TargetScore| v1::TargetScore { log_likelihood: score.log_likelihood, tokens: score.tokens as u32 };
        Self { scores: scores.targets.iter().map(target).collect(), trace: Some((&scores.trace).into()) }
    }
}

impl From<Encoding> for v1::EncodeResponse {
    fn from(encoding: Encoding) -> Self {
        Self {
            rows: encoding.rows as u32,
            d_model: encoding.d_model as u32,
            trace: Some((&encoding.trace).into()),
            prompt_tokens: encoding.prompt_tokens as u32,
            states: rows::into_payload(encoding.states),
            truncated_tokens: encoding.truncated_tokens as u32,
            encodings: Vec::new(),
        }
    }
}

impl From<&Trace> for v1::Trace {
    fn from(trace: &Trace) -> Self {
        let mode = match trace.mode {
            RoutingMode::Exact => v1::RoutingMode::Exact,
            RoutingMode::Guided => v1::RoutingMode::Guided,
            RoutingMode::Hash { .. } => v1::RoutingMode::Hash,
        };
        let microseconds = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let timings = v1::Timings {
            queue_us: microseconds(trace.timings.queue),
            predict_us: microseconds(trace.timings.predict),
            load_us: microseconds(trace.timings.load),
            backbone_us: microseconds(trace.timings.backbone),
            experts_us: microseconds(trace.timings.experts),
            total_us: microseconds(trace.timings.total),
        };
        let layers = trace.experts.layers().map(|(layer, experts)| v1::LayerUse {
            layer: layer.0.into(),
            experts: experts.iter().map(|expert| expert.0.into()).collect(),
        });
        Self {
            mode: mode.into(),
            unpredicted: trace.unpredicted,
            timings: Some(timings),
            hash_hits: trace.hash.hits,
            hash_misses: trace.hash.misses,
            hash_top1_hits: trace.hash.top1_hits,
            rerouted: trace.rerouted,
            cached_tokens: trace.cached_tokens as u32,
            demand_loads: trace.demand_loads,
            layers: layers.collect(),
            failovers: trace.failovers,
        }
    }
}
