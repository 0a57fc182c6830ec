//! What a coordinator counts: `metrics` for Prometheus, `statistics` for its own status.

pub(crate) mod metrics;
pub(crate) mod statistics;
