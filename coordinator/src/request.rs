//! A request on its way through the coordinator: what is asked, until when, and where the answer goes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sida_model::ModelError;
use sida_routing::{ExpertKey, NodeId, admission::Cost};
use sida_telemetry::Span;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::{
    output::{Encoding, Scores, Token},
    routing_mode::RoutingMode,
    sampler::Sampling,
};

/// An accepted request: checked, tokenized, on its way.
pub(crate) struct Request {
    /// The prompt. Invariant: not empty, every id within the vocabulary.
    pub(crate) tokens: Vec<u32>,
    /// Who routes it.
    pub(crate) mode: RoutingMode,
    /// What is asked, and where the answer goes.
    pub(crate) work: Work,
    /// When it was accepted.
    pub(crate) accepted: Instant,
    /// When its answer is of no more use.
    pub(crate) deadline: Option<Instant>,
    /// From acceptance to the answer; ends with the request.
    pub(crate) span: Span,
}

/// What is asked, with the way back. A receiver that is gone means that the client is.
pub(crate) enum Work {
    /// Encoder states.
    Encode { pooling: Pooling, reply: oneshot::Sender<Result<Encoding, RequestError>> },
    /// The likelihood of each target (token ids, end of sequence included, never empty).
    /// The sender is taken when it is used.
    Score { targets: Vec<Vec<u32>>, reply: Option<oneshot::Sender<Result<Scores, RequestError>>> },
    /// Tokens, one message each. Unbounded, so that a slow client never holds up the engine; `tokens_max`
    /// bounds it.
    Generate { options: GenerateOptions, reply: mpsc::UnboundedSender<Result<Token, RequestError>> },
}

/// Rows of encoder states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// One: the mean over tokens.
    #[default]
    Mean,
    /// One per token.
    None,
}

/// How a text is generated. Checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GenerateOptions {
    /// Tokens at most, at least 1.
    pub(crate) tokens_max: usize,
    /// No end of sequence before so many tokens.
    pub(crate) tokens_min: usize,
    /// Goes on after an end of sequence.
    pub(crate) ignore_eos: bool,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
}

impl Request {
    /// What it adds to a batch.
    pub(crate) fn cost(&self) -> Cost {
        let prompt = self.tokens.len();
        match &self.work {
            Work::Encode { .. } => Cost { tokens: prompt, sequences: 0 },
            Work::Score { targets, .. } => {
                Cost { tokens: prompt + targets.iter().map(Vec::len).sum::<usize>(), sequences: targets.len() }
            }
            Work::Generate { .. } => Cost { tokens: prompt + 1, sequences: 1 },
        }
    }

    /// Why it need not be worked on any more, if so.
    pub(crate) fn over(&self, now: Instant) -> Option<RequestError> {
        let gone = match &self.work {
            Work::Encode { reply, .. } => reply.is_closed(),
            Work::Score { reply, .. } => reply.as_ref().is_none_or(oneshot::Sender::is_closed),
            Work::Generate { reply, .. } => reply.is_closed(),
        };
        if gone {
            Some(RequestError::Cancelled)
        } else if self.deadline.is_some_and(|deadline| now >= deadline) {
            Some(RequestError::DeadlineExceeded)
        } else {
            None
        }
    }

    /// Answers with an error. Nobody may be there to hear it any more, which is no error.
    pub(crate) fn fail(mut self, error: RequestError) {
        self.span.fail(&error);
        match self.work {
            Work::Encode { reply, .. } => drop(reply.send(Err(error))),
            Work::Score { reply, .. } => {
                if let Some(reply) = reply {
                    drop(reply.send(Err(error)));
                }
            }
            Work::Generate { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

/// Why a request was not answered. `front_door` gives each its gRPC status.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs)]
pub enum RequestError {
    #[error("the text is empty")]
    EmptyText,
    #[error("the text has {bytes} bytes, more than the {limit} allowed")]
    TextTooLong { bytes: usize, limit: usize },
    #[error("the prompt has {tokens} tokens, more than the {limit} allowed")]
    PromptTooLong { tokens: usize, limit: usize },
    #[error("{field} is {found}, expected {expected}")]
    Argument { field: &'static str, found: String, expected: String },
    #[error("routing mode GUIDED is not served by this version; EXACT and HASH are")]
    GuidedMode,
    #[error("{limit} requests are waiting already")]
    QueueFull { limit: usize, retry_after: Duration },
    #[error("the deadline passed before the answer was complete")]
    DeadlineExceeded,
    #[error("the caller went away")]
    Cancelled,
    #[error("the coordinator is shutting down")]
    ShuttingDown,
    #[error("the cluster has no expert-node yet")]
    NoExpertNode,
    #[error("no expert-node could compute {key}: {}", reasons(.tried))]
    ExpertUnavailable {
        key: ExpertKey,
        /// Each node that was asked, and why it did not answer.
        tried: Vec<(NodeId, String)>,
    },
    #[error("too many expert calls failed lately to ask another node for {key}: {}", reasons(.tried))]
    RetriesExhausted {
        key: ExpertKey,
        /// As above.
        tried: Vec<(NodeId, String)>,
    },
    #[error("the model failed: {0}")]
    Model(#[from] Arc<ModelError>),
    #[error("the model's output is not a number")]
    NotANumber,
    #[error("the step that worked on this request panicked; it was logged")]
    Panicked,
}

impl From<ModelError> for RequestError {
    fn from(error: ModelError) -> Self {
        Self::Model(Arc::new(error))
    }
}

fn reasons(tried: &[(NodeId, String)]) -> String {
    if tried.is_empty() {
        return "the cluster has no expert-node".to_owned();
    }
    tried.iter().map(|(node, reason)| format!("{node}: {reason}")).collect::<Vec<_>>().join("; ")
}
