//! What a coordinator counts: `metrics` for Prometheus, by `door` where that matters, `statistics` and
//! `inference_counts` for its own status, `step_outcomes` for its health.

pub(crate) mod door;
pub(crate) mod inference_counts;
pub(crate) mod metrics;
pub(crate) mod statistics;
pub(crate) mod step_outcomes;
