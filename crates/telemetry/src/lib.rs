//! What a node tells about itself: metrics by Prometheus, spans by OTLP, events by log lines. Set up once per process by
//! the command line and the tests; used by every crate above the pure ones.
//!
//! In reading order: [`names`], [`metrics`], `runtime`; [`trace_context`], [`spans`], [`otlp`]; [`logging`],
//! [`seldom`], [`counted()`].

pub mod counted;
pub mod logging;
pub mod metrics;
pub mod names;
pub mod otlp;
mod runtime;
pub mod seldom;
pub mod spans;
pub mod trace_context;

pub use ::metrics::{counter, gauge, histogram};
pub use counted::counted;
pub use seldom::Seldom;
pub use spans::Span;
pub use trace_context::TraceContext;
