//! What one client may use of a coordinator: requests and tokens a minute, requests at a time, places in the queue. What it
//! uses, and whether its next request is within its limits, is in [`client_use`]. Nothing here knows what a client is.

pub mod client_use;

use std::time::Duration;

pub use client_use::{Charge, ClientUse, Standing, together};

/// What a client may use. `None`: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientLimits {
    /// Requests in a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute, of prompts and of answers.
    pub tokens_per_minute: Option<u64>,
    /// Requests at a time, those that wait among them.
    pub requests_max: Option<u64>,
    /// Requests that wait.
    pub queue_max: Option<u64>,
    /// Tokens that wait, of prompts and of the longest answers to them.
    pub queue_tokens_max: Option<u64>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientLimit {
    /// [`ClientLimits::requests_per_minute`].
    RequestsPerMinute,
    /// [`ClientLimits::tokens_per_minute`].
    TokensPerMinute,
    /// [`ClientLimits::requests_max`].
    Requests,
    /// [`ClientLimits::queue_max`].
    Queue,
    /// [`ClientLimits::queue_tokens_max`].
    QueueTokens,
}

impl ClientLimit {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::RequestsPerMinute, Self::TokensPerMinute, Self::Requests, Self::Queue, Self::QueueTokens];

    /// As operators write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "requests-per-minute",
            Self::TokensPerMinute => "tokens-per-minute",
            Self::Requests => "requests-max",
            Self::Queue => "queue-max",
            Self::QueueTokens => "queue-tokens-max",
        }
    }
}

impl ClientLimits {
    /// The limit of this name, to be read or set.
    pub fn limit(&mut self, limit: ClientLimit) -> &mut Option<u64> {
        match limit {
            ClientLimit::RequestsPerMinute => &mut self.requests_per_minute,
            ClientLimit::TokensPerMinute => &mut self.tokens_per_minute,
            ClientLimit::Requests => &mut self.requests_max,
            ClientLimit::Queue => &mut self.queue_max,
            ClientLimit::QueueTokens => &mut self.queue_tokens_max,
        }
    }

    /// These, and those of `others` where there is none here.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            requests_per_minute: self.requests_per_minute.or(others.requests_per_minute),
            tokens_per_minute: self.tokens_per_minute.or(others.tokens_per_minute),
            requests_max: self.requests_max.or(others.requests_max),
            queue_max: self.queue_max.or(others.queue_max),
            queue_tokens_max: self.queue_tokens_max.or(others.queue_tokens_max),
        }
    }
}

/// A request is more than its client may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// By which limit.
    pub limit: ClientLimit,
    /// What that is.
    pub allowed: u64,
    /// When it would be within it.
    pub within: Within,
}

/// When a request that is refused could be within its client's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Within {
    /// So much later, if nothing else is asked until then.
    After(Duration),
    /// When others of its client are over.
    WhenOthersEnd,
    /// At no time: it alone asks for more.
    Never,
}
