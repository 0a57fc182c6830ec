//! Why an expert call failed, and what follows from that: whether the node, the call or one expert of it is to blame.

use std::time::Duration;

use thiserror::Error;

/// Why an expert-node did not answer a call with rows.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CallFailure {
    #[error("not connected: {reason}")]
    Disconnected { reason: String },
    #[error("no sign of life, {waited:.1?} after the call")]
    Silent { waited: Duration },
    #[error("no answer within {waited:.1?}, although it is alive")]
    Late { waited: Duration },
    #[error("more than {limit} bytes under way")]
    Congested { limit: usize },
    #[error("{message}")]
    Refused { blame: Blame, message: String },
    #[error("it knows a newer placement")]
    Stale,
    #[error("malformed answer: {reason}")]
    Malformed { reason: String },
    #[error("it panicked")]
    Panicked,
    #[error("nobody waits for the answer any more")]
    Unwanted,
}

/// What a node that refuses a call cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// This call, whoever would ask.
    Call,
    /// One of the call's experts; it may well compute the others.
    Expert,
    /// Any call, for now.
    Node,
}

impl CallFailure {
    /// Every [`Self::label`] of a failover.
    pub const LABELS: [&str; 8] =
        ["disconnected", "silent", "late", "congested", "refused", "stale_epoch", "malformed", "panicked"];

    /// Whether one expert of the call may have failed rather than the node.
    pub fn is_of_one_expert(&self) -> bool {
        matches!(self, Self::Refused { blame: Blame::Expert, .. } | Self::Panicked)
    }

    /// Whether the node is to be left alone for a while. A node that refuses answers, and may answer the next call,
    /// unless it ends or its device fails.
    pub fn is_of_the_node(&self) -> bool {
        match self {
            Self::Disconnected { .. } | Self::Silent { .. } | Self::Late { .. } | Self::Malformed { .. } => true,
            Self::Refused { blame, .. } => *blame == Blame::Node,
            Self::Congested { .. } | Self::Stale | Self::Panicked | Self::Unwanted => false,
        }
    }

    /// Whether the same call could succeed on the same node once that is back: it failed for what the node or the
    /// network went through, not for what was asked.
    pub fn may_pass(&self) -> bool {
        self.is_of_the_node() || matches!(self, Self::Congested { .. })
    }

    /// The `reason` label of `sida_failovers_total`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Disconnected { .. } => "disconnected",
            Self::Silent { .. } => "silent",
            Self::Late { .. } => "late",
            Self::Congested { .. } => "congested",
            Self::Refused { .. } => "refused",
            Self::Stale => "stale_epoch",
            Self::Malformed { .. } => "malformed",
            Self::Panicked => "panicked",
            Self::Unwanted => "unwanted",
        }
    }
}
