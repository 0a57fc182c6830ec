//! From what a caller asks for to a checked request that waits for its turn.
//!
//! In reading order: `accept` checks and tokenizes; `request` is what comes of it; `request_span` describes it in a
//! trace; `queue` is where it waits.

pub(crate) mod accept;
pub(crate) mod queue;
pub(crate) mod request;
pub(crate) mod request_queue;
pub(crate) mod request_span;
