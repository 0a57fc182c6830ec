//! What a client is told when its request fails: each [`RequestError`] as a fault, which `sida-rpc` turns into
//! a gRPC status.

use sida_model::ModelError;
use sida_rpc::{Fault, Reason};

use crate::answer::request_error::{RequestError, TextOf};

impl From<RequestError> for Fault {
    fn from(error: RequestError) -> Self {
        use RequestError as E;
        let fault = |reason| Fault::from_error(reason, &error);
        match &error {
            E::EmptyText => fault(Reason::EmptyText),
            E::TextTooLong { of, bytes, limit } => {
                fault(Reason::TextTooLong).with("field", field(of)).with("bytes", bytes).with("limit", limit)
            }
            E::TooManyTokens { of, tokens, limit } => {
                fault(Reason::TextTooLong).with("field", field(of)).with("tokens", tokens).with("limit", limit)
            }
            E::NoRoom { of, tokens, prompt_tokens, positions } => fault(Reason::TextTooLong)
                .with("field", field(of))
                .with("tokens", tokens)
                .with("limit", positions.saturating_sub(*prompt_tokens)),
            // What the tokenizer refuses is the caller's text.
            E::Tokenize { of, .. } => fault(Reason::InvalidRequest).with("field", field(of)),
            E::CacheTooSmall { needed, limit } => {
                fault(Reason::InvalidRequest).with("needed_bytes", needed).with("limit", limit)
            }
            E::Argument { field, .. } => fault(Reason::InvalidRequest).with("field", field),
            E::JsonSchema { .. } => fault(Reason::InvalidRequest).with("field", "json_schema"),
            E::QueueFull { limit, retry_after } => {
                fault(Reason::QueueFull).with("limit", limit).retry_after(*retry_after)
            }
            E::QueueTokens { limit, retry_after } => {
                fault(Reason::QueueFull).with("limit_tokens", limit).retry_after(*retry_after)
            }
            E::ClientShare { share, retry_after } => {
                fault(Reason::ClientShare).with("share", share).retry_after(*retry_after)
            }
            E::ClientLimit { limit, allowed, retry_after } => {
                let fault = fault(Reason::ClientLimit).with("limit", limit).with("allowed", allowed);
                retry_after.iter().fold(fault, |fault, after| fault.retry_after(*after))
            }
            // It would be refused again, whenever it came.
            E::ClientLimitBelow { limit, allowed, .. } => {
                fault(Reason::InvalidRequest).with("limit", limit).with("allowed", allowed)
            }
            E::NoTime { time, left, retry_after } => fault(Reason::NoTime)
                .with("time_ms", time.as_millis())
                .with("left_ms", left.as_millis())
                .retry_after(*retry_after),
            E::DeadlineExceeded => fault(Reason::DeadlineExceeded),
            E::Cancelled => fault(Reason::Cancelled),
            E::ShuttingDown => fault(Reason::ShuttingDown),
            E::NoExpertNode => fault(Reason::ExpertUnavailable),
            E::ExpertUnavailable { key, .. } => {
                fault(Reason::ExpertUnavailable).with("layer", key.layer).with("expert", key.expert)
            }
            E::RetriesExhausted { key, .. } => {
                fault(Reason::RetriesExhausted).with("layer", key.layer).with("expert", key.expert)
            }
            E::Model(model) => match &**model {
                ModelError::Device(_) | ModelError::OutOfMemory { .. } => fault(Reason::DeviceFailed),
                _ => fault(Reason::Internal),
            },
            E::NotANumber | E::Panicked => fault(Reason::Internal),
        }
    }
}

/// The field of the request that a text is in, its place counted from 0 as in every list of a message.
fn field(of: &TextOf) -> String {
    match of {
        TextOf::Prompt => "text".to_owned(),
        TextOf::PromptTokens => "tokens".to_owned(),
        TextOf::Text(number) => format!("texts[{}]", number - 1),
        TextOf::Target(number) => format!("targets[{}]", number - 1),
    }
}
