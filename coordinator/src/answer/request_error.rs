//! Why a request was not answered: every reason, with the names and numbers that a caller needs.

use std::{fmt, sync::Arc, time::Duration};

use sida_model::ModelError;
use sida_routing::{ExpertKey, NodeId};
use sida_telemetry::counted;
use thiserror::Error;

/// Why a request was not answered. [`crate::answer::fault`] gives each its gRPC status.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs)]
pub enum RequestError {
    #[error("the text is empty")]
    EmptyText,
    #[error("{of} has {bytes} bytes, more than the {limit} allowed")]
    TextTooLong { of: TextOf, bytes: usize, limit: usize },
    #[error("{of} has {tokens} tokens, more than the {limit} allowed")]
    TooManyTokens { of: TextOf, tokens: usize, limit: usize },
    #[error(
        "{of} has {}, more than the {} allowed: the model has {positions} positions, and the prompt {}",
        counted(*tokens, "token"), positions.saturating_sub(*prompt_tokens), counted(*prompt_tokens, "token")
    )]
    NoRoom { of: TextOf, tokens: usize, prompt_tokens: usize, positions: usize },
    #[error("{of} cannot be tokenized: {reason}")]
    Tokenize { of: TextOf, reason: String },
    #[error(
        "the request needs {needed} bytes for keys and values, more than the {limit} allowed (--cache-memory); shorten its text, its answer or its targets"
    )]
    CacheTooSmall { needed: u64, limit: u64 },
    #[error("{field} is {found}, expected {expected}")]
    Argument { field: &'static str, found: String, expected: String },
    #[error("json_schema cannot be followed: {reason}")]
    JsonSchema { reason: String },
    #[error("{limit} requests are waiting already")]
    QueueFull { limit: usize, retry_after: Duration },
    #[error("requests of {limit} tokens are waiting already")]
    QueueTokens { limit: usize, retry_after: Duration },
    #[error("others wait, and this client has its share of {share} of the queue")]
    ClientShare { share: f64, retry_after: Duration },
    #[error("{limit} of this client is {allowed}, and it has had as much")]
    ClientLimit {
        limit: &'static str,
        allowed: u64,
        /// `None`: when others of its requests end.
        retry_after: Option<Duration>,
    },
    #[error("{limit} of this client is {allowed}, and this request alone may take {asks}")]
    ClientLimitBelow { limit: &'static str, allowed: u64, asks: usize },
    #[error(
        "with what is running and waiting the answer takes about {time:.1?}, and {left:.1?} are left until the deadline"
    )]
    NoTime { time: Duration, left: Duration, retry_after: Duration },
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
        /// Each node that was asked, and why it did not answer.
        tried: Vec<(NodeId, String)>,
    },
    #[error("the model failed: {0}")]
    Model(#[from] Arc<ModelError>),
    #[error("the model's output is not a number")]
    NotANumber,
    #[error("the step that worked on this request panicked; it was logged")]
    Panicked,
}

/// Which text of a request an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextOf {
    /// The one that is answered.
    Prompt,
    /// The same, where it came as token ids.
    PromptTokens,
    /// One of several that are encoded, counted from 1.
    Text(usize),
    /// A target to be scored, counted from 1.
    Target(usize),
}

impl fmt::Display for TextOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prompt | Self::PromptTokens => f.write_str("the prompt"),
            Self::Text(number) => write!(f, "text {number}"),
            Self::Target(number) => write!(f, "target {number}"),
        }
    }
}

impl RequestError {
    /// The same where the prompt is one of `count` texts of a call, `number` counted from 1.
    pub(crate) fn of_one(self, number: usize, count: usize) -> Self {
        let of = TextOf::Text(number);
        match self {
            one if count == 1 => one,
            Self::EmptyText => {
                let found = format!("an empty text in place {number}");
                Self::Argument { field: "texts", found, expected: "texts with tokens".to_owned() }
            }
            Self::TextTooLong { of: TextOf::Prompt, bytes, limit } => Self::TextTooLong { of, bytes, limit },
            Self::TooManyTokens { of: TextOf::Prompt, tokens, limit } => Self::TooManyTokens { of, tokens, limit },
            Self::Tokenize { of: TextOf::Prompt, reason } => Self::Tokenize { of, reason },
            other => other,
        }
    }

    /// Whether the same would happen to most other requests here: something is wrong with the model, or with what computes
    /// it.
    pub(crate) fn is_ours(&self) -> bool {
        match self {
            Self::NotANumber | Self::Panicked => true,
            // A large request may find too little memory where others find enough.
            Self::Model(error) => !matches!(**error, ModelError::OutOfMemory { .. }),
            _ => false,
        }
    }
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
