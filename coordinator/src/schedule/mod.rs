//! Which requests run when (continuous batching). A batch is prepared on one thread while the batch before it is
//! computed on another; a request joins or leaves the running batch between any two steps.
//!
//! In reading order: `prepare` predicts and preloads for the next batch; `scheduler` chooses who joins and runs step
//! after step; `prefill` computes the prompts of those who join, which `prefixes` lets begin as others did; `postprocess`
//! gives each its share of a step's output; `sequence` is one request while it is decoded, and `generation` what it writes;
//! `batch_span` describes in traces what is done for several requests at once.

pub(crate) mod batch_span;
pub(crate) mod generation;
mod postprocess;
pub(crate) mod prefill;
pub(crate) mod prefixes;
pub(crate) mod prepare;
pub(crate) mod scheduler;
pub(crate) mod sequence;
