//! What a node tells about itself: metrics by Prometheus, events by log lines. Set up once per process by the
//! command line and the tests; used by every crate above the pure ones.
//!
//! In reading order: [`names`], [`metrics`], [`logging`].

pub mod logging;
pub mod metrics;
pub mod names;

pub use ::metrics::{counter, gauge, histogram};
