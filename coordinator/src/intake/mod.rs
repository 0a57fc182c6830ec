//! From what a caller asks for to a checked request that waits for its turn.
//!
//! In reading order: `client_uses` says whether its client may ask for more; `prompt` is what is asked about; `accept` checks
//! and tokenizes, with `generation_check` for how tokens are chosen and `grammars` for what they are held to; `request` is
//! what comes of it, and `replay` the recorded routes that it takes where such are measured; `request_span` describes it in
//! a trace; `together` holds the requests of one call until all are read; `queue` is where they wait, and `workload` says whether it can be in time.

pub(crate) mod accept;
pub(crate) mod client_uses;
pub(crate) mod generation_check;
pub(crate) mod grammars;
pub(crate) mod prompt;
pub(crate) mod queue;
pub(crate) mod replay;
pub(crate) mod request;
pub(crate) mod request_queue;
pub(crate) mod request_span;
pub(crate) mod together;
pub(crate) mod workload;
