//! What a client is told when its request fails: each [`RequestError`] as a fault, which `sida-rpc` turns into
//! a gRPC status.

use sida_model::ModelError;
use sida_rpc::{Fault, Reason};

use crate::answer::request_error::RequestError;

impl From<RequestError> for Fault {
    fn from(error: RequestError) -> Self {
        use RequestError as E;
        let fault = |reason| Fault::from_error(reason, &error);
        match &error {
            E::EmptyText => fault(Reason::EmptyText),
            E::TextTooLong { bytes, limit } => fault(Reason::TextTooLong).with("bytes", bytes).with("limit", limit),
            E::PromptTooLong { tokens, limit } => {
                fault(Reason::TextTooLong).with("tokens", tokens).with("limit", limit)
            }
            E::CacheTooSmall { needed, limit } => {
                fault(Reason::InvalidRequest).with("needed_bytes", needed).with("limit", limit)
            }
            E::Argument { field, .. } => fault(Reason::InvalidRequest).with("field", field),
            E::GuidedMode => fault(Reason::Unsupported).with("mode", "GUIDED"),
            E::QueueFull { limit, retry_after } => {
                fault(Reason::QueueFull).with("limit", limit).retry_after(*retry_after)
            }
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
                // What the tokenizer refuses is the caller's text.
                ModelError::Tokenize { .. } => fault(Reason::InvalidRequest).with("field", "text"),
                ModelError::TextTooLong { .. } => fault(Reason::TextTooLong),
                ModelError::Device(_) | ModelError::OutOfMemory { .. } => fault(Reason::DeviceFailed),
                _ => fault(Reason::Internal),
            },
            E::NotANumber | E::Panicked => fault(Reason::Internal),
        }
    }
}
